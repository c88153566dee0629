import functools
import itertools
import math
import re
import types
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxsft import lora, models, objectives, quant, sharding, train, tree
from jaxsft.quant import BLOCK, DYNAMIC, GROUP, KINDS, NF4
from jaxsft.types import Tokens

# Dettmers et al. 2023, arXiv:2305.14314, appendix E; the same numbers in bitsandbytes, functional.py, get_4bit_type.
PUBLISHED = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
    -0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0
    0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
# A whole number of blocks; a short last one; inputs that do not pair off; more blocks than a group; layers; experts.
SHAPES = [(128, 3), (2, 130, 5), (33, 2), (1, 7), (192, 100), (2, 3, 64, 4)]
both = pytest.mark.parametrize("kind", KINDS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def kernel(shape, outlier=50.0):
    """Weights with heavy tails, a zero column, and one that is larger than the others."""
    w = 0.02 * np.random.default_rng(0).standard_t(4, shape).astype(np.float32)
    w[..., 0] = 0
    w[..., -1] *= outlier
    return w


pack = jax.jit(quant.pack, static_argnums=1)
unpack = jax.jit(quant.unpack, static_argnums=1)


# ---- the codes -------------------------------------------------------------------------------------------------------


def test_the_levels_of_nf4_are_the_published_ones():
    np.testing.assert_array_equal(NF4, np.array(PUBLISHED.split(), np.float32), strict=True)


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """Eq. 4 with the paper's offset: eight quantiles above 0 and seven below, 0 itself, scaled to end at 1."""
    at, end = NormalDist().inv_cdf, 0.9677083
    above, below = ([at(p) for p in np.linspace(end, 0.5, n + 1)[:-1]] for n in (8, 7))
    np.testing.assert_allclose(NF4, np.sort([*above, 0, *(-x for x in below)]) / max(above), atol=2e-7)


def test_the_levels_of_absmaxes_are_evenly_spaced_within_a_decade():
    """Twice as many in each decade nearer to 1; mirrored, but for the 1 at the end."""
    assert (len(DYNAMIC), DYNAMIC[127], DYNAMIC[255]) == (256, 0, 1)
    np.testing.assert_array_equal(DYNAMIC[128:255], -DYNAMIC[:127][::-1])
    above = DYNAMIC[128:255].astype(np.float64)
    for decade in range(7):
        inside = above[(above > 10.0 ** (decade - 7)) & (above < 10.0 ** (decade - 6))]
        step = 0.9 * 10.0 ** (decade - 6) / 2**decade
        assert len(inside) == 2**decade
        np.testing.assert_allclose(inside, 10.0 ** (decade - 7) + step * (np.arange(2**decade) + 0.5), rtol=1e-6)


def nearest(levels, x):
    return int(np.argmin([abs(float(level) - float(x)) for level in levels]))


def nf4_by_hand(w):
    """One [in, out] kernel, a number at a time: codes [in, out], absmax codes [blocks, out], the kernel again."""
    n_in, n_out = w.shape
    blocks = [(o, rows) for o in range(n_out) for rows in np.split(np.arange(n_in), range(BLOCK, n_in, BLOCK))]
    absmax = [max(abs(w[rows, o])) for o, rows in blocks]
    mean = np.mean(absmax)
    again, rebuilt = [], []
    for group in np.split(np.array(absmax), range(GROUP, len(absmax), GROUP)):
        scale = max(abs(group - mean)) or 1.0
        own = [nearest(DYNAMIC, (x - mean) / scale) for x in group]
        again += own
        rebuilt += [max(0.0, mean + scale * DYNAMIC[code]) for code in own]
    codes, out = np.zeros(w.shape, int), np.zeros(w.shape)
    for (o, rows), largest, stored in zip(blocks, absmax, rebuilt, strict=True):
        for i in rows:
            codes[i, o] = nearest(NF4, w[i, o] / largest if largest else 0.0)
            out[i, o] = NF4[codes[i, o]] * stored
    return codes, np.array(again).reshape(n_out, -1).T, out


def int8_by_hand(w):
    codes, out = np.zeros(w.shape, int), np.zeros(w.shape)
    for o in range(w.shape[1]):
        scale = max(abs(w[:, o])) / 127
        for i in range(w.shape[0]):
            codes[i, o] = round(float(w[i, o] / scale)) if scale else 0
            out[i, o] = codes[i, o] * scale
    return codes, out


def each(x, axes=2):
    """The kernels of a stack of any depth."""
    return x.reshape(-1, *x.shape[x.ndim - axes :])


@shapes
def test_nf4_agrees_with_a_loop_over_numbers_blocks_and_groups(shape):
    w = kernel(shape)
    packed = pack(w, "nf4")
    codes = np.asarray(packed["codes"])
    if shape[-2] % 2 == 0:  # two to a byte, the first in the upper half
        assert (codes.dtype, codes.shape) == (np.uint8, (*shape[:-2], shape[-2] // 2, shape[-1]))
        codes = np.stack([codes // 16, codes % 16], -2).reshape(shape)
    wanted = [nf4_by_hand(one) for one in each(w)]
    for got, absmax, again, (by_hand, absmax_by_hand, rebuilt) in zip(
        each(codes), each(np.asarray(packed["absmax"])), each(unpack(packed)), wanted, strict=True
    ):
        np.testing.assert_array_equal(got, by_hand)
        np.testing.assert_array_equal(absmax, absmax_by_hand)
        np.testing.assert_allclose(again, rebuilt, rtol=1e-5, atol=1e-9)


@shapes
def test_int8_agrees_with_a_loop_and_errs_by_half_a_step_at_most(shape):
    w = kernel(shape)
    packed = pack(w, "int8")
    assert packed["codes"].dtype == np.int8
    again = unpack(packed)
    for got, rebuilt, one in zip(each(packed["codes"]), each(again), each(w), strict=True):
        codes, by_hand = int8_by_hand(one)
        np.testing.assert_array_equal(got, codes)
        np.testing.assert_allclose(rebuilt, by_hand, rtol=1e-6)
    step = np.broadcast_to(np.asarray(packed["scale"])[..., None, :], shape)
    assert np.all(np.abs(again - w) <= 0.5001 * step)


@both
@shapes
def test_packing_what_was_unpacked_changes_no_code(kind, shape):
    packed = pack(kernel(shape, outlier=2.0), kind)
    np.testing.assert_array_equal(packed["codes"], pack(unpack(packed), kind)["codes"])


def test_an_outlier_neither_flattens_nor_turns_the_blocks_of_its_group():
    """Even steps would be 0.8 of the others' absmax here, and the smallest come out below 0."""
    w = np.random.default_rng(0).normal(size=(64, GROUP)).astype(np.float32)
    w[:, 3] /= 100
    w[5, 7] = 100 * np.abs(w).max()
    again = np.asarray(unpack(pack(w, "nf4")))
    kept = np.abs(again).max(0) / np.abs(w).max(0)
    assert np.abs(np.delete(kept, 3) - 1).max() < 0.2
    assert np.all(again * w >= 0)


@both
def test_nothing_is_the_same_as_zero_and_what_is_not_finite_shows_in_the_scales(kind):
    w = np.zeros((128, 3), np.float32)
    assert not np.any(unpack(pack(w, kind)))
    for bad in (np.nan, np.inf):
        w[2, 1] = bad
        assert not all(np.isfinite(x).all() for x in pack(w, kind).values())


@both
def test_kernels_of_any_dtype_are_packed_in_float32_and_unpacked_in_the_dtype_asked_for(kind):
    w = jnp.asarray(kernel((128, 3)), jnp.bfloat16)
    packed = pack(w, kind)
    for name, leaf in pack(np.asarray(w, np.float32), kind).items():
        np.testing.assert_array_equal(packed[name], leaf, strict=True)
    np.testing.assert_array_equal(unpack(packed, jnp.bfloat16), unpack(packed).astype(jnp.bfloat16), strict=True)


def test_four_and_an_eighth_bits_a_weight_are_kept_and_eight():
    made = lambda kind: jax.eval_shape(lambda: quant.pack(jnp.zeros((4096, 4096)), kind)).values()
    size = lambda kind: sum(x.size * x.dtype.itemsize for x in made(kind))
    assert 8 * size("nf4") / 4096**2 == pytest.approx(4 + 8 / BLOCK + 32 / (BLOCK * GROUP), abs=1e-4)
    assert 8 * size("int8") / 4096**2 == pytest.approx(8 + 32 / 4096)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="model.quantise 'int4' is not known; known are none, int8, nf4"):
        quant.pack(jnp.ones((2, 2)), "int4")


@both
@shapes
def test_the_shapes_of_kernels_are_read_from_what_is_packed(kind, shape):
    packed = {"blocks": {"0-1": {"q": jax.eval_shape(lambda: quant.pack(jnp.zeros(shape), kind))}}}
    assert {p: x.shape for p, x in tree.flat(quant.kernels(packed)).items()} == {"blocks/0-1/q/kernel": shape}


def test_sharding_rules_of_packed_kernels_follow_those_of_the_kernels():
    found = quant.rules((("x/(q|k)/kernel", P(None, "fsdp", "tensor")), ("x/q/bias", P(None, "tensor"))))
    assert found == (
        ("x/(q|k)/(codes|absmax)", P(None, "fsdp", "tensor")),
        ("x/(q|k)/scale", P(None, "tensor")),
        ("x/(q|k)/absmax_scale", P(None, None)),
        ("x/(q|k)/absmax_mean", P(None)),
    )


# ---- in a model ------------------------------------------------------------------------------------------------------

CONFIG = models.DecoderConfig(
    vocab_size=64, hidden=32, mlp_hidden=96, layers=2, heads=4, kv_heads=2, head_dim=8, max_position=64, tied=True
)
RULES = models.FAMILIES["llama"].rules
ROWS, LENGTH = 8, 20


@functools.partial(jax.jit, static_argnums=1)
def pack_all(params, kind):
    """{"params", "packed"} of some parameters."""
    rest, packed = {}, {}
    for path, leaf in tree.flat(params).items():
        if path.endswith("/kernel"):
            layer = path.removesuffix("/kernel")
            packed |= {f"{layer}/{name}": x for name, x in quant.pack(leaf, kind).items()}
        else:
            rest[path] = leaf
    return {"params": tree.nest(rest), "packed": tree.nest(packed)}


@jax.jit
def dequantised(variables):
    """The parameters that some variables stand for."""
    leaves = {}
    for layer in [path.removesuffix("/kernel") for path in tree.flat(quant.kernels(variables["packed"]))]:
        own = {p.removeprefix(f"{layer}/"): x for p, x in tree.flat(variables["packed"]).items() if p.startswith(layer)}
        leaves[f"{layer}/kernel"] = quant.unpack(own)
    return tree.combine(variables["params"], tree.nest(leaves))


def drawn(shapes, size):
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: (size * draw.normal(size=x.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return drawn(jax.eval_shape(models.build(CONFIG).init, jax.random.key(0)), 0.2)


@pytest.fixture(scope="module")
def adapter(params):
    spec = lora.LoRA(rank=2, alpha=2.0)
    shapes = jax.eval_shape(lambda key: lora.init(key, params, spec), jax.random.key(0))
    return drawn(shapes, 0.2)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(3).integers(0, 64, (ROWS, LENGTH), dtype=np.int32)
    ones = np.ones_like(tokens)
    return Tokens(tokens, tokens % 3 > 0, np.arange(LENGTH, dtype=np.int32) * ones, ones)


@pytest.fixture(scope="module")
def descend(adapter, batch):
    """descend(base, remat, mesh) -> (loss, gradients, program) of a step at rate 1 on the adapter, compiled once."""
    compiled = {}

    def step(base, remat="none", lengths=(1, 1, 1)):
        mesh = sharding.mesh(*lengths, devices=jax.devices()[: math.prod(lengths)])
        variables = base | {"lora": adapter}
        rules = {"params": RULES, "packed": quant.rules(RULES), "lora": lora.rules(RULES)}
        placed = {name: sharding.shardings(part, rules[name], mesh) for name, part in variables.items()}
        trainable, frozen = tree.partition(jax.device_put(variables, placed), lora.TRAINABLE)
        before, tx = jax.tree.map(np.asarray, trainable), optax.sgd(1.0)
        state = train.init(trainable, tx, jax.random.key(0), mesh)
        [rows] = train.place([types.SimpleNamespace(tokens=batch, count=1, position={})], mesh)
        key = (remat, lengths, str(jax.tree.structure(base)))
        if key not in compiled:
            objective = objectives.supervised(models.build(CONFIG, remat=remat))
            made = train.make_step(objective, tx, shardings=sharding.of(state))
            compiled[key] = made.lower(state, frozen, rows.batch).compile()
        state, metrics = compiled[key](state, frozen, rows.batch)
        grads = jax.tree.map(lambda b, a: b.astype(np.float64) - np.asarray(a), before, state.trainable)
        return float(metrics["loss"]), tree.flat(grads), compiled[key].as_text()

    return step


# Stacked kernels in full precision: nothing else here has these shapes.
STACKED = re.compile(r"f32\[2,(32,96|96,32|32,32|32,16)\]")
ONE, MESH = (1, 1, 1), (2, 2, 2)


@pytest.mark.parametrize(
    ("kind", "remat", "mesh"),
    [  # the rest of the product is in the parity suite
        ("nf4", "block", MESH),
        ("int8", "none", ONE),
        *(
            pytest.param(*case, marks=pytest.mark.parity)
            for case in itertools.product(KINDS, ("none", "dots", "block"), (ONE, MESH))
            if case not in (("nf4", "block", MESH), ("int8", "none", ONE))
        ),
    ],
    ids=str,
)
def test_lora_over_packed_kernels_learns_as_over_the_dequantised_ones(kind, remat, mesh, descend, params):
    packed = pack_all(params, kind)
    loss, grads, program = descend(packed, remat, mesh)
    wanted, wanted_grads, plain = descend({"params": dequantised(packed)})
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert grads.keys() == wanted_grads.keys()
    for path, grad in wanted_grads.items():
        np.testing.assert_allclose(grads[path], grad, atol=1e-6, err_msg=path)
        assert np.any(grad), path
    assert STACKED.search(plain)
    assert not STACKED.search(program)


def gradient(variables, batch, remat):
    """The gradient of the loss with respect to the adapter, as it is traced."""
    loss = objectives.supervised(models.build(CONFIG, remat=remat))
    frozen = {name: part for name, part in variables.items() if name != "lora"}
    return str(jax.make_jaxpr(jax.grad(lambda low: loss(frozen | {"lora": low}, batch, None).loss))(variables["lora"]))


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@both
def test_no_kernel_is_kept_in_full_precision_for_the_backward_pass(kind, remat, params, adapter, batch):
    assert not STACKED.search(gradient(pack_all(params, kind) | {"lora": adapter}, batch, remat))


def test_a_product_that_keeps_its_kernel_would_be_seen(params, adapter, batch, monkeypatch):
    monkeypatch.setattr(quant, "product", lambda x, packed: x @ quant.unpack(packed, x.dtype))
    assert STACKED.search(gradient(pack_all(params, "nf4") | {"lora": adapter}, batch, "none"))


@both
def test_every_packed_leaf_is_read_at_its_address(kind, params, batch):
    packed, model = pack_all(params, kind), models.build(CONFIG)
    run = jax.jit(lambda variables: model.features(variables, batch.tokens))
    before = run(packed)
    for path, leaf in tree.flat(packed["packed"]).items():
        other = tree.flat(packed) | {f"packed/{path}": leaf + 1}
        assert np.any(run(tree.nest(other)) != before), path


def test_a_layer_that_has_neither_a_kernel_nor_a_packed_one_is_refused(params, batch):
    variables = pack_all(params, "int8")
    del variables["packed"]["blocks"]["0-1"]["mlp"]["up"]
    with pytest.raises(Exception, match=r'"kernel".*mlp/up'):
        models.build(CONFIG).features(variables, batch.tokens)


def test_packed_stacks_are_cut_as_parameters_are(params, batch):
    whole, model = pack_all(params, "nf4"), models.build(CONFIG)
    cut = {name: models.split(part, 1) for name, part in whole.items()}
    assert set(cut["packed"]["blocks"]) == {"0-0", "1-1"}
    np.testing.assert_allclose(model.features(cut, batch.tokens), model.features(whole, batch.tokens), atol=1e-6)
