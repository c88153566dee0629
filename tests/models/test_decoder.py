import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxsft import lora, tree
from jaxsft.data import Example, pairs_in_memory
from jaxsft.lora import LoRA
from jaxsft.models import DecoderConfig, build, logits, remat, shares_prompts, span, split
from jaxsft.models.layers import Dense
from jaxsft.models.rope import Rope
from jaxsft.types import reads

V, T = 31, 12
CONFIG = DecoderConfig(
    V, 16, 24, 4, heads=4, kv_heads=2, head_dim=4, max_position=64, qkv_bias=True, qk_norm="head",
    windows=(None, 3, None, 3),
)  # fmt: skip
PLAIN = DecoderConfig(V, 16, 24, 2, heads=2, kv_heads=1, head_dim=8, max_position=64, tied=True)  # compiles fast
MODEL = build(CONFIG)
SPEC = LoRA(rank=2, alpha=4.0)


def drawn(model):
    """Parameters that are random everywhere, so that no term of the model is hidden by a zero or a one."""
    leaves, form = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    draw = np.random.default_rng(0)
    return jax.tree.unflatten(form, [jnp.asarray(0.4 * draw.normal(size=x.shape), jnp.float32) for x in leaves])


@pytest.fixture(scope="module")
def params():
    return drawn(MODEL)


@pytest.fixture(scope="module")
def features():
    """MODEL.features, compiled once for each form of tree."""
    return jax.jit(MODEL.features)


@pytest.fixture(scope="module")
def adapter(params):
    """An adapter whose B is not zero."""
    draw = np.random.default_rng(1)
    made = tree.flat(lora.init(jax.random.key(0), params, SPEC))
    return tree.nest(
        {p: jnp.asarray(draw.normal(size=x.shape), jnp.float32) if p.endswith("/b") else x for p, x in made.items()}
    )


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


def test_a_packed_documents_features_equal_those_alone(params, features):
    packed = features({"params": params}, *row(A, B, C))[0]
    for document, start in ((A, 0), (B, 4), (C, 6)):
        alone = features({"params": params}, *row(document))[0]
        np.testing.assert_allclose(packed[start : start + len(document)], alone[: len(document)], atol=1e-5)


def test_permuting_the_documents_of_a_row_changes_nothing(params, features):
    first, other = (features({"params": params}, *row(*order))[0] for order in ((A, B, C), (C, A, B)))
    np.testing.assert_allclose(np.concatenate([other[5:11], other[:5]]), first[:11], atol=1e-5)


def test_what_follows_a_token_does_not_change_it_and_what_precedes_does(params, features):
    first = features({"params": params}, *row(A + C))[0]
    later, earlier = (features({"params": params}, *row(x))[0] for x in ([*A, *C[:-1], 9], [9, *A[1:], *C]))
    np.testing.assert_array_equal(first[:8], later[:8])
    assert float(jnp.abs(first[4] - earlier[4]).max()) > 1e-3


def test_positions_and_segments_default_to_one_document(params, features):
    tokens = np.arange(T)[None]
    np.testing.assert_allclose(
        MODEL.features({"params": params}, tokens), features({"params": params}, *row(range(T))), atol=1e-5
    )


def test_cached_decoding_equals_a_full_forward(params, features):
    tokens, variables = np.stack([np.arange(T), np.arange(T)[::-1]]), {"params": params}
    full = np.concatenate([features(variables, *row(x)) for x in tokens])
    extend, cache, found = jax.jit(MODEL.extend), MODEL.cache(2, T + 3), []
    for start, stop in ((0, 5), *((t, t + 1) for t in range(5, T))):
        positions = np.tile(np.arange(start, stop), (2, 1))
        out, cache = extend(variables, tokens[:, start:stop], positions, cache)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, axis=1), full, atol=1e-5)


def test_rows_of_a_cache_may_stand_at_different_positions(params, features):
    variables, extend = {"params": params}, jax.jit(MODEL.extend)
    tokens = np.stack([np.arange(T), np.arange(T)[::-1]])
    full = np.concatenate([features(variables, *row(x)) for x in tokens])
    _, cache = extend(variables, tokens[:, :5], np.tile(np.arange(5), (2, 1)), MODEL.cache(2, T + 3))
    _, cache = extend(variables, tokens[:, 5:6], np.full((2, 1), 5), cache)
    # the first row goes on at 6, the second writes over what it read at 3
    out, _ = extend(variables, np.array([tokens[0, 6:7], tokens[1, 3:4]]), np.array([[6], [3]]), cache)
    np.testing.assert_allclose(out[:, 0], np.stack([full[0, 6], full[1, 3]]), atol=1e-5)


