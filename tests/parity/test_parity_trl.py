"""Rows become the tokens of TRL, which runs beside, learned alike, but for reasons that have a name."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from jaxsft.data import formats
from jaxsft.data.info import Source
from jaxsft.data.render import prompt_ids, render
from jaxsft.data.rows import Row
from jaxsft.data.script import How
from jaxsft.data.templates import source as template_text
from jaxsft.data.tokenise import Job, tokenise_rows

from . import llamafactory_reference as reference
from . import trl_reference
from .llamafactory_reference import CASES, MINIMIND, SMOLLM2, normalise
from .reasons import DATA, EXPECTED, REASONS, TOKENIZERS, Pair, by_row, explain, pair, prepared

extract_prompt = trl_reference.trl.extract_prompt

pytestmark = [
    pytest.mark.parity,
    # What TRL asks of datasets and torch is deprecated there.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

if not DATA.is_dir() or not TOKENIZERS.is_dir():
    pytest.skip(f"{DATA} or {TOKENIZERS} is not here", allow_module_level=True)


def read(name: str) -> list[reference.Row]:
    return json.loads((DATA / name).read_text("utf-8"))[:100]


def texts() -> list[reference.Row]:
    lines = (DATA / "c4_demo.jsonl").read_text("utf-8").split("\n")[:100]
    return [{"text": json.loads(line)["text"]} for line in lines]


def completions(ending: str) -> list[reference.Row]:
    ask = lambda row: "\n".join(filter(None, [row["instruction"], row["input"]]))
    return [{"prompt": ask(row) + ending, "completion": row["output"]} for row in read("alpaca_en_demo.json")]


def judged_messages() -> list[reference.Row]:
    return [{"messages": row["messages"]} for row in read("kto_en_demo.json")]


def toolcalls() -> list[reference.Row]:
    return reference.openai_tools(read("glaive_toolcall_en_demo.json"))[1]


def last_turn(rows: list[reference.Row]) -> list[reference.Row]:
    """Messages as prompt and completion."""
    return [
        {name: value for name, value in row.items() if name != "messages"}
        | {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in rows
    ]


def preferences(*, text: bool, explicit: bool) -> list[reference.Row]:
    found = []
    for row in read("dpo_en_demo.json"):
        prompt = [reference.openai_message(turn["from"], turn["value"]) for turn in row["conversations"]]
        sides = {
            name: [reference.openai_message(row[name]["from"], row[name]["value"])] for name in ("chosen", "rejected")
        }
        if text:
            prompt = "\n".join(turn["content"] for turn in prompt) + "\nA:"
            sides = {name: " " + side[0]["content"] for name, side in sides.items()}
        if explicit:
            found.append({"prompt": prompt, **sides})
        else:
            found.append({name: prompt + side for name, side in sides.items()})
    return found


def judged(*, text: bool) -> list[reference.Row]:
    found = []
    for row in read("kto_en_demo.json"):
        *prompt, last = row["messages"]
        asked = "\n".join(turn["content"] for turn in prompt) + "\nA:"
        answer = " " + last["content"]
        sides = {"prompt": asked, "completion": answer} if text else {"prompt": prompt, "completion": [last]}
        found.append({**sides, "label": row["label"]})
    return found


def wrap(row: reference.Row) -> reference.Row:
    """Every tool in OpenAI's form."""
    if "tools" not in row:
        return row
    return row | {
        "tools": [tool if "function" in tool else {"type": "function", "function": tool} for tool in row["tools"]]
    }


def written_tokens() -> list[reference.Row]:
    """Half of the questions end with what ends a turn."""
    rows = judged_messages()
    for row in rows[::2]:
        asked, *rest = row["messages"]
        row["messages"] = [asked | {"content": asked["content"] + " <|im_end|>"}, *rest]
    return rows


