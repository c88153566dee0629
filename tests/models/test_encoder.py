import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import lora, models, tree
from jaxsft.lora import LoRA
from jaxsft.models import EncoderConfig, build, logits, split
from jaxsft.models.layers import MLP, LayerNorm

V, D, T = 31, 16, 12
CONFIG = EncoderConfig(V, D, 24, 3, heads=4, max_position=16, first_position=2, activation="gelu_new")
MODEL = build(CONFIG)


@pytest.fixture(scope="module")
def params():
    """Parameters that are random everywhere, so that no term of the model is hidden by a zero or a one."""
    leaves, form = jax.tree.flatten(jax.eval_shape(MODEL.init, jax.random.key(0)))
    draw = np.random.default_rng(0)
    return jax.tree.unflatten(form, [jnp.asarray(0.4 * draw.normal(size=x.shape), jnp.float32) for x in leaves])


@pytest.fixture(scope="module")
def features():
    """MODEL.features, compiled once for each form of tree."""
    return jax.jit(MODEL.features)


def test_no_two_answers_share_a_prompt(params):
    assert not models.shares_prompts(CONFIG)
    tokens = np.arange(T)[None]
    with pytest.raises(ValueError, match="an encoder sees both sides, .* load the pairs with share_prompt=False"):
        MODEL.features({"params": params}, tokens, reads=tokens)


def norm(x, part):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * part["scale"] + part["bias"]