# ---- pairs: the prompt once, two answers -----------------------------------------------------------------------------

ONE, OTHER = ([5, 6, 7, 8], [9, 3], [1, 2, 30]), ([11, 12], [4], [5, 9])  # prompt, chosen, rejected


def branched(*pairs, share_prompt=True):
    """One row of pairs: (tokens, positions, segments, reads)."""
    document = lambda prompt, answer: Example(np.array(prompt + answer), np.arange(len(prompt + answer)) >= len(prompt))
    made = [(document(prompt, chosen), document(prompt, rejected)) for prompt, chosen, rejected in pairs]
    one = pairs_in_memory(made, 24, [list(range(len(made)))], share_prompt=share_prompt)[0]
    return tuple(array[None] for array in (one.tokens, one.positions, one.segments, reads(one.segments)))


def answers(features, params, *pairs, **how):
    """What each answer's tokens get, from the prompt's last one on: {(pair, side): features}."""
    tokens, positions, segments, read = branched(*pairs, **how)
    found = features({"params": params}, tokens, positions, segments, reads=read)[0]
    last = {i: len(prompt) - 1 for i, (prompt, *_) in enumerate(pairs)}
    here = lambda i, side: (segments[0] == 3 * i + 2 + side) & (positions[0] >= last[i])
    return {(i, side): found[here(i, side)] for i in last for side in (0, 1)}


def test_two_answers_to_one_prompt_get_what_their_documents_get_alone(params, features):
    found = answers(features, params, ONE, OTHER)
    for i, (prompt, *both) in enumerate((ONE, OTHER)):
        for side, answer in enumerate(both):
            alone = features({"params": params}, *row(prompt + answer))[0]
            np.testing.assert_allclose(found[i, side], alone[len(prompt) - 1 :][: len(answer) + 1], atol=1e-5)


def test_a_prompt_that_stands_in_both_documents_gives_the_same(params, features):
    shared, apart = (answers(features, params, ONE, OTHER, share_prompt=share) for share in (True, False))
    for which, found in shared.items():
        np.testing.assert_allclose(found, apart[which], atol=1e-5)


def test_permuting_pairs_changes_nothing(params, features):
    first, other = answers(features, params, ONE, OTHER), answers(features, params, OTHER, ONE)
    for i, side in first:
        np.testing.assert_allclose(first[i, side], other[1 - i, side], atol=1e-5)


def test_an_answer_is_computed_from_its_prompt_and_from_nothing_else_in_the_row(params, features):
    prompt, chosen, rejected = ONE
    found = answers(features, params, ONE, OTHER)
    changed = answers(features, params, (prompt, [10, 10], rejected), OTHER)
    np.testing.assert_array_equal(changed[0, 1], found[0, 1])  # rejected never sees chosen
    changed = answers(features, params, ([4, *prompt[1:]], chosen, rejected), OTHER)
    for side in (0, 1):
        np.testing.assert_array_equal(changed[1, side], found[1, side])  # a later pair never sees an earlier one
        assert float(jnp.abs(changed[0, side] - found[0, side]).min(axis=0).max()) > 1e-3  # both see the prompt


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_where_lengths_turn_tokens_both_documents_stand_whole(kind):
    factors = {"short_factor": (1.0,) * 4, "long_factor": (2.0, 3.0, 4.0, 5.0)}
    rope = Rope(kind=kind, factor=4.0, original_max_position=5, **factors)
    config = dataclasses.replace(PLAIN, rope=rope)
    model = build(config)
    assert not shares_prompts(config)
    assert shares_prompts(PLAIN)
    plain, run = drawn(model), jax.jit(model.features)
    found = answers(run, plain, ONE, OTHER, share_prompt=False)
    for i, (prompt, *both) in enumerate((ONE, OTHER)):
        for side, answer in enumerate(both):
            alone = run({"params": plain}, *row(prompt + answer))[0]
            np.testing.assert_allclose(found[i, side], alone[len(prompt) - 1 :][: len(answer) + 1], atol=1e-5)
    shared = answers(run, plain, ONE, OTHER)  # for the flag to matter
    assert float(jnp.abs(shared[0, 1] - found[0, 1]).max()) > 1e-4


