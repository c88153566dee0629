"""TRL's own loss code on given log-probabilities.

Its losses live inside trainers. Each function here makes a trainer without its __init__, sets what the loss reads, puts
in place of the model something that returns the given numbers, and lets TRL compute. What comes back is the loss, its
gradient by the numbers, and the metrics that TRL would log.
"""

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # else its import warns

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", minversion="1.16")  # before, its models returned logits
CPOTrainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
ORPOTrainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer

IGNORED = -100


class Result(NamedTuple):
    """What TRL makes of a batch."""

    loss: float
    gradient: np.ndarray  # by the numbers that were given
    metrics: dict[str, float]


class Answers(NamedTuple):
    """Log-probabilities of tokens under policy and reference, and the log of the policy's sum of squares."""

    logprobs: np.ndarray  # [B, T], 0 outside of `mask`; of pairs, the chosen answers first
    reference: np.ndarray
    collisions: np.ndarray
    mask: np.ndarray  # tokens of the answer


class Stub(torch.nn.Module):
    """In place of a model: returns what it was given, by the first token of what it is asked."""

    is_gradient_checkpointing = False

    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids: Any, **_: Any) -> Any:
        return self.outputs[int(input_ids[0, 0])]


def outputs(answers: Answers, logprobs: Any) -> SimpleNamespace:
    """What a model returns to TRL: what the loss reads, and zeros that metrics are made of."""
    zeros = torch.zeros(logprobs.shape)
    extra = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros > 0}
    logprobs = logprobs * torch.tensor(answers.mask)  # as a model's are, whatever its output layer is asked for
    return SimpleNamespace(log_probs=logprobs, log_sum_sq_probs=torch.tensor(answers.collisions), **extra)


def inputs(answers: Answers, number: int = 0) -> dict[str, Any]:
    """A batch whose first tokens are `number`; each token is predicted from the one before, so there is one more."""
    mask = torch.tensor(np.pad(answers.mask, ((0, 0), (1, 0)))).long()
    return {
        "input_ids": torch.full_like(mask, number),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }


def trainer(cls: type, **attributes: Any) -> Any:
    """A trainer that was never set up, on one CPU."""
    made = object.__new__(cls)
    same = lambda x: x
    made.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    made._metrics = {"train": defaultdict(list)}
    made._total_train_tokens, made._tp_size = 0, 1
    made.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def logged(made: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in made._metrics["train"].items()}


def dpo(answers: Answers, *, discopop_tau: float = 0.05, **options: Any) -> Result:
    """DPOTrainer's loss; options are its attributes: loss_types, loss_weights, beta, f_divergence_type, ld_alpha."""
    policy = torch.tensor(answers.logprobs, requires_grad=True)
    attributes = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0] * len(options.get("loss_types", [0])),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "model": Stub(),
        "ref_model": Stub(outputs(answers, torch.tensor(answers.reference))),
        "args": SimpleNamespace(discopop_tau=discopop_tau, gradient_checkpointing_kwargs=None),
    }
    made = trainer(trl.DPOTrainer, **attributes | options)
    loss = made._compute_loss(Stub(outputs(answers, policy)), inputs(answers), return_outputs=False)
    loss.backward()
    return Result(loss.item(), policy.grad.numpy(), logged(made))


def kto(answers: Answers, mismatched: Answers, label: np.ndarray, **options: Any) -> Result:
    """KTOTrainer's loss; `mismatched` are the answers that its estimate of the KL is made of."""
    policy = torch.tensor(answers.logprobs, requires_grad=True)
    both = lambda first, second: Stub(outputs(answers, first), outputs(mismatched, torch.tensor(second)))
    attributes = {
        "loss_type": "kto",
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "precompute_ref_logps": False,
        "model": Stub(),
        "ref_model": both(torch.tensor(answers.reference), mismatched.reference),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
    }
    made = trainer(trl.KTOTrainer, **attributes | options)
    made.calculate_KL = made.loss_type == "kto"  # what its __init__ sets
    others = {f"KL_{name}": value for name, value in inputs(mismatched, 1).items()}
    batch = inputs(answers) | others | {"label": torch.tensor(label)}
    loss = made._compute_loss(both(policy, mismatched.logprobs), batch, return_outputs=False)
    loss.backward()
    return Result(loss.item(), policy.grad.numpy(), logged(made))


def without_reference(
    cls: type, logits: np.ndarray, tokens: np.ndarray, answer: np.ndarray, **attributes: Any
) -> Result:
    """ORPOTrainer's or CPOTrainer's loss of logits [2N, T, V], chosen answers first; the gradient is by them.

    tokens: [2N, T], of which `answer` is true for those of the answers.
    """
    scores = torch.tensor(logits, requires_grad=True)
    made = trainer(cls, is_encoder_decoder=False, padding_value=0, pad_token_id=0, **attributes)
    labels = torch.tensor(np.where(answer, tokens, IGNORED))
    ids, n = torch.tensor(tokens), len(tokens) // 2
    batch = {}
    for name, here in (("chosen", slice(n)), ("rejected", slice(n, None))):
        batch |= {f"{name}_input_ids": ids[here], f"{name}_attention_mask": torch.ones_like(ids[here])}
        batch |= {f"{name}_labels": labels[here]}
    model = lambda *_, **__: SimpleNamespace(logits=scores)
    loss, metrics = made.get_batch_loss_metrics(model, batch)
    loss.backward()
    return Result(loss.item(), scores.grad.numpy(), metrics)


def orpo(logits: np.ndarray, tokens: np.ndarray, answer: np.ndarray, *, beta: float) -> Result:
    return without_reference(ORPOTrainer, logits, tokens, answer, beta=beta)


def cpo(logits: np.ndarray, tokens: np.ndarray, answer: np.ndarray, **options: Any) -> Result:
    """CPOTrainer's loss; options are its attributes."""
    attributes = {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
        "alpha": 0.0,
    }
    return without_reference(CPOTrainer, logits, tokens, answer, **attributes | options)


def conservative(chosen: np.ndarray, rejected: np.ndarray, *, beta: float, label_smoothing: float) -> np.ndarray:
    """TRL's sigmoid loss with label smoothing, which only its CPOTrainer has, of whatever it is to compare."""
    attributes = {"loss_type": "sigmoid", "beta": beta, "label_smoothing": label_smoothing, "alpha": 0.0}
    made = trainer(CPOTrainer, **attributes)
    return made.cpo_loss(torch.tensor(chosen), torch.tensor(rejected))[0].numpy()


def reward(scores: np.ndarray, *, margin: np.ndarray | None = None, center: float | None = None) -> Result:
    """RewardTrainer's loss of scores [2N], the chosen ones first."""
    given = torch.tensor(scores[:, None], requires_grad=True)
    made = trainer(trl.RewardTrainer, model=Stub(), args=SimpleNamespace(center_rewards_coefficient=center))
    batch = {"input_ids": torch.zeros(1, 1).long(), "attention_mask": torch.ones(1, 1)}
    batch |= {} if margin is None else {"margin": torch.tensor(margin)}
    loss = made.compute_loss(Stub(SimpleNamespace(logits=given)), batch)
    loss.backward()
    return Result(loss.item(), given.grad.numpy()[:, 0], logged(made))
