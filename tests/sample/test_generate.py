from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats

from jaxsft import lora, models, quant, sample, sharding, tree
from jaxsft.models import DecoderConfig, build
from jaxsft.models.rope import Rope
from jaxsft.sample import LENGTH, STOP_STRING, STOP_TOKEN, Draw, answers, loop, stops

from .conftest import MODEL, NEW, PROMPTS, drawn, forward_of, likeliest

DRAW, KEY = Draw(0.9, 12, 0.95, 0.01), jax.random.key(5)
MANY = [*PROMPTS, [3, 1, 4], [15, 9, 2, 6], [5, 3], [11] * 8]


def test_greedy_generation_of_ragged_prompts_equals_a_plain_argmax_loop(variables, greedy):
    assert len({tuple(answer) for answer in greedy}) == len(PROMPTS)
    assert answers(sample.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW)) == greedy


@pytest.fixture(scope="module")
def together(variables):
    """Three answers to each of seven prompts, all at once."""
    return sample.generate(MODEL, variables, MANY, max_new_tokens=NEW, draw=DRAW, key=KEY, samples=3, stop=[22])


@pytest.mark.parametrize("slots", [1, 4, 100])
def test_an_answer_does_not_depend_on_slots_nor_on_who_had_them_before(variables, together, slots):
    how = {"max_new_tokens": NEW, "draw": DRAW, "key": KEY, "samples": 3, "stop": [22], "slots": slots}
    found = sample.generate(MODEL, variables, MANY, **how)
    np.testing.assert_array_equal(found.tokens, together.tokens)
    np.testing.assert_array_equal(found.finish, together.finish)
    np.testing.assert_allclose(found.logprobs, together.logprobs, atol=1e-4)
    assert len({tuple(row) for row in found.tokens}) > len(MANY)  # those to one prompt differ