def gelu(x, exact):
    if exact:
        return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def scores(params, tokens):
    """The scores of one document, layer by layer in float64, as the paper has them."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    line = lambda x, part: x @ part["kernel"] + part["bias"]
    table = p["embed"]["table"]
    x = table[tokens] + p["embed"]["positions"][2 : 2 + len(tokens)] + p["embed"]["types"][0]
    x = norm(x, p["embed"]["norm"])
    for layer in range(3):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"]["0-2"])
        q, k, v = (line(x, own["attn"][name]).reshape(-1, 4, 4).swapaxes(0, 1) for name in "qkv")
        weights = np.exp(q @ k.swapaxes(1, 2) / 2)
        seen = (weights / weights.sum(-1, keepdims=True)) @ v
        x = norm(x + line(seen.swapaxes(0, 1).reshape(-1, D), own["attn"]["o"]), own["attn_norm"])
        x = norm(x + line(gelu(line(x, own["mlp"]["up"]), exact=False), own["mlp"]["down"]), own["mlp_norm"])
    hidden = norm(gelu(line(x, p["mlm"]["dense"]), exact=True), p["mlm"]["norm"])
    return x, hidden @ table.T + p["mlm"]["bias"]


def row(*documents):
    """One row of T tokens: (tokens, positions, segments), the rest padding."""
    tokens, positions, segments = np.zeros((3, 1, T), np.int32)
    start = 0
    for number, document in enumerate(documents, 1):
        here = slice(start, start + len(document))
        tokens[0, here], positions[0, here], segments[0, here] = document, range(len(document)), number
        start = here.stop
    return tokens, positions, segments


A, B, C = [5, 6, 7, 8], [9, 3], [1, 2, 30, 4, 5]


def test_scores_are_those_of_a_plain_float64_loop(params, features):
    hidden, expected = scores(params, A)
    found = logits(MODEL, {"params": params}, features({"params": params}, *row(A)))[0, :4]
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-4)
    bare = build(dataclasses.replace(CONFIG, mlm=False))
    np.testing.assert_allclose(bare.features({"params": params}, *row(A))[0, :4], hidden, atol=2e-5)


def test_packed_documents_read_as_they_do_alone_and_in_any_order(params, features):
    packed, turned = (features({"params": params}, *row(*order))[0] for order in ((A, B, C), (C, A, B)))
    np.testing.assert_allclose(np.concatenate([turned[5:11], turned[:5]]), packed[:11], atol=1e-5)
    for document, start in ((A, 0), (B, 4), (C, 6)):
        alone = features({"params": params}, *row(document))[0]
        np.testing.assert_allclose(packed[start : start + len(document)], alone[: len(document)], atol=1e-5)


def test_positions_and_segments_default_to_one_document_as_long_as_there_are_positions(params, features):
    tokens = np.arange(T)[None]
    plain = jax.jit(MODEL.features)({"params": params}, tokens)
    np.testing.assert_allclose(plain, features({"params": params}, *row(range(T))), atol=1e-5)
    with pytest.raises(ValueError, match="17 tokens exceed the model's 16 positions"):
        MODEL.features({"params": params}, np.zeros((1, 17), np.int32))


def test_a_position_that_the_table_lacks_is_nan_and_not_another_one(params, features):
    tokens, positions, segments = row(A, B)
    assert np.isfinite(features({"params": params}, tokens, positions + 12, segments)).all()
    beyond = features({"params": params}, tokens, np.where(segments == 2, positions + 16, positions), segments)[0]
    assert np.isnan(beyond[4:6, :D]).all()


def test_a_split_stack_gives_the_same_features(params, features):
    cut = split(params, 1)
    assert list(cut["blocks"]) == ["0-0", "1-2"]
    found = (features({"params": one}, *row(A, B, C)) for one in (params, cut))
    np.testing.assert_allclose(*found, atol=2e-6)


def test_remat_policies_give_equal_gradients(params):
    found, small = {}, dataclasses.replace(CONFIG, layers=1, mlm=False)
    params = split(params, 1) | {"blocks": {"0-0": split(params, 1)["blocks"]["0-0"]}}
    for policy in ("none", "dots", "offload"):
        model = build(small, remat=policy)
        loss = lambda p, model=model: jnp.sum(model.features({"params": p}, *row(A, B, C)) ** 2)
        found[policy] = jax.jit(jax.grad(loss))(params)
    for policy in ("dots", "offload"):
        for ours, base in zip(*(jax.tree.leaves(found[name]) for name in (policy, "none")), strict=True):
            np.testing.assert_allclose(ours, base, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="remat policy 'all' is not known; known are none, dots, block, offload"):
        build(CONFIG, remat="all")


def test_an_adapter_on_layers_and_head_answers_as_the_merged_model_and_drops_out(params, features):
    spec = LoRA(rank=2, targets=".*/(q|down|dense)")
    adapter = jax.tree.map(lambda x: x + 0.2, lora.init(jax.random.key(0), params, spec))
    variables = {"params": params, "lora": adapter}
    both = features(variables, *row(A, B, C))
    merged = features({"params": lora.merge(variables)}, *row(A, B, C))
    np.testing.assert_allclose(both, merged, atol=1e-4)
    alone = tree.partition(adapter, "mlm/.*")[0]
    assert (
        np.abs(features({"params": params, "lora": alone}, *row(A)) - features({"params": params}, *row(A))).max() > 0.1
    )
    noisy = jax.jit(lambda key: build(CONFIG, lora_dropout=0.5).features(variables, *row(A, B, C), dropout=key))
    first, again, other = (noisy(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_the_computation_has_the_dtype_it_is_told(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    model = build(CONFIG, dtype=jnp.bfloat16)
    out = model.features({"params": half}, *row(A))
    assert out.dtype == model.output({"params": half}).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits(model, {"params": half}, out)[0, :4], scores(params, A)[1], atol=0.4)


def test_an_encoder_without_a_head_has_no_scores():
    bare = build(dataclasses.replace(CONFIG, mlm=False))
    assert set(jax.eval_shape(bare.init, jax.random.key(0))) == {"embed", "blocks"}
    with pytest.raises(ValueError, match="no head that predicts masked tokens, so there are no scores; choose"):
        bare.output({"params": {}})


def test_a_config_that_cannot_be_is_refused():
    for change, message in (
        ({"activation": "swish2"}, "activation 'swish2' is not known"),
        ({"mlm_activation": "swish2"}, "activation 'swish2' is not known"),
        ({"heads": 5}, "5 heads cannot share 16 features; the one must divide the other"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
    assert models.build(CONFIG).config == CONFIG


def test_layer_norm_and_the_plain_mlp_are_their_formulas_in_float32():
    draw = np.random.default_rng(0)
    x = draw.normal(3.0, 2.0, (2, 3, 8)).astype(np.float32)
    part = {"scale": draw.normal(size=8), "bias": draw.normal(size=8)}
    run = functools.partial(LayerNorm(1e-12).apply, {"params": part})
    np.testing.assert_allclose(run(x), norm(x, part), atol=1e-5)
    half = run(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), norm(x, part), rtol=0.02, atol=0.05)
    layer = MLP(5, "gelu", True, 0.0, jax.nn.initializers.normal(1.0))
    weights = layer.init(jax.random.key(0), x)
    up, down = (jax.tree.map(np.asarray, weights["params"][name]) for name in ("up", "down"))
    expected = gelu(x @ up["kernel"] + up["bias"], exact=True) @ down["kernel"] + down["bias"]
    np.testing.assert_allclose(layer.apply(weights, x), expected, atol=1e-5)
