"""TRL's own code of GRPO and RLOO on given rewards and log-probabilities.

As in trl_losses.py, a trainer is made without its __init__. Here two of its methods run, one after the other: the one
that makes advantages, masks and counts of a rollout, in which sampling and rewards are replaced by what is given, and
the one that makes the loss.
"""

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from .trl_losses import Stub, torch, trainer, trl

PAD, END, PROMPT, WORD = 0, 1, 2, 3  # token ids


class Rollout(NamedTuple):
    """N answers of at most T tokens, n to a prompt, a group after the other."""

    logprobs: np.ndarray  # [N, T] of the policy that learns
    old: np.ndarray  # of the policy that drew the tokens
    reference: np.ndarray
    entropies: np.ndarray
    lengths: np.ndarray  # [N]
    ended: np.ndarray  # [N] bool: by a token that ends, or cut
    rewards: np.ndarray  # [N], NaN where there is none
    answers: int  # n

    @property
    def mask(self) -> np.ndarray:
        return np.arange(self.logprobs.shape[1]) < self.lengths[:, None]


class Learned(NamedTuple):
    """What TRL makes of a rollout."""

    advantages: np.ndarray  # [N]
    loss: float  # of one step
    gradient: np.ndarray  # [N, T] by the log-probabilities
    metrics: dict[str, float]


SHARED = {
    "loss_type": "grpo",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "normalize_advantages": False,  # of RLOO, and the next
    "reward_clip_range": None,
    "mask_truncated_completions": False,
    "max_completion_length": 8,
    "multi_objective_aggregation": "sum_then_normalize",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "vllm_importance_sampling_correction": False,
    "_entropy_bonus_enabled": False,
    "use_adaptive_entropy": False,
    "num_iterations": 2,  # so that the policy that drew the tokens is asked what it thinks of them
    "environment_factories": None,
    "environments": None,
    "tools": None,
    "pad_to_multiple_of": None,
    "_is_vlm": False,
    "log_multimodal": False,
    "reward_func_names": ["given"],
    "reward_funcs": [None],
    "eos_token_ids": [END],
}


def grpo(rollout: Rollout, *, microbatches: int = 1, delta: float | None = None, **options: Any) -> Learned:
    """GRPOTrainer; options are its attributes, such as loss_type, and `delta` and `use_bias_correction_kl`."""
    corrected = options.pop("use_bias_correction_kl", False)
    return _run(trl.GRPOTrainer, rollout, microbatches, {"delta": delta, "use_bias_correction_kl": corrected}, options)


def rloo(rollout: Rollout, **options: Any) -> Learned:
    """RLOOTrainer; options are its attributes."""
    return _run(trl.RLOOTrainer, rollout, 1, {}, options)


def _run(cls: type, rollout: Rollout, microbatches: int, args: dict[str, Any], options: dict[str, Any]) -> Learned:
    n = len(rollout.lengths)
    said = lambda x: SimpleNamespace(log_probs=x, entropy=torch.tensor(rollout.entropies))
    made = trainer(
        cls,
        model=_model(said(torch.tensor(rollout.old))),
        ref_model=_model(said(torch.tensor(rollout.reference))),
        reward_weights=torch.ones(1),
        num_generations=rollout.answers,
        current_gradient_accumulation_steps=microbatches,
        args=SimpleNamespace(
            per_device_train_batch_size=n,
            steps_per_generation=microbatches,
            gradient_accumulation_steps=microbatches,
            gradient_checkpointing_kwargs=None,
            **args,
        ),
        **SHARED | options,
    )
    made._tokenizer = made.processing_class = SimpleNamespace(pad_token_id=PAD)
    made._logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
    made._pending_extra_logs, made._pending_metrics = defaultdict(list), defaultdict(list)
    alone = {"num_processes": 1, "process_index": 0, "is_main_process": True, "sync_gradients": True}
    vars(made.accelerator).update(alone, reduce=lambda x, reduction: x, autocast=contextlib.nullcontext)
    answers = [
        [WORD] * (k - 1) + [END if ended else WORD] for k, ended in zip(rollout.lengths, rollout.ended, strict=True)
    ]
    written = ["" for _ in answers]
    sampled = [[[PROMPT]] * n, answers, written]
    sampled = sampled if cls is trl.RLOOTrainer else [*sampled[:2], None, written, None, {}, None, []]
    made._generate = lambda prompts: tuple(sampled)
    made._calculate_rewards = lambda *_: torch.tensor(rollout.rewards[:, None])
    batch = made._generate_and_score_completions([{"prompt": ""} for _ in answers])

    policy = torch.tensor(rollout.logprobs, requires_grad=True)
    total, rows = 0.0, n // microbatches
    for start in range(0, n, rows):
        cut = lambda x, here=slice(start, start + rows): x[here] if getattr(x, "ndim", 0) else x
        model = _model(SimpleNamespace(**{name: cut(x) for name, x in vars(said(policy)).items()}))
        loss = made._compute_loss(model, {name: cut(x) for name, x in batch.items()})
        loss.backward()
        total += loss.item()
    metrics = {name: values[-1] for name, values in made._metrics["train"].items()}
    return Learned(batch["advantages"].numpy(), total, policy.grad.numpy(), metrics)


def _model(said: Any) -> Stub:
    """Says the same whatever it is asked; a prompt begins with the token PROMPT."""
    return Stub(*[None] * PROMPT, said)
