"""One loss and backward pass of TRL's trainers of preferences, over a whole tiny model.

Each function makes TRL's real trainer over a checkpoint in Hugging Face's format, lets it prepare the rows and collate
all of them into one batch, computes its loss and calls backward: in float32 on one CPU, without dropout, and without
the optimiser, which test_parity_training.py compares. Nothing is downloaded.

The rows are of strings, so that TRL adds nothing but the end of each answer; what it made of them comes back in
`Step.rows`, for whoever wants the same tokens. `options` are those of the trainer's config.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # else its import warns

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
cpo_of_trl = pytest.importorskip("trl.experimental.cpo")
orpo_of_trl = pytest.importorskip("trl.experimental.orpo")

torch.set_num_threads(1)  # as in pairs.py

Row = Mapping[str, Any]
SETTINGS = {
    "max_length": 512,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


class Step(NamedTuple):
    """What a trainer makes of all rows at once."""

    loss: float
    metrics: dict[str, float]  # by TRL's names
    gradients: dict[str, np.ndarray]  # by the names of parameters in files: Hugging Face's, or PEFT's of an adapter
    rows: list[dict[str, Any]]  # as TRL prepared them: prompt_ids, chosen_ids, rejected_ids, ...


def dpo(
    folder: Path | str,
    rows: Sequence[Row],
    *,
    reference: Path | str | None = None,
    adapter: Path | str | None = None,
    **options: Any,
) -> Step:
    """DPOTrainer on {"prompt", "chosen", "rejected"}.

    Args:
      folder: the policy.
      rows: all of one step.
      reference: another checkpoint; by default the policy itself, whose loss then is log 2.
      adapter: a folder of PEFT's LoRA. It trains, with nothing else, and the reference is the model without it.
      options: of DPOConfig: beta, loss_type, loss_weights, label_smoothing, f_divergence_type, ld_alpha, use_weighting.

    Returns:
      Step; its rows have prompt_ids, chosen_ids, rejected_ids.
    """
    given: dict[str, Any] = {"ref_model": model(reference or folder)}
    if adapter is not None:
        config = peft.LoraConfig.from_pretrained(str(adapter))
        config.inference_mode = False  # which every saved one is in
        given = {"peft_config": config}
    made = trainer(trl.DPOTrainer, trl.DPOConfig, folder, rows, options, **given)
    if adapter is not None:
        lost = peft.set_peft_model_state_dict(made.model, peft.load_peft_weights(str(adapter), device="cpu"))
        assert not lost.unexpected_keys, lost.unexpected_keys
    return step(made)


def kto(folder: Path | str, rows: Sequence[Row], *, reference: Path | str | None = None, **options: Any) -> Step:
    """KTOTrainer on {"prompt", "completion", "label"}, at least two rows.

    Args:
      folder, reference: as in `dpo`.
      rows: all of one step.
      options: of KTOConfig: beta, loss_type, desirable_weight, undesirable_weight.

    Returns:
      Step; its rows have prompt_ids, completion_ids, label, and with loss_type kto KL_completion_ids: the answer of the
      row before, and in the first row that of the last.
    """
    return step(trainer(trl.KTOTrainer, trl.KTOConfig, folder, rows, options, ref_model=model(reference or folder)))


def orpo(folder: Path | str, rows: Sequence[Row], **options: Any) -> Step:
    """ORPOTrainer on {"prompt", "chosen", "rejected"}; options: beta.

    Returns:
      Step; its rows have chosen_input_ids, chosen_labels (-100 for the prompt's tokens), and the same of rejected.
    """
    return step(trainer(orpo_of_trl.ORPOTrainer, orpo_of_trl.ORPOConfig, folder, rows, options))


def cpo(folder: Path | str, rows: Sequence[Row], **options: Any) -> Step:
    """CPOTrainer, as `orpo`; options: beta, loss_type, cpo_alpha, simpo_gamma, alpha, label_smoothing."""
    return step(trainer(cpo_of_trl.CPOTrainer, cpo_of_trl.CPOConfig, folder, rows, options))


def reward(folder: Path | str, rows: Sequence[Row], *, head: np.ndarray | None = None, **options: Any) -> Step:
    """RewardTrainer on {"chosen", "rejected"}, whole texts, with "prompt" before and "margin" where given.

    Args:
      folder: a decoder, or a model for sequence classification.
      rows: all of one step.
      head: [1, D], what makes a score of a feature; by default the folder's, or a random one where it has none.
      options: of RewardConfig: center_rewards_coefficient.

    Returns:
      Step; its rows have chosen_ids, rejected_ids, margin. The head's gradient is "score.weight".
    """
    scorer = model(folder, transformers.AutoModelForSequenceClassification, num_labels=1)
    if head is not None:
        with torch.no_grad():
            scorer.score.weight.copy_(torch.tensor(head))
    return step(trainer(trl.RewardTrainer, trl.RewardConfig, scorer, rows, options, tokenizer=tokenizer(folder)))


def model(folder: Path | str, kind: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    return kind.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager", **options)


def tokenizer(folder: Path | str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def trainer(
    cls: type, config: type, policy: Any, rows: Sequence[Row], options: Row, *, tokenizer: Any = None, **given: Any
) -> Any:
    """TRL's trainer, with all rows in one batch; `policy` is a folder or a model."""
    size = {"per_device_train_batch_size": len(rows), "output_dir": tempfile.gettempdir()}  # nothing is written there
    return cls(
        model=model(policy) if tokenizer is None else policy,
        args=config(**SETTINGS | size | dict(options)),
        train_dataset=datasets.Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer or transformers.AutoTokenizer.from_pretrained(str(policy)),
        **given,
    )


def step(made: Any) -> Step:
    """The loss of all rows, in their order, and its gradient."""
    rows = list(made.train_dataset)
    made.model.train()
    loss = made.compute_loss(made.model, made._prepare_inputs(made.data_collator(rows)))
    loss.backward()
    found = made._stored_metrics if hasattr(made, "_stored_metrics") else made._metrics
    metrics = {name: float(values[-1]) for name, values in found["train"].items()}
    gradients = {
        name.replace(".default.", "."): weight.grad.numpy()
        for name, weight in made.model.named_parameters()
        if weight.grad is not None
    }
    return Step(loss.item(), metrics, gradients, rows)
