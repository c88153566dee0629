"""Rows become the tokens of LLaMA-Factory, as recorded, learned alike, but for reasons that have a name."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxsft.data import formats, pack
from jaxsft.data.chat import Parsed, Preference
from jaxsft.data.formats.turns import with_system
from jaxsft.data.info import Source, adapt, resolve
from jaxsft.data.render import Example, Rendered, encode
from jaxsft.data.rows import Row
from jaxsft.data.script import How, Script, scripts, write
from jaxsft.data.templates import source as template_text
from jaxsft.data.tokenise import Job, tokenise_rows

from . import llamafactory_reference as reference
from .llamafactory_reference import CASES, Case, digest, normalise
from .reasons import DATA, EXPECTED, TOKENIZERS, Pair, by_row, explain, pair, prepared

pytestmark = [
    pytest.mark.parity,
    # What TRL asks of datasets and torch is deprecated there.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

if not DATA.is_dir() or not TOKENIZERS.is_dir():
    pytest.skip(f"{DATA} or {TOKENIZERS} is not here", allow_module_level=True)

STORED = json.loads(Path(__file__).with_name("llamafactory.json").read_text("utf-8"))


SYSTEM = {  # LLaMA-Factory's default prompts; alpaca's ends with the blank line that our template writes
    "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
}
# What makes our templates write as LLaMA-Factory's do.
EDITS = {
    ("separator", "alpaca"): (
        "('### Instruction:\\n' if message.role == 'user' else '') + message.content + '\\n\\n'",
        "'### Instruction:\\n' + message.content + '\\n\\n' if message.role == 'user' else message.content",
    ),
    ("separator", "vicuna"): ("message.content + ' '", "message.content"),
    ("space", "vicuna"): ("' ASSISTANT: ' + ", "' ASSISTANT:' + "),
    ("space", "deepseek"): ("'Assistant: ' + ", "'Assistant:' + "),
}


class Setting(NamedTuple):
    """A case as our pipeline is given it."""

    case: Case
    source: Source
    rows: list[reference.Row]
    template: str  # ours
    tokenizer: Any
    how: How
    blank: set[int]  # ids of white space
    stop: set[int]

    def digest(self, found: Pair) -> str:
        return digest(*normalise(*found, self.blank, self.stop))


def setting(case: Case, folder: Path) -> Setting:
    entry, rows = reference.source(case, DATA)
    (folder / "rows.json").write_text("[]", "utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry | {"file_name": "rows.json"}}), "utf-8")
    template = "chatml" if case.template == "qwen" else case.template
    tokenizer, blank = prepared(case.tokenizer, template, named=case.kind.startswith("named"))
    learn = {(): "answers", ("mask_history",): "last", ("train_on_prompt",): "all"}[tuple(case.settings)]
    how = How(SYSTEM.get(case.template, ""), learn)  # type: ignore[arg-type]
    where = resolve(Source("rows"), str(folder))
    return Setting(case, where, rows, template, tokenizer, how, blank, {tokenizer.eos_token_id})


def as_they_are(one: Setting) -> list[list[Pair]]:
    """Every row as a run would tokenise it; of a pair, both answers."""
    kind = "preference" if "chosen" in one.rows[0] else "learn"
    job = Job(one.source, kind, one.how, one.case.cutoff)
    result = tokenise_rows([Row(row, str(number)) for number, row in enumerate(one.rows)], job, one.tokenizer)
    assert not result.bad
    return by_row(result.piece, len(one.rows))


def changed(one: Setting, row: reference.Row, why: frozenset[str]) -> list[Pair]:
    """A row as our pipeline would have it if it did as LLaMA-Factory does in some respects."""
    text = template_text(one.template)
    for ours, theirs in (EDITS[reason, one.template] for reason in why if (reason, one.template) in EDITS):
        assert ours in text
        text = text.replace(ours, theirs)
    one.tokenizer.chat_template = text
    if "thinking" in why:
        row = row | {"messages": [{"role": "system", "content": "detailed thinking off"}, *row["messages"]]}
    parsed = formats.parse(adapt(row, one.source), one.source.format)[1]
    written = scripts(parsed, one.tokenizer, one.how)
    if "slots" in why:
        rendered = [apart(script, parsed, one) for script in written]
    else:
        rendered = encode(written, one.tokenizer, one.how)
    if "cut" in why:
        rendered = [with_newlines(side, one) for side in rendered]
    cut = shorten(parsed, rendered, one)
    for example in cut:
        example.mask[0] |= "first" in why
    skip = 1 if "bos" in why else 0
    assert not skip or all(example.ids[0] == one.tokenizer.bos_token_id for example in cut)
    return [pair(*(array[skip:] for array in example)) for example in cut]


def shorten(parsed: Parsed, rendered: list[Rendered], one: Setting) -> list[Example]:
    if isinstance(parsed, Preference):
        return list(pack.truncate_pair(*rendered, one.case.cutoff))  # type: ignore[call-arg]
    (whole,) = rendered
    last = one.how.learn == "last"
    return [pack.truncate(Example(*whole[:2]), one.case.cutoff, answers=whole.answers, last_first=last)]


def with_newlines(whole: Rendered, one: Setting) -> Rendered:
    """The newline after a stop token counts to the answer and is learned with it."""
    (newline,) = one.tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids, mask, answers = (np.append(array, value) for array, value in zip(whole, (newline, False, False), strict=True))
    for at in np.flatnonzero(answers[:-1] & ~answers[1:]) + 1:
        assert ids[at] == newline
        mask[at], answers[at] = mask[at - 1], True
    return Rendered(ids, mask, answers)


def apart(script: Script, parsed: Any, one: Setting) -> Rendered:
    """Tokenises in LLaMA-Factory's pieces: answers begin and end one, and the system prompt ends one."""
    assert not script.mark
    text = script.text
    cuts = {0, len(text), *chain.from_iterable(script.answers)}
    opened = with_system(parsed.messages, one.how.system)
    cuts |= {len(write(opened[:1], (), one.tokenizer))} if opened[0].role == "system" else set()
    ids, learned = [], []
    for first, last in pairwise(sorted(cuts)):
        piece = one.tokenizer(text[first:last], add_special_tokens=False, return_offsets_mapping=True)
        ids += piece["input_ids"]
        places = [first + start for start, _ in piece["offset_mapping"]]
        learned += [any(begin <= at < end for begin, end in script.answers) for at in places]
    return Rendered(np.array(ids), np.array(learned), np.array(learned))


