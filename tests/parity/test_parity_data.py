"""Rows become the tokens of LLaMA-Factory (recorded) and TRL (live), learned alike, but for reasons that have a name.

A row that differs must agree, token for token, once each reason's change is made to what we write or to what they do:
the reasons that hold for the row, and as few as suffice of those that may. All are counted, and the counts are below.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain, combinations, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxsft.data import formats, pack
from jaxsft.data.chat import Parsed, Preference
from jaxsft.data.formats.turns import with_system
from jaxsft.data.info import Source, adapt, resolve
from jaxsft.data.render import Example, Rendered, encode, prompt_ids, render
from jaxsft.data.rows import Row
from jaxsft.data.script import How, Script, scripts, write
from jaxsft.data.store import Piece
from jaxsft.data.templates import source as template_text
from jaxsft.data.templates import with_template
from jaxsft.data.tokenise import Job, tokenise_rows

from . import llamafactory_reference as reference
from . import trl_reference
from .llamafactory_reference import CASES, MINIMIND, SMOLLM2, Case, digest, normalise

extract_prompt = trl_reference.trl.extract_prompt

pytestmark = [
    pytest.mark.parity,
    # What TRL asks of datasets and torch is deprecated there.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA, TOKENIZERS = SHARED / "sft_llamafactory", SHARED / "tokenizers"
if not DATA.is_dir() or not TOKENIZERS.is_dir():
    pytest.skip(f"{DATA} or {TOKENIZERS} is not here", allow_module_level=True)

STORED = json.loads(Path(__file__).with_name("llamafactory.json").read_text("utf-8"))

REASONS = {
    # LLaMA-Factory
    "first": """train_on_prompt gives the first token a label. Its trainer shifts labels by one, so nothing is ever
        predicted there; ours says so in the mask.""",
    "thinking": """LLaMA-Factory's openai formatting adds "detailed thinking off" (Nemotron's words) to the system
        prompt of every row without tools, whatever the template. Ours writes what the row says.""",
    "cut": """A row longer than cutoff_len. LLaMA-Factory counts the newline that follows a stop token to the answer,
        ours to the next question, so that their shares of the room differ by a token and the ends may fall there.""",
    "bos": """LLaMA-Factory's alpaca and vicuna begin without BOS. Stanford Alpaca and FastChat leave it to Llama's
        tokenizer, which writes one; ours writes the tokenizer's BOS where it has one.""",
    "separator": """LLaMA-Factory writes nothing between the system prompt and the first question in alpaca (its
        default prompt brings a blank line along, a row's own does not) and vicuna. Ours writes Alpaca's blank line and
        FastChat's space.""",
    "space": """LLaMA-Factory glues the answer to "ASSISTANT:" (vicuna) and "Assistant:" (deepseek). FastChat and
        DeepSeek's own template write a space there; so does ours, and the space is learned with the first word.""",
    "slots": """LLaMA-Factory also tokenises system prompt, question and what follows a stop token apart. Ours tokenises
        the conversation at once, as apply_chat_template does, in training and when a model is asked.""",
    # TRL
    "opening": """Ours puts BOS, or else EOS, before a text, so that its first word is learned too; TRL begins with that
        word, whose label its shift drops.""",
    "start": """TRL gives the first token a label where it learns everything. Its shift drops it; ours says so.""",
    "newline": """TRL keeps, and in completions learns, what the template writes behind the last stop token. No model is
        asked to write it, so ours ends with the stop token.""",
    "stop": """A template whose {% generation %} leaves out the stop token: TRL never learns to stop. Ours learns the
        special token that follows.""",
    "divergence": """A prompt that ends in a word or blanks which go on in the answer. TRL tokenises both at once and
        learns from where that differs from the prompt alone. Ours tokenises them apart where a token would lie across
        or blanks look ahead, since that is what a model is asked with.""",
    "implicit": """Without a prompt, TRL takes the letters that both texts begin with, even half a word. Ours
        takes whole words, so that the answers begin where words do.""",
    "wrapped": """Tools without {"type": "function", "function": ...}. TRL hands them to the template as they are; ours
        wraps them first, since that is the form chat templates are written for and models were taught in.""",
    "spelled": """A message that holds <|im_end|>. TRL's becomes the token that ends a turn, for whoever writes it. Ours
        spells it, unless data.control_tokens asks otherwise; with control the two agree.""",
}

