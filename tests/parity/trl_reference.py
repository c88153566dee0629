"""What TRL makes of rows: the tokens its trainers see, and which of them are trained.

Each function makes TRL's own trainer over a tiny random model and reads back the data set that the trainer prepared;
nothing is downloaded or trained. The chat template is the tokenizer's, which is copied, since trainers change it.

Rows go in as an IterableDataset. A Dataset would send them through Arrow first, which gives every dict of a column the
same keys: tools and the arguments of calls would be rendered with nulls that no row has.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

torch.set_num_threads(1)  # as in pairs.py

Row = Mapping[str, Any]
INDEX = "index_of_the_row"
# A trainer that cannot count the rows must be told its number of steps. Nothing is cut unless asked for. TRL's default
# for gradient_checkpointing makes newer transformers warn.
SETTINGS = {
    "max_steps": 1,
    "max_length": None,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": None,
    "report_to": [],
}


class Tokens(NamedTuple):
    """A row of supervised training: `trained` is 1 where the trainer has a label."""

    ids: list[int]
    trained: list[int]


def sft(rows: Sequence[Row], tokenizer: transformers.PreTrainedTokenizerBase, **options: Any) -> list[Tokens | None]:
    """Each row as SFTTrainer tokenises it, None where it drops the row (only if `max_length` is given).

    Rows are {"text"}, {"messages"}, or {"prompt", "completion"} of strings or of messages; messages may come with
    {"tools"}, a list or its JSON. All rows of a call must be of one kind. `options` are SFTConfig's, packing aside:
    `assistant_only_loss` (a template without {% generation %} is replaced by TRL's own if it knows it, else refused),
    `completion_only_loss` (None: on if there are completions), `max_length`, `truncation_mode`, `eos_token`.
    """
    prepared = prepare(trl.SFTTrainer, trl.SFTConfig, rows, tokenizer, options)
    return [row and Tokens(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in prepared]


def preference(
    rows: Sequence[Row], tokenizer: transformers.PreTrainedTokenizerBase, **options: Any
) -> list[dict | None]:
    """Each row's prompt_ids, chosen_ids and rejected_ids as DPOTrainer tokenises them, None where it drops the row.

    Rows are {"prompt", "chosen", "rejected"} or {"chosen", "rejected"}, of strings or of messages. `options` are
    DPOConfig's. Its `max_length` only drops rows here whose prompt is as long; sequences are cut in the collator.
    """
    prepared = prepare(trl.DPOTrainer, trl.DPOConfig, rows, tokenizer, options)
    return [pick(row, "prompt_ids", "chosen_ids", "rejected_ids") for row in prepared]


def unpaired(rows: Sequence[Row], tokenizer: transformers.PreTrainedTokenizerBase, **options: Any) -> list[dict | None]:
    """Each row's prompt_ids, completion_ids and label as KTOTrainer has them, None where it drops the row.

    Rows are {"prompt", "completion", "label"} of strings or of messages; `options` are KTOConfig's.
    """
    # Else it also pairs prompts with other rows' completions, for its estimate of the KL.
    options = {"loss_type": "apo_zero_unpaired"} | options
    prepared = prepare(trl.KTOTrainer, trl.KTOConfig, rows, tokenizer, options)
    return [pick(row, "prompt_ids", "completion_ids", "label") for row in prepared]


def pick(row: Row | None, *names: str) -> dict[str, Any] | None:
    """Some columns of a row that is there."""
    return None if row is None else {name: row[name] for name in names}


def prepare(trainer: type, config: type, rows: Sequence[Row], tokenizer: Any, options: Row) -> list[Row | None]:
    """The trainer's own data set in the order of the rows, None for each that is missing."""
    numbered = [{**copy.deepcopy(dict(row)), INDEX: i} for i, row in enumerate(rows)]
    data = datasets.IterableDataset.from_generator(lambda: iter(numbered))
    extra = {} if trainer is trl.SFTTrainer else {"ref_model": model(tokenizer)}
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            model=model(tokenizer),
            args=config(output_dir=folder, **SETTINGS | dict(options)),
            train_dataset=data,
            processing_class=copy.deepcopy(tokenizer),
            **extra,
        )
        prepared = {row[INDEX]: row for row in made.train_dataset}
    return [prepared.get(i) for i in range(len(rows))]


def model(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.LlamaForCausalLM:
    """The smallest model with the tokenizer's vocabulary."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **shape))