def marked(*, stop: bool) -> str:
    """Our chatml with marks around what the assistant writes, with or without its stop token."""
    text = template_text("chatml")
    said = text[text.index("{{- '<think>") : text.index("{{- '<|im_end|>\\n' }}\n{%- endif %}")]
    end = "{{- '<|im_end|>' }}\n"
    tail = (end + "{%- endgeneration %}\n" if stop else "{%- endgeneration %}\n" + end) + "{{- '\\n' }}\n"
    turn = "{{- '<|im_start|>assistant\\n' }}\n{%- generation %}\n" + said + tail
    at = text.index("{%- else %}\n{{- '<|im_start|>' + message.role")
    return text[:at] + "{%- elif message.role == 'assistant' %}\n" + turn + text[at:]


class Ours(NamedTuple):
    """A kind of rows through both: what TRL is asked for, and how we are asked for the same."""

    rows: Callable[[], list[reference.Row]]
    kind: str = "learn"  # of tokenise.KINDS
    template: str = "chatml"  # a name, "marked", "marked without stop" or "" for the tokenizer's own
    tokenizer: str = SMOLLM2
    how: How = How()
    options: Mapping[str, Any] = MappingProxyType({})  # of SFTConfig
    holds: tuple[str, ...] = ()  # reasons
    may: tuple[str, ...] = ()


TRL = {
    "text": Ours(texts, holds=("opening",)),
    "text, minimind": Ours(texts, template="", tokenizer=MINIMIND, holds=("opening",)),
    "completion, text": Ours(lambda: completions("\n")),
    "completion, text, after a space": Ours(lambda: completions(" "), may=("divergence",)),
    "completion, text, after a blank line": Ours(lambda: completions("\n\n"), may=("divergence",)),
    "completion, messages": Ours(lambda: last_turn(judged_messages()), holds=("newline",)),
    "completion, tools": Ours(lambda: last_turn(toolcalls()), holds=("newline",)),
    "completion, tools, minimind": Ours(
        lambda: last_turn(toolcalls()), template="", tokenizer=MINIMIND, holds=("newline",)
    ),
    "completion, messages, tokens written out": Ours(
        lambda: last_turn(written_tokens()), holds=("newline",), may=("spelled",)
    ),
    "messages, everything": Ours(judged_messages, how=How(learn="all"), holds=("start", "newline")),
    "tools, everything, minimind": Ours(
        toolcalls, template="", tokenizer=MINIMIND, how=How(learn="all"), holds=("start", "newline")
    ),
    "tools, assistant alone": Ours(
        toolcalls, template="marked", options={"assistant_only_loss": True}, holds=("newline",)
    ),
    "tools, assistant alone, stop unmarked": Ours(
        toolcalls, template="marked without stop", options={"assistant_only_loss": True}, holds=("stop", "newline")
    ),
    "preference, messages": Ours(lambda: preferences(text=False, explicit=True), "preference", holds=("newline",)),
    "preference, messages, implicit": Ours(
        lambda: preferences(text=False, explicit=False), "preference", holds=("newline",)
    ),
    "preference, text": Ours(lambda: preferences(text=True, explicit=True), "preference"),
    "preference, text, implicit": Ours(
        lambda: preferences(text=True, explicit=False), "preference", may=("implicit", "divergence")
    ),
    "unpaired, messages": Ours(lambda: judged(text=False), "unpaired", holds=("newline",)),
    "unpaired, text": Ours(lambda: judged(text=True), "unpaired"),
}


def tokenised(one: Ours, rows: list[reference.Row], tokenizer: Any) -> list[list[Pair]]:
    """Every row as a run would have it; of a preference, both answers."""
    result = tokenise_rows(
        [Row(row, str(n)) for n, row in enumerate(rows)], Job(Source(""), one.kind, one.how, 1 << 20), tokenizer
    )
    assert not result.bad
    if one.kind == "unpaired":
        assert list(result.piece.values) == [row["label"] for row in rows]
    return by_row(result.piece, len(rows))


