"""A real pretrained checkpoint (stories260K, Karpathy) reproduces the float64 figures recorded beside it."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxsft import hub, objectives, sample
from jaxsft.types import Tokens

from .pairs import ours

pytestmark = pytest.mark.parity

DATA = Path(__file__).parents[3] / "shared" / "data"
FOLDER = DATA / "lm_stories260k" / "hf"
if not FOLDER.is_dir():
    pytest.skip(f"{FOLDER} is not here", allow_module_level=True)

REFERENCE = json.loads((FOLDER.parent / "reference.json").read_text(encoding="utf-8"))
CUT, SHORTEST, TEXTS, BOS = 256, 8, 60, 1  # see nll_how


@pytest.fixture(scope="module")
def stories():
    return *hub.load(str(FOLDER)), hub.load_tokenizer(str(FOLDER))


def lines(file: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


TEXTS_OF = {
    "text_tinystories/stories.jsonl: text": lambda: [x["text"] for x in lines("text_tinystories/stories.jsonl")],
    "text_tinyshakespeare/input.txt: blocks between blank lines": lambda: (
        (DATA / "text_tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n\n")
    ),
    "sft_pref_rasbt: output": lambda: [
        x["output"]
        for x in json.loads((DATA / "sft_pref_rasbt/instruction-data-with-preference.json").read_text(encoding="utf-8"))
    ],
    "sft_llamafactory/alpaca_en_demo.json: output": lambda: [
        x["output"] for x in json.loads((DATA / "sft_llamafactory/alpaca_en_demo.json").read_text(encoding="utf-8"))
    ],
    "gsm8k/test.jsonl: question + newline + answer": lambda: [
        x["question"] + "\n" + x["answer"] for x in lines("gsm8k/test.jsonl")
    ],
}


def test_the_tokenizer_gives_the_recorded_ids(stories):
    assert stories[2](REFERENCE["prompt"]).input_ids == REFERENCE["prompt_ids"]
    assert stories[2].decode(REFERENCE["greedy_ids"], skip_special_tokens=True) == REFERENCE["greedy_text"]


def test_the_tokenizer_reads_as_the_folders_tokenizer_json_does(stories):
    """AutoTokenizer builds a LlamaTokenizer anew, without the normalizer that joins spaces in this one."""
    alone = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for text in ("Two  spaces.   Three", " one before", "line\n    indented", "one after "):
        assert stories[2](text).input_ids == alone.encode(text).ids


def test_the_logits_are_the_recorded_ones(stories, difference):
    model, params, tokenizer = stories
    last = np.asarray(ours(model, {"params": params}, np.array([REFERENCE["prompt_ids"]])))[0, -1]
    # Recorded from float64 to 5 decimals; float32 adds about as much again to logits of 18.
    assert difference("stories260k: logits", last[:16], REFERENCE["last_logits_first16"]) < 2e-5
    best = np.argsort(-last)[:5]
    ids, pieces, values = zip(*REFERENCE["last_top5"], strict=True)
    assert best.tolist() == list(ids)
    assert tokenizer.convert_ids_to_tokens(best) == list(pieces)
    assert difference("stories260k: logits", last[best], values) < 2e-5


def test_the_greedy_story_is_the_recorded_one(stories):
    model, params, _ = stories
    prompt = REFERENCE["prompt_ids"]
    expected = REFERENCE["greedy_ids"][len(prompt) :]
    assert sample.answers(sample.generate(model, {"params": params}, [prompt], max_new_tokens=80, stop=[BOS])) == [
        expected
    ]
    assert list(sample.stream(model, {"params": params}, prompt, max_new_tokens=80, stop=[BOS])) == expected


@pytest.mark.parametrize("name", REFERENCE["nll_shared"])
def test_the_negative_log_likelihood_is_the_recorded_one(stories, name):
    model, params, tokenizer = stories
    recorded = REFERENCE["nll_shared"][name]
    rows = [tokenizer(text).input_ids[:CUT] for text in TEXTS_OF[name]()[:TEXTS]]
    assert all(row[0] == BOS for row in rows)
    rows = [row for row in rows if len(row) >= SHORTEST]
    assert sum(len(row) - 1 for row in rows) == recorded["tokens"]
    tokens, segments = (np.zeros((len(rows), CUT), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(CUT), tokens.shape)
    batch = Tokens(*map(jnp.asarray, (tokens, segments > 0, positions, segments)))
    sums = objectives.supervised(model)({"params": params}, batch, None)
    assert int(sums.weight) == recorded["tokens"]
    assert round(float(sums.loss) / recorded["tokens"], 4) == recorded["nats_per_token"]
    letters = sum(len(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
    assert round(float(sums.loss) / letters, 4) == recorded["nats_per_char"]