# ---- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuts", "names"), [([1], ["0-0", "1-3"]), ([3, 1], ["0-0", "1-2", "3-3"])])
def test_a_split_stack_gives_the_same_features(params, features, cuts, names):
    parts = functools.reduce(split, cuts, params)
    assert list(parts["blocks"]) == names
    for name, stack in parts["blocks"].items():
        layers = span(name)
        for path, leaf in tree.flat(stack).items():
            whole = tree.flat(params["blocks"]["0-3"])[path]
            np.testing.assert_array_equal(leaf, whole[layers.start : layers.stop])
    whole, cut = (features({"params": p}, *row(A, B, C)) for p in (params, parts))
    np.testing.assert_allclose(cut, whole, atol=2e-6)


def test_a_cut_where_a_stack_begins_or_ends_changes_nothing(params):
    assert list(split(params, 0)["blocks"]) == list(split(params, 4)["blocks"]) == ["0-3"]
    assert list(split(split(params, 2), 2)["blocks"]) == ["0-1", "2-3"]


@pytest.mark.parametrize("at", [-1, 5])
def test_a_cut_outside_the_model_is_refused(params, at):
    with pytest.raises(ValueError, match=f"cannot cut before layer {at}; the model has layers 0 to 3"):
        split(params, at)


def test_stacks_run_in_the_order_of_their_layers_whatever_the_order_of_keys(params, features):
    parts = split(params, 1)
    turned = {**parts, "blocks": dict(reversed(parts["blocks"].items()))}
    np.testing.assert_array_equal(features({"params": parts}, *row(A, B)), features({"params": turned}, *row(A, B)))


def test_remat_policies_give_equal_gradients():
    found, plain = {}, drawn(build(PLAIN))
    for policy in remat.POLICIES:
        model = build(PLAIN, remat=policy)
        loss = lambda p, model=model: jnp.sum(model.features({"params": p}, *row(A, B, C)) ** 2)
        found[policy] = jax.jit(jax.grad(loss))(plain)
    for policy in found:
        for (path, ours), base in zip(tree.flat(found[policy]).items(), jax.tree.leaves(found["none"]), strict=True):
            np.testing.assert_allclose(ours, base, rtol=1e-4, atol=1e-3, err_msg=f"{policy} {path}")


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="remat policy 'all' is not known; known are none, dots, block, offload"):
        build(CONFIG, remat="all")


def test_a_fresh_adapter_adds_exactly_nothing(params, features):
    fresh = lora.init(jax.random.key(0), params, SPEC)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 16)), jnp.float32)
    q, low = (jax.tree.map(lambda leaf: leaf[1], part["blocks"]["0-3"]["attn"]["q"]) for part in (params, fresh))
    layer = Dense(16, use_bias=True)
    np.testing.assert_array_equal(layer.apply({"params": q, "lora": low}, x), layer.apply({"params": q}, x))
    # Of whole models a compiler makes two programs, which it may fuse, and so round, differently.
    whole = (features({"params": params, **more}, *row(A, B, C)) for more in ({"lora": fresh}, {}))
    np.testing.assert_allclose(*whole, atol=2e-6)


def test_an_adapter_answers_as_the_merged_model(params, adapter, features):
    merged = lora.merge({"params": params, "lora": adapter})
    both = features({"params": params, "lora": adapter}, *row(A, B, C))
    np.testing.assert_allclose(both, features({"params": merged}, *row(A, B, C)), atol=1e-4)
    assert float(jnp.abs(both - features({"params": params}, *row(A, B, C))).max()) > 0.01