def as_trl(one: Ours, rows: list[reference.Row], tokenizer: Any) -> list[list[Pair]]:
    join = lambda prompt, answer: pair(prompt + answer, [0] * len(prompt) + [1] * len(answer))
    if one.kind == "preference":
        found = trl_reference.preference(rows, tokenizer)
        return [[join(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in found]
    if one.kind == "unpaired":
        return [[join(row["prompt_ids"], row["completion_ids"])] for row in trl_reference.unpaired(rows, tokenizer)]
    return [[pair(*row)] for row in trl_reference.sft(rows, tokenizer, **one.options)]


def parts(row: reference.Row) -> list[tuple[str, str]]:
    """The prompt and each answer of a row of text."""
    row = row if "prompt" in row else extract_prompt(row)
    return [(row["prompt"], row[name]) for name in ("completion", "chosen", "rejected") if name in row]


def meant(found: list[Pair], row: reference.Row, tokenizer: Any, why: frozenset[str]) -> list[Pair]:
    """What TRL has, without what it does for these reasons."""
    stop, eos = tokenizer.eos_token_id, tokenizer.eos_token
    encode_text = lambda text: tokenizer(text, add_special_tokens=False)
    changed = []
    for number, (ids, trained) in enumerate(found):
        ids, trained = list(ids), list(trained)
        if "divergence" in why:
            prompt, answer = parts(row)[number]
            heads, tails = encode_text(prompt)["input_ids"], encode_text(answer + eos)["input_ids"]
            ids, trained = heads + tails, [0] * len(heads) + [1] * len(tails)
        if "opening" in why:
            ids, trained = [stop, *ids], [0, *trained]
        if "start" in why:
            trained[0] = 0
        if "stop" in why:
            trained = [int(value or (ids[at] == stop and trained[at - 1])) for at, value in enumerate(trained)]
        if "newline" in why:
            blank = {i for i in set(ids) if tokenizer.decode([i]).isspace()}
            ids, trained = normalise(ids, trained, blank, {stop})
        changed.append((ids, trained))
    return changed


@pytest.mark.parametrize("name", TRL)
def test_rows_are_those_of_trl(name, record_property):
    one = TRL[name]
    rows = one.rows()
    tokenizer, _ = prepared(one.tokenizer, one.template.partition(" ")[0].replace("marked", "chatml"))
    if one.template.startswith("marked"):
        tokenizer.chat_template = marked(stop=one.template == "marked")
    theirs, found = as_trl(one, rows, tokenizer), tokenised(one, rows, tokenizer)
    bare = [any("function" not in tool for tool in row.get("tools", ())) for row in rows]
    wrapped = as_trl(one, list(map(wrap, rows)), tokenizer) if any(bare) else theirs

    def same(number: int, why: frozenset[str]) -> bool:
        row, here, there = rows[number], found[number], theirs[number]
        if "wrapped" in why:
            there = wrapped[number]
        if "implicit" in why:
            (here,) = tokenised(one, [extract_prompt(row)], tokenizer)
        if "spelled" in why:
            (here,) = tokenised(one._replace(how=one.how._replace(control=True)), [row], tokenizer)
        return here == meant(there, row, tokenizer, why)

    different = [number for number in range(len(rows)) if found[number] != theirs[number]]
    certain = lambda number: (*one.holds, *["wrapped"] * bare[number])
    reasons = Counter(explain(partial(same, number), certain(number), one.may) for number in different)
    record_property(name, {"rows": len(rows), "equal": len(rows) - len(different), **reasons})
    assert reasons == EXPECTED.get(f"TRL: {name}", {})


def test_every_reason_is_of_use():
    assert {name for found in EXPECTED.values() for names in found for name in names.split()} == REASONS.keys()
    assert EXPECTED.keys() <= CASES.keys() | {f"TRL: {name}" for name in TRL}


@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [
        *((MINIMIND, template) for template in ("", "chatml", "alpaca", "deepseek")),
        (SMOLLM2, ""),
        *((SMOLLM2, template) for template in reference.NAMED),
    ],
)
def test_the_prompt_learned_is_the_prompt_asked(tokenizer, template):
    known, _ = prepared(tokenizer, template, named=tokenizer == SMOLLM2)
    for row in read("alpaca_en_demo.json"):
        parsed = formats.parse(row)[1]
        asked = prompt_ids(parsed.messages[:-1], known)
        assert render(parsed, known).ids[: len(asked)].tolist() == asked
