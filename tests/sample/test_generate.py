from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import sample
from jaxsft.models import DecoderConfig, EncoderConfig, build, logits
from jaxsft.sample import answers

CONFIG = DecoderConfig(23, 16, 24, 2, heads=2, kv_heads=1, head_dim=8, max_position=64)
MODEL = build(CONFIG)
PROMPTS = [[5], [7, 3, 9, 9, 1], [4, 2, 0, 6, 8, 10, 12, 14, 16, 18, 20, 22]]
NEW, LENGTH = 9, 24
SHARES = np.array([0.04, 0.3, 0.16, 0.22, 0.08, 0.2])


@pytest.fixture(scope="module")
def variables():
    """Random weights, large enough that greedy answers vary."""
    leaves, form = jax.tree.flatten(jax.eval_shape(MODEL.init, jax.random.key(0)))
    draw = np.random.default_rng(3)
    return {"params": jax.tree.unflatten(form, [jnp.asarray(draw.normal(size=x.shape), jnp.float32) for x in leaves])}


@pytest.fixture(scope="module")
def greedy(variables):
    """The likeliest tokens by one full forward pass a token, each prompt alone."""
    forward = jax.jit(lambda tokens: logits(MODEL, variables, MODEL.features(variables, tokens)))
    answers = []
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(NEW):
            padded = np.array([row + [0] * (LENGTH - len(row))])
            row.append(int(np.argmax(forward(padded)[0, len(row) - 1])))
        answers.append(row[len(prompt) :])
    return answers


def kept(shares, temperature, top_k, top_p):
    """{token: probability} by a plain loop: sharpen, keep the k likeliest, then the fewest that reach top_p."""
    weights = {token: share ** (1 / temperature) for token, share in enumerate(shares)}
    ranked = sorted(weights, key=lambda token: -weights[token])
    ranked = ranked[:top_k] if top_k else ranked
    total, found, reached = sum(weights[token] for token in ranked), {}, 0.0
    for token in ranked:
        if reached >= top_p:
            break
        found[token] = weights[token]
        reached += weights[token] / total
    return {token: weight / sum(found.values()) for token, weight in found.items()}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (99, 1.0), (0, 0.45), (0, 0.95), (4, 0.6)])
def test_tokens_are_drawn_from_the_kept_set_with_its_probabilities(temperature, top_k, top_p):
    rows = 8000
    scores = jnp.tile(jnp.log(jnp.asarray(SHARES)) + 3.0, (rows, 1))
    drawn, _ = sample.pick(scores, jax.random.split(jax.random.key(1), rows), sample.Draw(temperature, top_k, top_p))
    expected = kept(SHARES, temperature, top_k, top_p)
    assert set(np.unique(drawn).tolist()) == set(expected)
    for token, share in expected.items():
        assert np.mean(np.asarray(drawn) == token) == pytest.approx(share, abs=0.03)


def test_a_very_small_top_p_keeps_the_likeliest_token():
    scores = jnp.tile(jnp.log(jnp.asarray(SHARES)) + 3.0, (8000, 1))
    for top_p in (0.0, 1e-6):
        drawn, _ = sample.pick(scores, jax.random.split(jax.random.key(0), 8000), sample.Draw(1.0, top_p=top_p))
        assert set(drawn.tolist()) == {1}


def test_temperature_zero_takes_the_likeliest_of_each_row():
    scores = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert sample.pick(scores, jax.random.split(jax.random.key(0)), sample.Draw(top_k=1, top_p=0.1))[0].tolist() == [
        1,
        0,
    ]


def test_greedy_generation_of_ragged_prompts_equals_a_plain_argmax_loop(variables, greedy):
    assert len({tuple(answer) for answer in greedy}) == len(PROMPTS)
    assert answers(sample.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW)) == greedy


def test_a_batch_answers_as_each_prompt_alone(variables, greedy):
    for prompt, answer in zip(PROMPTS, greedy, strict=True):
        assert answers(sample.generate(MODEL, variables, [prompt], max_new_tokens=NEW)) == [answer]


def test_a_stop_token_ends_its_row_alone_and_is_left_out_even_where_nothing_is_left(variables, greedy):
    stop = (22, greedy[0][0])
    expected = [[*answer] for answer in greedy]
    for row in expected:
        for at, token in enumerate(row):
            if token in stop:
                del row[at:]
                break
    assert expected[0] == []
    assert {0, NEW} < {len(row) for row in expected}  # one is empty, one whole, one cut
    assert answers(sample.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW, stop=stop)) == expected
    assert [list(sample.stream(MODEL, variables, p, max_new_tokens=NEW, stop=stop)) for p in PROMPTS] == expected


@pytest.mark.parametrize("draw", [sample.GREEDY, sample.Draw(0.8, 12, 0.9)])
def test_a_stream_yields_the_tokens_of_generate(variables, draw):
    how = {"max_new_tokens": NEW, "draw": draw, "key": jax.random.key(5)}
    [whole] = answers(sample.generate(MODEL, variables, [PROMPTS[1]], **how))
    assert list(sample.stream(MODEL, variables, PROMPTS[1], **how)) == whole


def test_a_key_decides_the_draws(variables):
    how = {"max_new_tokens": NEW, "draw": sample.Draw(0.8, 12, 0.9)}
    draw = lambda seed: answers(sample.generate(MODEL, variables, [PROMPTS[1]], key=jax.random.key(seed), **how))
    assert draw(0) == draw(0)
    assert len({tuple(draw(seed)[0]) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "every prompt needs at least one token"),
        ([[1], []], {}, "every prompt needs at least one token"),
        ([[1] * 60], {"max_new_tokens": 5}, "a prompt of 60 tokens and 5 new ones exceed the model's 64 positions"),
        ([[1]], {"max_new_tokens": 4, "draw": sample.Draw(1.0)}, "draws at random; give a key, such as jax.random.key"),
    ],
)
def test_wrong_requests_are_refused(variables, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        sample.generate(MODEL, variables, prompts, **options)
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            next(sample.stream(MODEL, variables, prompts[0], **options))


def test_an_asker_answers_all_questions_in_words(variables, greedy):
    class Words:
        def decode(self, ids, skip_special_tokens):
            return f" {ids} " if skip_special_tokens else ""

    ask = sample.asker(MODEL, Words(), PROMPTS, (), sample.Config(max_new_tokens=NEW))
    assert ask(variables) == [str(answer) for answer in greedy]
    assert sample.asker(MODEL, Words(), [], (), sample.Config())(variables) == []


def test_masks_are_filled_with_the_likeliest_token_at_their_place_whatever_row_they_lie_in():
    model = build(EncoderConfig(23, 16, 24, 1, heads=2, max_position=64))
    leaves, form = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    draw = np.random.default_rng(5)
    params = jax.tree.unflatten(form, [jnp.asarray(draw.normal(size=x.shape), jnp.float32) for x in leaves])
    passages, mask = [[1, 3, 9, 3, 2], [1, 7, 8, 3, 10, 11, 12, 2], [1, 5, 2]], 3
    names = SimpleNamespace(decode=lambda ids: f" t{ids[0]}")
    found = sample.filler(model, names, passages, mask)({"params": params})
    expected = []
    alone = jax.jit(lambda row: logits(model, {"params": params}, model.features({"params": params}, row)))
    for passage in passages[:2]:
        best = np.argmax(alone(np.array([passage]))[0], axis=-1)
        expected.append(", ".join(f"t{best[i]}" for i, token in enumerate(passage) if token == mask))
    assert found == [*expected, ""]
    assert sample.filler(model, names, [], mask)({"params": params}) == []