# Rows that agree for reasons, of the cases that have any; all others agree as they are.
EXPECTED: dict[str, dict[str, int]] = {
    f"glaive_toolcall_en_demo/qwen/{SMOLLM2}/1024": {"cut": 4},
    f"glaive_toolcall_zh_demo/qwen/{SMOLLM2}/1024": {"cut": 4},
    f"kto_en_demo/chatml/{SMOLLM2}/1024/openai": {"thinking": 233, "thinking cut": 7},
    f"glaive_toolcall_en_demo/qwen/{SMOLLM2}/1024/openai": {"cut": 4},
    f"glaive_toolcall_en_demo/qwen/{MINIMIND}/1024": {"cut": 6},
    f"glaive_toolcall_zh_demo/qwen/{MINIMIND}/1024": {"cut": 1},
    f"kto_en_demo/chatml/{MINIMIND}/1024/openai": {"thinking": 227, "thinking cut": 13},
    f"glaive_toolcall_en_demo/qwen/{MINIMIND}/1024/openai": {"cut": 6},
    f"dpo_en_demo/chatml/{SMOLLM2}/1024": {"cut": 50},
    f"dpo_zh_demo/chatml/{SMOLLM2}/1024": {"cut": 26},
    f"alpaca_en_demo/chatml/{SMOLLM2}/128": {"cut": 6},
    f"glaive_toolcall_en_demo/qwen/{SMOLLM2}/128": {"cut": 163},
    f"dpo_en_demo/chatml/{SMOLLM2}/128": {"cut": 19},
    f"glaive_toolcall_en_demo/qwen/{SMOLLM2}/1024/mask_history": {"cut": 25},
    f"alpaca_en_demo/chatml/{SMOLLM2}/1024/train_on_prompt": {"first": 240},
    f"alpaca_en_demo/alpaca/{SMOLLM2}/1024/named": {"bos slots": 100},
    f"alpaca_en_demo/alpaca/{SMOLLM2}/1024/named_system": {"bos separator": 100},
    f"alpaca_en_demo/alpaca/{SMOLLM2}/1024/named_history": {"bos slots": 20},
    f"alpaca_en_demo/vicuna/{SMOLLM2}/1024/named": {"bos separator space": 100},
    f"alpaca_en_demo/vicuna/{SMOLLM2}/1024/named_system": {"bos separator space": 100},
    f"alpaca_en_demo/vicuna/{SMOLLM2}/1024/named_history": {"bos separator space": 20},
    f"alpaca_en_demo/deepseek/{SMOLLM2}/1024/named": {"space": 100},
    f"alpaca_en_demo/deepseek/{SMOLLM2}/1024/named_system": {"space slots": 100},
    f"alpaca_en_demo/deepseek/{SMOLLM2}/1024/named_history": {"space": 20},
    "TRL: text": {"opening": 100},
    "TRL: text, minimind": {"opening": 100},
    "TRL: completion, text, after a space": {"divergence": 87},
    "TRL: completion, text, after a blank line": {"divergence": 87},
    "TRL: completion, messages": {"newline": 100},
    "TRL: completion, messages, tokens written out": {"newline": 50, "newline spelled": 50},
    "TRL: completion, tools": {"newline": 38, "newline wrapped": 62},
    "TRL: completion, tools, minimind": {"newline": 38, "newline wrapped": 62},
    "TRL: messages, everything": {"start newline": 100},
    "TRL: tools, everything, minimind": {"start newline": 38, "start newline wrapped": 62},
    "TRL: tools, assistant alone": {"newline": 38, "newline wrapped": 62},
    "TRL: tools, assistant alone, stop unmarked": {"stop newline": 38, "stop newline wrapped": 62},
    "TRL: preference, messages": {"newline": 100},
    "TRL: preference, messages, implicit": {"newline": 100},
    "TRL: preference, text, implicit": {"implicit": 7},
    "TRL: unpaired, messages": {"newline": 100},
}


Pair = tuple[list[int], list[int]]  # ids, and 1 where learned


def pair(ids: Iterable[int], learned: Iterable[Any]) -> Pair:
    return [int(i) for i in ids], [int(i) for i in learned]


def by_row(piece: Piece, count: int) -> list[list[Pair]]:
    """The documents of each row."""
    found: list[list[Pair]] = [[] for _ in range(count)]
    for number, example in zip(piece.rows, piece.examples, strict=True):
        found[number].append(pair(*example))
    return found


@cache
def loaded(name: str, named: bool) -> tuple[Any, str, str, set[int]]:
    """A tokenizer, its own eos and template, and its ids of white space."""
    case = next(case for case in CASES.values() if (case.tokenizer, case.kind.startswith("named")) == (name, named))
    tokenizer = reference.load_tokenizer(case, TOKENIZERS)
    blank = {i for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])) if text.isspace()}
    return tokenizer, tokenizer.eos_token, tokenizer.chat_template, blank


def prepared(name: str, template: str, *, named: bool = False) -> tuple[Any, set[int]]:
    """A tokenizer with a template, and its ids of white space; `named`: with what the named templates ask for."""
    tokenizer, tokenizer.eos_token, tokenizer.chat_template, blank = loaded(name, named)
    return with_template(tokenizer, template), blank


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Of names, the smallest first."""
    return chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))


def explain(same: Callable[[frozenset[str]], bool], certain: Sequence[str], possible: Sequence[str]) -> str:
    """The certain reasons and the fewest of the possible ones that make a row agree."""
    for more in subsets(possible):
        if (certain or more) and same(frozenset((*certain, *more))):
            return " ".join((*certain, *more))
    return "NO REASON"


# ---- LLaMA-Factory --------------------------------------------------------------------------------------------------

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


# ---- TRL ------------------------------------------------------------------------------------------------------------


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