def test_lora_dropout_differs_between_keys_and_is_off_without_one(params, adapter, features):
    model, variables = build(CONFIG, lora_dropout=0.5), {"params": params, "lora": adapter}
    noisy = jax.jit(lambda key: model.features(variables, *row(A, B, C), dropout=key))
    first, again, other = (noisy(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 0.01
    quiet = jax.jit(model.features)(variables, *row(A, B, C))
    np.testing.assert_array_equal(quiet, features(variables, *row(A, B, C)))


def dots(jaxpr):
    """Matrix products that a program runs, the bodies of scans as often as they run."""
    found = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        found += equation.primitive.name == "dot_general"
        found += times * sum(map(dots, jaxprs_in_params(equation.params)))
    return found


def test_the_backward_pass_ends_at_the_first_stack_that_trains():
    model = build(PLAIN)
    parts = split(drawn(model), 1)

    def backward(pattern):
        trains, rests = tree.partition({"params": parts}, pattern)
        loss = lambda t, r: jnp.sum(model.features(tree.combine(t, r), *row(A, B, C)) ** 2)
        whole, forward = (jax.make_jaxpr(f)(trains, rests).jaxpr for f in (jax.grad(loss), loss))
        flops = jax.jit(jax.grad(loss)).lower(trains, rests).compile().cost_analysis()["flops"]
        return dots(whole) - dots(forward), flops

    (top, flops), (every, all_flops) = backward("params/blocks/1-1/.*"), backward("params/blocks/.*")
    assert 0 < 2 * top <= every
    assert flops < 0.75 * all_flops


def test_logits_are_float32_products_with_the_output_table(params):
    for tied in (True, False):
        model = build(DecoderConfig(V, 16, 24, 4, heads=4, kv_heads=2, head_dim=4, max_position=64, tied=tied))
        own = {name: part for name, part in params.items() if name != "head" or not tied}
        table = own["embed" if tied else "head"]["table"]
        f = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
        scores = logits(model, {"params": own}, jnp.asarray(f, jnp.bfloat16))
        assert scores.dtype == jnp.float32
        np.testing.assert_allclose(scores[0], f[0] @ np.asarray(table).T, atol=0.1)


def test_a_fresh_model_has_a_head_only_where_it_is_not_tied():
    assert "head" in jax.eval_shape(MODEL.init, jax.random.key(0))
    tied = build(DecoderConfig(V, 16, 24, 2, heads=4, kv_heads=2, head_dim=4, max_position=64, tied=True))
    assert "head" not in jax.eval_shape(tied.init, jax.random.key(0))


@pytest.mark.parametrize(("change", "message"), [
    ({"kv_heads": 3}, "4 heads cannot share 3 key heads"),
    ({"activation": "swish2"}, "activation 'swish2' is not known; known are silu, gelu"),
])  # fmt: skip
def test_a_shape_that_cannot_be_is_refused(change, message):
    fields = {"heads": 4, "kv_heads": 2, "head_dim": 4, "max_position": 64} | change
    with pytest.raises(ValueError, match=message):
        DecoderConfig(V, 16, 24, 2, **fields)


def test_adapted_tables_answer_as_merged_ones_do_over_a_cache_too():
    """Tied, scaled and capped; the low-rank parts of embedding and output layer go their own ways."""
    config = DecoderConfig(
        V, 16, 24, 1, heads=4, kv_heads=2, head_dim=4, max_position=64,
        tied=True, embed_scale=3.0, logit_scale=0.7, logit_soft_cap=2.0,
    )  # fmt: skip
    model, draw = build(config), np.random.default_rng(0)
    params = drawn(model)
    low = {
        "embed": {"a": draw.normal(size=(V, 2)), "b": draw.normal(size=(2, 16)), "scale": np.float64(0.3)},
        "head": {"a": draw.normal(size=(16, 3)), "b": draw.normal(size=(3, V)), "scale": np.float64(0.2)},
    }
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), low)
    table = params["embed"]["table"]
    embed, head = (low[name]["scale"] * low[name]["a"] @ low[name]["b"] for name in ("embed", "head"))
    merged = {**params, "embed": {"table": table + embed}, "head": {"table": table + head.T}}
    tokens = jnp.array([[3, 30, 7, 3]])

    @jax.jit
    def scores(variables):
        cache = model.cache(1, 8)
        whole = logits(model, variables, model.features(variables, tokens))
        steps = []
        for at in (slice(0, 3), slice(3, 4)):
            features, cache = model.extend(variables, tokens[:, at], jnp.arange(4)[None, at], cache)
            steps.append(logits(model, variables, features))
        return whole, jnp.concatenate(steps, axis=1)

    expected, _ = scores({"params": merged})
    for found in scores({"params": params, "lora": low}):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_adapter_of_another_cut_is_refused_instead_of_ignored(params):
    low = {"blocks": {"0-1": {"attn": {"q": {"a": jnp.ones((2, 16, 1))}}}}}
    with pytest.raises(ValueError, match=r"adapter has stacks \['0-1'\], the model \['0-3'\]; cut alike"):
        MODEL.features({"params": params, "lora": low}, jnp.array([[3, 7]]))
