"""Tokenizers made on the spot, and the real ones where this checkout has them beside it."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxsft import data
from jaxsft.data import Config, Conversation, Message

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]
WORDS = ["system user assistant be kind hello world good night bye"] * 9

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(**options) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose words are those of WORDS; anything else falls into bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """ChatML; pad is eos, the setting in which others lose the eos."""
    return byte_level(eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that writes a BOS before everything by itself; no chat template."""
    tokenizer = byte_level(bos_token="<s>", eos_token="<|im_end|>")
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return tokenizer


@pytest.fixture(scope="session", params=["smollm2_135m_instruct", "minimind_6400"])
def real(request) -> PreTrainedTokenizerFast:
    """Tokenizers of published models."""
    folder = SHARED / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Published data sets."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session")
def make():
    """Makes the byte-level tokenizer with other special tokens or templates."""
    return byte_level


def documents(rows) -> list[tuple]:
    """(ids, mask) of every document in rows of Tokens, by a plain loop."""
    found = []
    for row in rows:
        for number in range(1, int(row.segments.max(initial=0)) + 1):
            here = row.segments == number
            found.append((tuple(row.tokens[here].tolist()), tuple(row.mask[here].tolist())))
    return found


def load(path, tokenizer, **options):
    return data.load(Config(train=path, **options), tokenizer)


def write(path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def questions(count) -> list[dict]:
    """Alpaca rows of many lengths, each with its own number in it."""
    return [{"instruction": f"hello {i} " * (i % 5 + 1), "output": f"world {i} " * (i % 7 + 1)} for i in range(count)]


def conversation(row) -> Conversation:
    return Conversation((Message("user", row["instruction"]), Message("assistant", row["output"])))
