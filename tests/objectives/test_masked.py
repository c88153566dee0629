import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import objectives, sharding, tree
from jaxsft.models import FAMILIES, DecoderConfig, EncoderConfig, Model, build
from jaxsft.types import Tokens

V, MASK = 40, 3
ORDINARY = np.arange(5, V)
CONFIG = EncoderConfig(V, 8, 16, 2, heads=2, max_position=64)
SHARP = 2.0


def echo(**options):
    """Makes (batch, key) -> (sums, tokens that the model read, did they come with a dropout key).

    The model says at each place what it reads there.
    """
    read, dropouts = [], []

    def features(variables, tokens, positions, segments, dropout=None):
        jax.debug.callback(lambda x: read.append(np.asarray(x)), tokens)
        dropouts.append(dropout is not None)
        return SHARP * jax.nn.one_hot(tokens, V)

    never = lambda *_: pytest.fail("nobody asks for it")
    objective = masked(
        Model(CONFIG, never, features, never, lambda variables: jnp.eye(V), never, never, never), **options
    )
    compiled = jax.jit(lambda batch, key: objective({}, batch, key))

    def run(batch, key):
        sums = jax.device_get(compiled(batch, key))
        jax.effects_barrier()
        return sums, read[-1], dropouts[-1]

    return run


def batch(rows: int = 8, width: int = 64) -> Tokens:
    """Rows of [CLS] text [SEP] and padding; the mask marks the text."""
    draw = np.random.default_rng(0)
    tokens, mask, positions, segments = np.zeros((4, rows, width), np.int32)
    for i in range(rows):
        n = width - 5 * i
        tokens[i, :n] = [1, *draw.integers(5, V, n - 2), 2]
        tokens[i, n // 2] = 4  # an unknown word is no ordinary token
        mask[i, 1 : n - 1], positions[i, :n], segments[i, :n] = 1, np.arange(n), 1
    return Tokens(*map(jnp.asarray, (tokens, mask > 0, positions, segments)))


masked = functools.partial(objectives.masked, mask_id=MASK, ordinary=ORDINARY)


@pytest.mark.parametrize("key", [None, jax.random.key(7)], ids=["evaluation", "training"])
def test_each_hidden_token_is_predicted_where_it_stands(key):
    tokens = batch()
    sums, given, with_dropout = echo(rate=0.4)(tokens, key)
    assert with_dropout == (key is not None)
    original, text = np.asarray(tokens.tokens), np.asarray(tokens.mask) & (np.asarray(tokens.tokens) != 4)
    changed = given != original
    assert not (changed & ~text).any()
    count = int(sums.weight)
    assert changed.sum() < count < text.sum()  # some of them stay as they are
    assert abs(count - 0.4 * text.sum()) < 5 * np.sqrt(text.sum() * 0.4 * 0.6)
    right = SHARP - np.log(np.exp(SHARP) + V - 1)  # what stayed is read off, what was hidden is one of many
    expected = -(count - changed.sum()) * right - changed.sum() * (right - SHARP)
    np.testing.assert_allclose(float(sums.loss), expected, rtol=1e-5)


def test_evaluation_masks_a_row_alike_in_every_batch_and_training_anew_each_step():
    tokens = batch()
    run = echo()
    whole, given, _ = run(tokens, None)
    halves = [run(jax.tree.map(lambda x, i=i: x[i::2], tokens), None) for i in range(2)]
    np.testing.assert_allclose(sum(sums.loss for sums, *_ in halves), whole.loss, rtol=1e-5)
    assert sum(sums.weight for sums, *_ in halves) == whole.weight
    for i in range(2):
        np.testing.assert_array_equal(halves[i][1], given[i::2])
    patterns = {row.nonzero()[0].tobytes() for row in given != np.asarray(tokens.tokens)}
    assert len(patterns) == 8  # rows are not all masked in the same places
    first, again, other = (run(tokens, jax.random.key(seed))[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()


def test_whole_words_are_hidden_together():
    tokens, continues = batch(), np.arange(V) >= 20
    _, given, _ = echo(rate=0.5, continues=continues)(tokens, jax.random.key(0))
    original = np.asarray(tokens.tokens)
    hidden = given == MASK
    inner = continues[original[:, 1:]] & (original[:, :-1] >= 5)  # goes on with the token before it
    agree = (hidden[:, 1:] == hidden[:, :-1])[inner].mean()
    assert agree > 0.75  # 0.8^2 + 0.2^2 of the chosen words, all of the others; tokens alone would be at a half


def test_a_batch_without_a_chosen_token_weighs_nothing_and_has_a_gradient_of_zero():
    model = build(dataclasses.replace(CONFIG, layers=1))
    params = jax.jit(model.init)(jax.random.key(0))
    empty = jax.tree.map(jnp.zeros_like, batch(2, 16))

    def total(params):
        sums = masked(model)({"params": params}, empty, jax.random.key(0))
        return sums.loss, sums.weight

    (loss, weight), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert (loss, weight) == (0, 0)
    assert all(not np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.parity  # a long one; tests/test_train.py has the same of a decoder, with microbatches
def test_a_mesh_gives_the_loss_and_gradients_of_one_device():
    model, tokens = build(dataclasses.replace(CONFIG, layers=1)), batch()
    params = jax.jit(model.init)(jax.random.key(0))
    total = lambda params, batch: (
        (sums := masked(model)({"params": params}, batch, jax.random.key(0))).loss / sums.weight
    )
    run = jax.jit(jax.value_and_grad(total))
    mesh = sharding.mesh(2, 2, 2)
    there = jax.device_put(params, sharding.shardings(params, FAMILIES["bert"].rules, mesh))
    (loss, grads), (other, others) = run(params, tokens), run(there, jax.device_put(tokens, sharding.rows(mesh)))
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    for path, grad in tree.flat(grads).items():
        np.testing.assert_allclose(tree.flat(others)[path], grad, atol=1e-6, err_msg=path)


def test_what_a_model_cannot_learn_is_refused():
    bare = build(EncoderConfig(V, 8, 16, 2, heads=2, max_position=64, mlm=False))
    with pytest.raises(ValueError, match="this encoder has no head that predicts masked tokens: .*ForMaskedLM"):
        masked(bare)
    decoder = build(DecoderConfig(V, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64))
    with pytest.raises(ValueError, match="train.objective masked is for encoders, and this model is a decoder"):
        masked(decoder)
    with pytest.raises(ValueError, match="an encoder reads the next token before it predicts it"):
        objectives.supervised(build(CONFIG))
    judge = build(dataclasses.replace(decoder.config, labels=1))
    with pytest.raises(
        ValueError, match="scores whole texts: .* no output layer to predict the next token with. Choose"
    ):
        objectives.supervised(judge)
    with pytest.raises(ValueError, match="has a token 40, and the model has 40 tokens; do the two belong"):
        objectives.masked(build(CONFIG), mask_id=V, ordinary=ORDINARY)
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"train.mask_rate is {rate}; it must be above 0 and below 1"):
            masked(build(CONFIG), rate=rate)
