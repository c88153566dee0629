"""Tokenises real data with LLaMA-Factory's own code and stores a hash of every row, to compare our pipeline against.

LLaMA-Factory pins old libraries, so it lives in an environment of its own, without most of what it asks for:

    python3.11 -m venv lf
    lf/bin/pip install --no-deps llamafactory==0.9.5
    lf/bin/pip install torch transformers==5.6.0 datasets==4.0.0 peft==0.18.1 accelerate==1.11.0
    lf/bin/pip install omegaconf pillow pydantic
    lf/bin/python tests/parity/llamafactory_reference.py --data DIR --tokenizers DIR --out FILE

`--data` is a folder with LLaMA-Factory's demo data and its dataset_info.json, `--tokenizers` one with a folder per
tokenizer, and `--out` is tests/parity/llamafactory.json. `--full FILE` also writes every token and mask, before
`normalise`, to find out why a hash differs.

Everything up to `import_llamafactory` needs numpy alone: tests import `source` and `CASES` to make the same rows, and
`normalise` and `digest` to hash their own.

Tokenizers are read from tokenizer.json as it stands (PreTrainedTokenizerFast), as jaxsft reads them. LLaMA-Factory
would ask AutoTokenizer, which in transformers 5 makes a GPT2Tokenizer of SmolLM2's and loses its splitting of digits.
"""

import argparse
import hashlib
import importlib.machinery
import itertools
import json
import os
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
MOST = 240  # rows of a data set
SMOLLM2, MINIMIND = "smollm2_135m_instruct", "minimind_6400"
NAMED = ("alpaca", "llama3", "gemma", "mistral", "vicuna", "phi", "deepseek", "chatml")
# What a tokenizer gets for the named templates, whose marks should be one token each.
SPECIAL = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|endoftext|>",
    "additional_special_tokens": (
        "<|eot_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> <end_of_turn> [INST] [/INST] <|user|> "
        "<|assistant|> <|system|> <|end|> <|im_end|> <|im_start|>"
    ).split(),
}
OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@dataclass(frozen=True)
class Case:
    """One data set through one template and tokenizer. `kind` says how its rows are made: see `source`."""

    dataset: str
    template: str
    tokenizer: str = SMOLLM2
    cutoff: int = 1024
    kind: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)  # of LLaMA-Factory's DataArguments

    @property
    def key(self) -> str:
        kind = [] if self.kind == "plain" else [self.kind]
        return "/".join([self.dataset, self.template, self.tokenizer, str(self.cutoff), *kind, *self.settings])


def cases() -> Iterator[Case]:
    """Every case, in the order of the stored file."""
    for name in (SMOLLM2, MINIMIND):
        for dataset in ("alpaca_en_demo", "alpaca_zh_demo", "identity"):
            yield Case(dataset, "chatml", name)
        for dataset in ("glaive_toolcall_en_demo", "glaive_toolcall_zh_demo"):
            yield Case(dataset, "qwen", name)
        yield Case("kto_en_demo", "chatml", name, kind="openai")
        yield Case("glaive_toolcall_en_demo", "qwen", name, kind="openai")
    for dataset in ("dpo_en_demo", "dpo_zh_demo"):
        yield Case(dataset, "chatml")
    for dataset, template in (
        ("alpaca_en_demo", "chatml"),
        ("glaive_toolcall_en_demo", "qwen"),
        ("dpo_en_demo", "chatml"),
    ):
        yield Case(dataset, template, cutoff=128)
    yield Case("glaive_toolcall_en_demo", "qwen", settings={"mask_history": True})
    yield Case("alpaca_en_demo", "chatml", settings={"train_on_prompt": True})
    for template, kind in itertools.product(NAMED, ("named", "named_system", "named_history")):
        yield Case("alpaca_en_demo", template, kind=kind)


CASES = {case.key: case for case in cases()}


