"""From a configuration to rows: sources are tokenised, mixed, split and packed; and a report of what became of them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxsft import cache as kept
from jaxsft.data import formats, pack, sources
from jaxsft.data.chat import Image, Parsed
from jaxsft.data.info import Source, adapt, resolve
from jaxsft.data.mix import Mix, counts, held_out
from jaxsft.data.rows import Bad, DataError
from jaxsft.data.script import How
from jaxsft.data.store import Documents
from jaxsft.data.stream import PackedRows
from jaxsft.data.tokenise import KINDS, Job, describe, tokenise

ALIGN = 64  # rows that are not packed are padded to a multiple of this


@dataclass(frozen=True)
class Config:
    """What to learn from."""

    train: str | list[str | Source] = ""
    """files (json, jsonl, csv, parquet, arrow, txt, .gz of them), folders, globs, hub data sets (org/name@subset:split)
    or names in data.info; a list mixes them, and each may be {path, format, weight, epochs, max_rows, columns}"""
    eval: str | list[str | Source] | None = None
    """held-out data of the same kind to measure the loss on"""
    val_fraction: float = 0.0
    """hold out this share of the rows of train instead; equal rows stay on one side"""
    info: str = ""
    """a LLaMA-Factory dataset_info.json; train and eval may then be names in it"""
    format: str = "auto"
    """alpaca, sharegpt, messages, prompt_completion, preference, unpaired, prompt, text or image; auto tells each row
    by its columns"""
    mix: Mix = "concat"
    """concat: all rows, each source epochs times; interleave_under: by weight until one source runs out;
    interleave_over: by weight until each was seen whole"""
    template: str = ""
    """chat template: alpaca, chatml, deepseek, gemma, llama3, mistral, phi, plain, vicuna, or a .jinja file; by default
    the model's own, or alpaca where it has none"""
    system: str = ""
    """a system message for conversations that have none"""
    learn: Literal["answers", "last", "all"] = "answers"
    """what is learned of a conversation: all turns of the assistant, its last one, or every token"""
    reasoning: Literal["learn", "mask"] = "learn"
    """whether <think>...</think> in answers is learned, or only read"""
    control_tokens: bool = False
    """special tokens written in the data, such as <|im_end|>, are control tokens, not text"""
    on_bad_row: Literal["error", "skip"] = "error"
    """a row that cannot be used ends the run, after 20 of them were listed; or it is left out and counted"""
    max_length: int = 1024
    """tokens of a row; longer conversations are truncated, longer texts split; of preferences the tokens of one
    document, prompt and answer, and a row has twice as many"""
    packing: bool = True
    """several documents a row, kept apart by segments; otherwise one"""
    seed: int = 0
    """of what is held out, and of the parts of sources that are not taken whole"""
    workers: int = 0
    """processes that tokenise; 0: all cores where the files are large, else this one"""
    cache: str = ""
    """the folder of tokenised data; by default $JAXSFT_CACHE or ~/.cache/jaxsft"""


