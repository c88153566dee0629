"""Trains a byte-level BPE tokenizer and saves it in the form transformers loads, with a ChatML template.

    python scripts/tokenizer.py --config configs/tokenizer.yaml

Text is cut into pieces (a word with the space before it, a digit, a Chinese character, a run of punctuation), and bytes
that often stand together inside a piece become tokens. All 256 bytes are tokens from the start, so nothing is unknown
and any text comes back as it was. No normaliser, no bos token, no sentencepiece.

Source: Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2 (Radford et al. 2019).
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxsft import run
from jaxsft.config import parse
from jaxsft.data import read

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
PIECES = (
    r"'(?i:s|t|re|ve|m|ll|d)(?!\p{L})"  # the end of we'll; not the start of 'tis
    r"|\p{Han}"  # alone: in a long run, merges would cross from one character's bytes into the next one's
    r"| ?(?:(?!\p{Han})[\p{L}\p{M}])+"  # a word with its space and its combining marks
    r"|\p{N}"  # digits alone, so that numbers are spelled one way
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Data:
    """What the tokenizer sees."""

    train: list[str] = field(default_factory=list)
    """files as for data.train of sft.py; every string field of a row is a text, a file named twice counts twice"""
    heldout: list[str] = field(default_factory=list)
    """the same kinds of file; bytes per token are measured on them"""
    chinese: int = 1
    """how often a Chinese text counts; more gives more characters a token of their own, at the expense of English"""


@dataclass(frozen=True)
class Run:
    """Where the tokenizer goes."""

    output_dir: str = "runs/tokenizer"
    """gets tokenizer.json, tokenizer_config.json and chat_template.jinja"""


@dataclass(frozen=True)
class Config:
    """A byte-level BPE tokenizer with a ChatML template."""

    data: Data = field(default_factory=Data)
    run: Run = field(default_factory=Run)
    vocab_size: int = 2560
    """tokens in all: 3 special ones, 256 bytes, the rest merges"""
    max_length: int = 1024
    """model_max_length, the positions of the model it is for"""


def read_texts(paths: Sequence[str]) -> Iterator[str]:
    """Yields every string field of the rows of some files."""
    for row in read(paths):
        yield from (value for value in row.fields.values() if isinstance(value, str) and value)


def is_chinese(text: str) -> bool:
    """Whether at least a quarter of the characters are Chinese."""
    return 4 * len(re.findall("[\u4e00-\u9fff]", text)) >= len(text)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains the tokenizer on texts.

    Raises:
      ValueError: the texts have too few pairs of bytes for `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"the texts give {size} tokens, vocab_size is {vocab_size}; lower it or add text")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes a folder that `AutoTokenizer.from_pretrained` reads."""
    text_end, _, turn_end = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=turn_end,
        pad_token=text_end,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,  # it would eat the space in "yes ?"
        chat_template=CHATML,
    ).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)  # again: indented, it is twice the size
    path = folder / "tokenizer_config.json"
    # Transformers 5 writes the class's new name, which 4 does not know; both read the old one.
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def main(config: Config) -> None:
    # --- train ---------------------------------------------------------------------------------------------------
    texts = read_texts(config.data.train)
    weighted = (text for text in texts for _ in range(config.data.chinese if is_chinese(text) else 1))
    tokenizer = train(weighted, config.vocab_size)

    # --- save ----------------------------------------------------------------------------------------------------
    folder = Path(config.run.output_dir)
    save(tokenizer, folder, config.max_length)
    print(f"{tokenizer.get_vocab_size()} tokens in {folder}")

    # --- measure -------------------------------------------------------------------------------------------------
    heldout = list(read_texts(config.data.heldout))
    chinese = [text for text in heldout if is_chinese(text)]
    others = [text for text in heldout if not is_chinese(text)]
    for name, some in (("English", others), ("Chinese", chinese)):
        if some:
            tokens = sum(len(tokenizer.encode(text).ids) for text in some)
            print(f"{name}: {sum(len(text.encode()) for text in some) / tokens:.2f} bytes per token, {tokens} tokens")


if __name__ == "__main__":
    run.guard(lambda: main(parse(Config)))