def source(case: Case, data: Path) -> tuple[Row, list[Row]]:
    """The case's entry as in dataset_info.json, and its rows.

    plain: as they are. openai: as chat messages, see `openai_plain`, `openai_tools`. named: the first 100 as they are;
    named_system: these with a system prompt; named_history: 20 of them with two earlier pairs, see `with_history`.
    """
    info = json.loads((data / "dataset_info.json").read_text("utf-8"))[case.dataset]
    rows = json.loads((data / info["file_name"]).read_text("utf-8"))[:MOST]
    if case.kind == "openai":
        return openai_tools(rows) if "tools" in rows[0] else openai_plain(rows)
    if case.kind == "named_history":
        return info | {"columns": columns("history")}, with_history(rows[:22])
    if case.kind == "named_system":
        return info | {"columns": columns("system")}, [row | {"system": "Be brief."} for row in rows[:100]]
    return info, rows[:100] if case.kind == "named" else rows


def columns(extra: str) -> Row:
    """An alpaca file's columns and one more. An entry that gives columns must give all."""
    return {"prompt": "instruction", "query": "input", "response": "output", extra: extra}


def with_history(rows: list[Row]) -> list[Row]:
    """Each row but the first two, with the two before it as earlier turns."""
    pairs = [["\n".join(filter(None, [row["instruction"], row["input"]])), row["output"]] for row in rows]
    return [row | {"history": pairs[i : i + 2]} for i, row in enumerate(rows[2:])]


def openai_plain(rows: list[Row]) -> tuple[Row, list[Row]]:
    """The messages of a KTO file, as rows for supervised training."""
    info = {"formatting": "openai", "columns": {"messages": "messages"}, "tags": OPENAI | {"system_tag": "system"}}
    return info, [{"messages": row["messages"]} for row in rows]