class Report(NamedTuple):
    """What became of the data, per epoch."""

    rows: int
    documents: int  # conversations, and pieces of texts
    tokens: int
    trained_tokens: int
    truncated: int  # rows that were longer than max_length, texts aside
    dropped: int  # rows that could not be used, those of data.eval among them
    duplicates: int  # rows that are equal to an earlier one
    packed_rows: int
    efficiency: float  # tokens that are no padding / all
    formats: dict[str, int]
    longest: tuple[int, str]  # tokens of the longest row before it was cut, and its place
    bad: list[str]  # the first of those dropped
    cached: bool  # nothing had to be tokenised
    held_out: int = 0  # rows that are measured on
    shared: int | None = None  # tokens that stand in a row of pairs once, and are of both documents

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people.

        Example:
          >>> Report(9, 9, 4000, 1500, 0, 0, 0, 4, 0.9766, {"text": 9}, (700, "a line 1"), [], True).lines()[4:6]
          [('trained tokens', '1,500 (37.5%)'), ('efficiency', '97.7% of 4 rows')]
        """
        formats = ", ".join(f"{name} {count:,}" for name, count in self.formats.items())
        shown = {
            "rows": f"{self.rows:,}" + (", tokenised before" if self.cached else ""),
            "read as": formats if len(self.formats) > 1 else "".join(self.formats),
            "documents": f"{self.documents:,}",
            "tokens": f"{self.tokens:,}",
            "trained tokens": f"{self.trained_tokens:,} ({self.trained_tokens / max(self.tokens, 1):.1%})",
            "efficiency": f"{self.efficiency:.1%} of {self.packed_rows:,} rows",
            "prompt shared": f"{self.shared or 0:,} tokens not computed twice",
            "truncated": f"{self.truncated:,}",
            "dropped": f"{self.dropped:,}" + "".join(f"\n{line}" for line in self.bad),
            "held out": f"{self.held_out:,} rows",
            "duplicate rows": f"{self.duplicates:,}",
            "longest row": f"{self.longest[0]:,} tokens, {self.longest[1]}",
        }
        told = {"held out": self.held_out > 0, "prompt shared": self.shared is not None}
        return [(name, value) for name, value in shown.items() if told.get(name, True)]


Kind = Literal["learn", "preference", "unpaired", "prompt", "image"]


class Loaded(NamedTuple):
    """Rows to learn, rows to measure on, and what became of the data."""

    train: PackedRows
    eval: PackedRows | None
    report: Report


class Chosen(NamedTuple):
    """Documents of all sources, and which of them come how often."""

    sources: list[Documents]
    documents: Int[np.ndarray, "D"]  # numbers through all sources, as often as they come
    report: Report
    digest: str


def load(config: Config, tokenizer: Any, kind: Literal["learn", "masked"] = "learn") -> Loaded:
    """Reads, tokenises and packs what conversations, completions and texts there are.

    Args:
      config: what, and how; `Config(train="train.jsonl")` will do.
      tokenizer: of transformers, fast, with a chat template (`with_template`).
      kind: "masked" takes texts alone, as an encoder reads them; the tokens of the mask are those that it may lack.

    Returns:
      (train, eval, report); eval is None without data.eval and data.val_fraction.

    Raises:
      DataError: rows cannot be used; the message names their places.

    Example:
      >>> import tempfile
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> core = Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, "?"))
      >>> core.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
      >>> with tempfile.TemporaryDirectory() as cache:
      ...     config = Config(train="jaxsft/assets/text/notes.jsonl", max_length=256, cache=cache)
      ...     rows, held_out, report = load(config, tokenizer)
      ...     len(rows) == report.packed_rows, rows[0].tokens.shape, held_out
      (True, (256,), None)
    """
    train, held = choose(config, tokenizer, kind)
    packed, efficiency = _pack(train, config)
    report = train.report._replace(packed_rows=len(packed), efficiency=efficiency)
    return Loaded(packed, None if held is None else _pack(held, config)[0], report)


def _pack(chosen: Chosen, config: Config) -> tuple[PackedRows, float]:
    lengths = np.concatenate([one.lengths for one in chosen.sources])[chosen.documents]
    most = config.max_length
    if config.packing:
        order, rows = pack.plan(lengths, most)
    else:
        most = min(-(-int(lengths.max()) // ALIGN) * ALIGN, most)
        order, rows = np.arange(len(lengths)), np.arange(len(lengths) + 1)
    digest = digest_of(chosen.digest, most, config.packing)
    packed = PackedRows(chosen.sources, chosen.documents[order], rows, most, digest)
    return packed, int(lengths.sum()) / (len(packed) * most)


def digest_of(*parts: Any) -> str:
    """A name for what some values of JSON decide."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def choose(config: Config, tokenizer: Any, kind: str) -> tuple[Chosen, Chosen | None]:
    """Tokenises all sources of a run, and chooses what is learned and what is held out.

    Args:
      config: of the data.
      tokenizer: of transformers.
      kind: what rows the run takes, of `tokenise.KINDS`.

    Raises:
      DataError: see `load`.
    """
    if not config.train:
        raise DataError("data.train is empty; give a file such as train.jsonl, or a data set of the hub")
    least, why = (3, "two that enclose one") if kind == "masked" else (2, "a token and the one it predicts")
    if config.max_length < least:
        raise DataError(f"data.max_length is {config.max_length}; it must be at least {least}, {why}")
    if config.eval and config.val_fraction:
        raise DataError("data.eval and data.val_fraction are both given; choose one")
    found = sources_of(config, config.train)
    opened = [_open(source, config, tokenizer, kind) for source in found]
    documents = [one for one, _, _ in opened]
    held = held_out([one.hashes for one in documents], config.val_fraction, config.seed)
    weights, epochs = [source.weight for source in found], [source.epochs for source in found]
    taken = counts([~one for one in held], config.mix, weights=weights, epochs=epochs, seed=config.seed)
    name = digest_of([key for _, _, key in opened], config.mix, weights, epochs, config.val_fraction, config.seed)
    train = _chosen(documents, taken, all(cached for _, cached, _ in opened), name)
    if config.eval:
        measured = [_open(source, config, tokenizer, kind) for source in sources_of(config, config.eval)]
        ones = [np.ones(len(one.hashes), np.int32) for one, _, _ in measured]
        apart = _chosen([one for one, _, _ in measured], ones, True, digest_of([key for _, _, key in measured]))
        lost = {"dropped": train.report.dropped + apart.report.dropped, "bad": train.report.bad + apart.report.bad}
    elif config.val_fraction:
        apart = _chosen(documents, [one.astype(np.int32) for one in held], True, name + "-held")
        lost = {}
    else:
        return train, None
    return train._replace(report=train.report._replace(held_out=apart.report.rows, **lost)), apart