def test_an_answer_does_not_depend_on_the_other_prompts_nor_on_their_lengths(variables, together):
    for number in (1, 3):
        how = {"max_new_tokens": NEW, "draw": DRAW, "key": KEY, "samples": 3, "stop": [22]}
        own = slice(3 * number, 3 * number + 3)
        seeds = range(own.start, own.stop)
        alone = sample.generate(MODEL, variables, [MANY[number]], **how, seeds=seeds)
        np.testing.assert_array_equal(alone.tokens, together.tokens[own])
        longer = sample.generate(MODEL, variables, [MANY[number], [1] * 30], **how, seeds=[*seeds, 90, 91, 92])
        np.testing.assert_array_equal(longer.tokens[:3], together.tokens[own])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_forward_pass_at_the_temperature(variables, forward, temperature):
    draw = Draw(temperature, top_k=9, repetition_penalty=1.2)
    found = sample.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW, draw=draw, key=KEY, samples=2)
    for row, (tokens, logprobs) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        whole = [*PROMPTS[row // 2], *tokens.tolist()]
        scores = forward(whole)[-NEW - 1 : -1] / temperature
        expected = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(logprobs, expected[np.arange(NEW), tokens], atol=1e-4)


def test_a_first_token_is_as_frequent_as_the_model_says(variables, forward):
    count, draw = 4000, Draw(2.0, min_p=0.02)
    found = sample.generate(MODEL, variables, [[7, 3]], max_new_tokens=1, draw=draw, key=KEY, samples=count)
    shares = np.exp(forward([7, 3])[-1] / 2.0)
    shares = np.where(shares >= 0.02 * shares.max(), shares, 0)
    often = np.flatnonzero(shares)
    assert len(often) > 3
    seen = np.bincount(found.tokens[:, 0], minlength=23)
    assert seen[often].sum() == count
    assert stats.chisquare(seen[often], count * shares[often] / shares.sum()).pvalue > 1e-3


def test_a_stop_token_ends_its_row_alone_and_counts_as_drawn(variables, greedy):
    stop = (22, greedy[0][0])
    ends = [next((at + 1 for at, token in enumerate(row) if token in stop), None) for row in greedy]
    assert ends[0] == 1
    assert None in ends[1:]
    assert len(set(ends)) == 3  # one ends at once, one later, one never
    found = sample.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW, stop=stop)
    assert found.lengths.tolist() == [end or NEW for end in ends]
    assert found.finish.tolist() == [LENGTH if end is None else STOP_TOKEN for end in ends]
    for row, end, tokens, logprobs in zip(greedy, ends, found.tokens, found.logprobs, strict=True):
        assert tokens.tolist() == row[:end] + [0] * (NEW - (end or NEW))
        assert (logprobs[: end or NEW] < 0).all()
        assert (logprobs[end or NEW :] == 0).all()
    assert answers(found) == [row[: end - 1] if end else row for row, end in zip(greedy, ends, strict=True)]


def test_a_string_ends_an_answer_inside_of_a_token_as_a_search_in_the_text_says(variables, greedy):
    """Token i of the small model is written "ab" of the letter and its number in three digits: c002, d003."""
    pieces = [f"{chr(97 + i)}{i:03}".encode() for i in range(23)]
    text = ["".join(pieces[token].decode() for token in row) for row in greedy]
    string = text[1][4 * 2 + 3 : 4 * 4 + 1]  # from inside of its third token into the fifth one
    strings = stops.Strings((string,), stops.over_tokens(stops.automaton([string.encode()]), pieces))
    found = sample.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW, strings=strings)
    for words, size, finish in zip(text, found.lengths, found.finish, strict=True):
        at = words.find(string)
        assert size == (NEW if at < 0 else -(-(at + len(string)) // 4))
        assert finish == (LENGTH if at < 0 else STOP_STRING)
    assert found.finish.tolist().count(STOP_STRING) >= 1
    assert answers(found) == [row[:size] for row, size in zip(greedy, found.lengths, strict=True)]
    words = SimpleNamespace(decode=lambda ids, **_: b"".join(pieces[token] for token in ids).decode())
    assert sample.texts(found, words, [string])[1] == text[1][: text[1].find(string)]


def test_repeated_tokens_are_penalised_in_prompt_and_answer_also_in_a_slot_that_another_had(variables, forward):
    draw = Draw(repetition_penalty=1.8)
    found = sample.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW, draw=draw, slots=1)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        row = list(prompt)
        for _ in range(NEW):
            scores = forward(row)[-1]
            for token in set(row):
                scores[token] *= 1.8 if scores[token] < 0 else 1 / 1.8
            row.append(int(np.argmax(scores)))
        assert tokens.tolist() == row[len(prompt) :]


def test_free_slots_are_filled_at_once_and_a_prompt_is_read_once_for_all_its_answers(variables):
    """A plain loop over slots says how many steps it takes."""
    calls = {"extend": 0, "read": 0}

    def counted(name):
        def call(*args):
            jax.debug.callback(lambda: calls.__setitem__(name, calls[name] + 1))
            return getattr(MODEL, name)(*args)

        return call

    model = MODEL._replace(extend=counted("extend"), read=counted("read"))
    how = {"max_new_tokens": NEW, "draw": Draw(1.5), "key": KEY, "samples": 2, "stop": range(0, 23, 3), "slots": 3}
    found = sample.generate(model, variables, MANY, **how)
    jax.effects_barrier()
    left, busy, steps = found.lengths.tolist(), [], 0
    assert {1, NEW} & set(left)
    while left or busy:
        busy += [left.pop(0) for _ in range(min(3 - len(busy), len(left)))]
        busy, steps = [size - 1 for size in busy if size > 1], steps + 1
    assert calls["extend"] == steps < sum(found.lengths)
    assert calls["read"] == -(-len(MANY) // 2)  # two prompts at a time fill three slots


def test_seeds_say_by_which_number_an_answer_is_drawn(variables, together):
    how = {"max_new_tokens": NEW, "draw": DRAW, "key": KEY, "stop": [22]}
    found = sample.generate(MODEL, variables, [MANY[2], MANY[2], MANY[0]], **how, seeds=[7, 7, 1])
    for row, number in enumerate((7, 7, 1)):
        np.testing.assert_array_equal(found.tokens[row], together.tokens[number])
    with pytest.raises(ValueError, match=r"there are 2 answers and seeds of shape \(3,\); give one for each answer"):
        sample.generate(MODEL, variables, MANY[:2], **how, seeds=[1, 2, 3])


def test_other_weights_and_other_prompts_of_one_width_need_no_new_program(variables):
    how = {"max_new_tokens": NEW, "draw": DRAW, "key": KEY, "samples": 3, "stop": [22]}
    first = sample.generate(MODEL, variables, MANY, **how)
    known = loop.run._cache_size()
    other = [[token % 5 for token in prompt[::-1]] + [2] * (number % 3) for number, prompt in enumerate(MANY)]
    found = sample.generate(MODEL, drawn(MODEL, seed=8), other, **how)
    assert loop.run._cache_size() == known
    assert not np.array_equal(first.tokens, found.tokens)


def test_a_mesh_gives_the_tokens_of_one_device():
    config = DecoderConfig(64, 16, 24, 2, heads=4, kv_heads=2, head_dim=8, max_position=64)
    mesh, model = sharding.mesh(2, 2, 2), build(config)
    whole = drawn(model)
    rules = models.FAMILIES["llama"].rules
    placed = {"params": jax.device_put(whole["params"], sharding.shardings(whole["params"], rules, mesh))}
    how = {"max_new_tokens": NEW, "draw": Draw(0.9, top_p=0.9, repetition_penalty=1.1), "key": KEY, "samples": 2}
    one = sample.generate(model, whole, MANY, **how, slots=5)
    many = sample.generate(build(config, mesh=mesh), placed, MANY, **how, slots=5)
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.logprobs, many.logprobs, atol=1e-4)


def test_adapters_over_packed_kernels_answer_as_their_forward_pass_does(variables, greedy):
    leaves, low = tree.flat(variables["params"]), lora.init(jax.random.key(1), variables["params"], lora.LoRA(rank=2))
    kernels = {path: leaves.pop(path) for path in list(leaves) if path.endswith("/kernel")}
    packed = {path[:-7] + f"/{name}": x for path, w in kernels.items() for name, x in quant.pack(w, "int8").items()}
    own = {"params": tree.nest(leaves), "packed": tree.nest(packed), "lora": jax.tree.map(lambda x: x + 0.3, low)}
    expected = [likeliest(forward_of(MODEL, own), prompt) for prompt in PROMPTS]
    assert expected != greedy
    assert answers(sample.generate(MODEL, own, PROMPTS, max_new_tokens=NEW, slots=2)) == expected


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_where_lengths_turn_tokens_a_ragged_batch_answers_as_full_passes_do(kind):
    factors = {"short_factor": (1.0,) * 4, "long_factor": (2.0, 3.0, 4.0, 5.0)}
    config = DecoderConfig(
        23, 16, 24, 1, 2, 1, 8, 64, rope=Rope(kind=kind, factor=4.0, original_max_position=7, **factors)
    )
    model = build(config)
    own = drawn(model)
    expected = [likeliest(forward_of(model, own), prompt) for prompt in PROMPTS]
    assert answers(sample.generate(model, own, PROMPTS, max_new_tokens=NEW)) == expected


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "every prompt needs at least one token"),
        ([[1], []], {}, "every prompt needs at least one token"),
        ([[1] * 60], {"max_new_tokens": 5}, "a prompt of 60 tokens and 5 new ones exceed the model's 64 positions"),
        ([[1], [23]], {}, "a prompt has the token 23, and the model 23 tokens; give it the tokenizer"),
        ([[1]], {"max_new_tokens": 4, "draw": Draw(1.0)}, "draws at random; give a key, such as jax.random.key"),
    ],
)
def test_wrong_requests_are_refused(variables, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        sample.generate(MODEL, variables, prompts, **{"max_new_tokens": 4, **options})
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            next(sample.stream(MODEL, variables, prompts[0], **options))