def openai_tools(rows: list[Row]) -> tuple[Row, list[Row]]:
    """ShareGPT rows with tools in OpenAI's format: calls in `tool_calls`, arguments a dict, tools a list."""
    tags = OPENAI | {"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
    info = {"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}, "tags": tags}
    messages = [[openai_message(turn["from"], turn["value"]) for turn in row["conversations"]] for row in rows]
    return info, [{"messages": m, "tools": json.loads(row["tools"])} for m, row in zip(messages, rows, strict=True)]


def openai_message(role: str, value: str) -> Row:
    """One ShareGPT turn as an OpenAI message."""
    if role == "function_call":
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        calls = [{"type": "function", "function": call} for call in calls]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": {"human": "user", "gpt": "assistant", "observation": "tool"}.get(role, role), "content": value}


def normalise(
    ids: Sequence[int], trained: Sequence[int], newline_ids: Collection[int], stop_ids: Collection[int]
) -> tuple[list[int], list[int]]:
    r"""Without the white space that LLaMA-Factory trains after a stop token, and without what follows the last answer.

    Its templates count the newline after `<|im_end|>` to the answer (chatml, gemma, phi; alpaca's "\n\n"), though no
    model is asked to write it: generation has ended. In every trained run, tokens after its last stop token that are
    white space only (`newline_ids`) become untrained; then the ids end with the last trained token. A run without a
    stop token, cut by cutoff_len, stays.

    >>> normalise([5, 6, 2, 9, 5, 7, 2, 9], [0, 1, 1, 1, 0, 1, 1, 1], newline_ids={9}, stop_ids={2})
    ([5, 6, 2, 9, 5, 7, 2], [0, 1, 1, 0, 0, 1, 1])
    """
    trained = list(trained)
    for value, run in itertools.groupby(range(len(ids)), key=trained.__getitem__):
        run = list(run)
        stops = [i for i in run if ids[i] in stop_ids]
        tail = range(stops[-1] + 1, run[-1] + 1) if value and stops else ()
        if all(ids[i] in newline_ids for i in tail):
            for i in tail:
                trained[i] = 0
    end = max((i + 1 for i, value in enumerate(trained) if value), default=0)
    return list(ids[:end]), trained[:end]


def digest(ids: Sequence[int], trained: Sequence[int]) -> str:
    """A row's 16 hex digits."""
    data = np.asarray(ids, "<i4").tobytes() + np.asarray(trained, "u1").tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def import_llamafactory() -> None:
    """Imports it without torchaudio, which it wants for audio only, and whatever the versions beside it."""
    os.environ |= {"DISABLE_VERSION_CHECK": "1", "LLAMAFACTORY_VERBOSITY": "ERROR"}
    stub = types.ModuleType("torchaudio")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", stub)
    importlib.import_module("llamafactory.data")


def load_tokenizer(case: Case, tokenizers: Path):
    """A new tokenizer, since each template changes it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizers / case.tokenizer)
    if case.kind.startswith("named"):
        tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def convert(case: Case, data: Path, arguments) -> tuple[bool, list[Row]]:
    """LLaMA-Factory's standard form of the rows, and whether they are ranked pairs."""
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr

    info, rows = source(case, data)
    attribute = DatasetAttr("file", dataset_name=case.dataset)
    attribute.join(info)
    converter = get_dataset_converter(attribute.formatting, attribute, arguments)
    return attribute.ranking, [converter(row) for row in rows]


def tokenise(case: Case, data: Path, tokenizers: Path) -> Row:
    """The case with every row as LLaMA-Factory encodes it: ids and trained, for pairs chosen and rejected, or None."""
    from llamafactory.data.processor import PairwiseDatasetProcessor, SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    arguments = DataArguments(template=case.template, cutoff_len=case.cutoff, **case.settings)
    tokenizer = load_tokenizer(case, tokenizers)
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    ranking, rows = convert(case, data, arguments)
    kind = PairwiseDatasetProcessor if ranking else SupervisedDatasetProcessor
    processor = kind(template=template, tokenizer=tokenizer, processor=None, data_args=arguments)
    # One at a time: a row that is dropped leaves nothing behind.
    encoded = [processor.preprocess_dataset({name: [value] for name, value in row.items()}) for row in rows]
    return {
        "dataset": case.dataset,
        "template": case.template,
        "tokenizer": case.tokenizer,
        "cutoff": case.cutoff,
        "settings": {"rows": case.kind, **case.settings},
        "newline_ids": [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()],
        "stop_ids": [tokenizer.eos_token_id],
        "rows": [read(row, ranking) for row in encoded],
    }


def read(encoded: dict[str, list], ranking: bool) -> Row | None:
    """The one row of a processor's answer."""
    if not encoded:
        return None
    if ranking:
        return {name: read_one(encoded, f"{name}_") for name in ("chosen", "rejected")}
    return read_one(encoded, "")


def read_one(encoded: dict[str, list], prefix: str) -> Row:
    """Its ids, and 1 where it has a label."""
    ids, labels = encoded[f"{prefix}input_ids"][0], encoded[f"{prefix}labels"][0]
    return {"ids": ids, "trained": [int(label != -100) for label in labels]}


def hashed(case: Row) -> Row:
    """A case with every sequence normalised and hashed; what only `normalise` needs is left out."""
    newline_ids, stop_ids = set(case["newline_ids"]), set(case["stop_ids"])

    def one(row: Row | None) -> Any:
        if row is None:
            return None
        if "ids" not in row:
            return {name: one(half) for name, half in row.items()}
        return digest(*normalise(row["ids"], row["trained"], newline_ids, stop_ids))

    kept = {name: value for name, value in case.items() if name not in ("newline_ids", "stop_ids")}
    return kept | {"rows": [one(row) for row in case["rows"]]}


def write(made: dict[str, Row], path: Path) -> None:
    """JSON with a line per field of a case."""
    texts = []
    for key, case in made.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in case.items()]
        texts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n", "utf-8")


def main() -> None:
    """Makes every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of LLaMA-Factory's demo data")
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder with a folder per tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="where the hashes go")
    parser.add_argument("--full", type=Path, help="where ids and masks go, if anywhere")
    options = parser.parse_args()
    import_llamafactory()
    made = {key: tokenise(case, options.data, options.tokenizers) for key, case in CASES.items()}
    write({key: hashed(case) for key, case in made.items()}, options.out)
    if options.full:
        write(made, options.full)
    for key, case in made.items():
        print(f"{key}: {len(case['rows'])} rows, {case['rows'].count(None)} dropped")


if __name__ == "__main__":
    main()