def sources_of(config: Config, given: str | Sequence[str | Source]) -> list[Source]:
    """The sources of data.train or data.eval, with names in data.info looked up.

    Raises:
      DataError: see `info.resolve`.
    """
    listed = [given] if isinstance(given, str) else given
    made = [Source(one, format=config.format) if isinstance(one, str) else one for one in listed]
    return [resolve(replace(one, format=config.format) if one.format == "auto" else one, config.info) for one in made]


def records(config: Config) -> Iterator[Parsed]:
    """The rows of data.train as records, untokenised.

    Raises:
      DataError: a row cannot be used.
    """
    for source in sources_of(config, config.train):
        for row in sources.scan(source.path):
            if isinstance(row, Bad):
                raise DataError(str(row))
            try:
                yield formats.parse(adapt(row.fields, source), source.format, row.folder)[1]
            except DataError as error:
                raise DataError(f"{row.place}: {error}") from error


def kind_of(config: Config) -> Kind:
    """What kind of run the first row of data.train is for: learn, preference, unpaired, prompt or image.

    Example:
      >>> kind_of(Config(train="jaxsft/assets/quickstart/train.jsonl"))
      'learn'
    """
    first = next(records(config))
    kinds: dict[str, Any] = {**KINDS, "image": Image}
    return next(kind for kind, types in kinds.items() if isinstance(first, types))  # type: ignore[return-value]


def cache(config: Config) -> Path:
    """The folder of what was computed of data once."""
    return Path(config.cache).expanduser() if config.cache else kept.folder()


def _open(source: Source, config: Config, tokenizer: Any, kind: str) -> tuple[Documents, bool, str]:
    how = How(config.system, config.learn, config.reasoning, config.control_tokens)
    return tokenise(
        Job(source, kind, how, config.max_length),
        tokenizer,
        cache(config),
        on_bad_row=config.on_bad_row,
        workers=config.workers,
        show=jax.process_index() == 0,
    )


def _chosen(documents: list[Documents], taken: list[Int[np.ndarray, "_"]], cached: bool, digest: str) -> Chosen:
    times = [count[one.rows] for one, count in zip(documents, taken, strict=True)]
    times = np.concatenate(times)
    numbers = np.repeat(np.arange(len(times), dtype=np.int32), times)
    hashes = np.concatenate([one.hashes for one in documents])
    count = lambda name: int((np.concatenate([getattr(one, name) for one in documents]) * times).sum())
    metas = [one.meta for one in documents]
    report = Report(
        rows=int(sum(count.sum() for count in taken)),
        documents=len(numbers),
        tokens=count("lengths"),
        trained_tokens=count("learned"),
        truncated=sum(meta["truncated"] for meta in metas),
        dropped=sum(meta["dropped"] for meta in metas),
        duplicates=len(hashes) - len(np.unique(hashes)),
        packed_rows=0,
        efficiency=0.0,
        formats=dict(describe(documents)),
        longest=max((tuple(meta["longest"]) for meta in metas), default=(0, "")),
        bad=[": ".join(one) for meta in metas for one in meta["bad"]],
        cached=cached,
    )
    return Chosen(documents, numbers, report, digest)
