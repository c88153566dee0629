"""Why rows differ from other tools', by name, how many do, and the search for the fewest reasons that explain a row.

A row that differs must agree, token for token, once each reason's change is made to what we write or to what they do:
the reasons that hold for the row, and as few as suffice of those that may. All are counted, and the counts are below.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from jaxsft.data.store import Piece
from jaxsft.data.templates import with_template

from . import llamafactory_reference as reference
from .llamafactory_reference import CASES, MINIMIND, SMOLLM2

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA, TOKENIZERS = SHARED / "sft_llamafactory", SHARED / "tokenizers"

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