def why_not(one: Setting, row: reference.Row, wanted: list[str]) -> str:
    """The reasons that make a row agree: all that must hold, and as few as do of those that may."""
    case = one.case
    holds = {
        "first": "train_on_prompt" in case.settings,
        "thinking": case.kind == "openai" and "tools" not in row,
        "bos": case.template in ("alpaca", "vicuna"),
        "separator": case.template == "vicuna" or (case.template == "alpaca" and "system" in row),
        "space": case.template in ("vicuna", "deepseek"),
    }
    certain = [name for name, value in holds.items() if value]
    whole = changed(one._replace(case=replace(case, cutoff=1 << 20)), row, frozenset(certain))
    long = max(len(ids) for ids, _ in whole) + 1 > case.cutoff  # with the newline at the end
    possible = [*["cut"] * long, *["slots"] * case.kind.startswith("named")]
    return explain(lambda why: list(map(one.digest, changed(one, row, why))) == wanted, certain, possible)


@pytest.mark.parametrize("key", CASES)
def test_rows_are_those_of_llamafactory(key, tmp_path, record_property):
    one = setting(CASES[key], tmp_path)
    stored = [list(row.values()) if isinstance(row, dict) else [row] for row in STORED[key]["rows"]]
    found = [list(map(one.digest, sides)) for sides in as_they_are(one)]
    different = [number for number, pairs in enumerate(zip(found, stored, strict=True)) if pairs[0] != pairs[1]]
    reasons = Counter(why_not(one, one.rows[number], stored[number]) for number in different)
    record_property(key, {"rows": len(stored), "equal": len(stored) - len(different), **reasons})
    assert reasons == EXPECTED.get(key, {})
