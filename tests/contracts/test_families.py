"""What every registered model family keeps to; a new one is covered the moment it is registered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import data, hub, lora, losses, models, objectives, quant, sharding, tree, types
from jaxsft.hub import names
from jaxsft.models import FAMILIES, EncoderConfig
from jaxsft.types import Tokens

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SHAPES = {"gpt2": GPT2, "bert": ENCODER, "roberta": ENCODER}  # of the families that have no SMALL
OWN = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"shared_expert_intermediate_size": 40, **MOE},
    "qwen3_moe": {"mlp_only_layers": [0], **MOE},
}
ENCODERS = {"bert": "Bert", "roberta": "Roberta"}  # and how their architectures are named
family = pytest.mark.parametrize("kind", FAMILIES)
# What takes a compiled program for each family: of these here, of the others in the parity run.
EVERY_DAY = {"llama", "gemma2", "gpt2", "qwen2_moe", "bert"}
mostly = lambda kinds: [pytest.param(k, marks=() if k in EVERY_DAY else pytest.mark.parity) for k in kinds]
compiled = pytest.mark.parametrize("kind", mostly(FAMILIES))
encoder = pytest.mark.parametrize("kind", ENCODERS)
decoder = pytest.mark.parametrize("kind", mostly(kind for kind in FAMILIES if kind not in ENCODERS))


def config_of(kind: str, *, headless: bool = False, **more):
    if kind in ENCODERS:
        more["architectures"] = [ENCODERS[kind] + ("Model" if headless else "ForMaskedLM")]
    return FAMILIES[kind].read_config({"model_type": kind, **SHAPES.get(kind, SMALL), **OWN.get(kind, {}), **more})


def objective(model):
    """What a model learns: a decoder the next token, an encoder the hidden ones."""
    if isinstance(model.config, EncoderConfig):
        return objectives.masked(model, mask_id=3, ordinary=np.arange(4, 64), rate=0.4)
    return objectives.supervised(model)


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(kind: str):
        if kind not in made:
            model = models.build(config_of(kind))
            made[kind] = model, jax.jit(model.init)(jax.random.key(0))
        return made[kind]

    return get


@family
def test_every_parameter_has_one_name_and_one_sharding_rule(kind):
    for more in (True, False):  # a decoder with an output layer of its own and without, an encoder with a head
        encodes = kind in ENCODERS
        shapes = hub.shapes(
            config_of(kind, headless=not more) if encodes else config_of(kind, tie_word_embeddings=more)
        )
        mesh = sharding.mesh(2, 2, 2)
        placed = tree.flat(sharding.shardings(shapes, FAMILIES[kind].rules, mesh))
        found = []
        for path, leaf in tree.flat(shapes).items():
            here, transposed = names.leaf_names(FAMILIES[kind], path, leaf.shape)
            assert here.shape == leaf.shape[: here.ndim]
            assert (here.ndim > 0) == path.startswith("blocks/")
            assert transposed <= path.endswith("/kernel")
            assert len(placed[path].spec) == len(leaf.shape)
            found += here.flat
        assert len(found) == len(set(found))
        assert any("tensor" in placed[p].spec for p in placed)
        head = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}.get(kind, "lm_head.weight")
        assert (head in found) == (more if encodes else not more)


# Families that have some leaves only where their config says so, beside an output layer and a score.
OPTIONS = {
    **{kind: {"attention_bias": True, "mlp_bias": True} for kind in ("llama", "granite", "smollm3")},
    **{kind: {"attention_bias": True} for kind in ("gemma", "gemma2", "gemma3_text", "olmo2", "qwen3", "qwen3_moe")},
}


@family
def test_no_sharding_rule_is_without_a_leaf_and_every_matrix_is_cut_over_fsdp_and_tensor(kind):
    if kind in ENCODERS:
        scores = {"architectures": [ENCODERS[kind] + "ForSequenceClassification"], "num_labels": 1}
        configs = [config_of(kind), FAMILIES[kind].read_config({"model_type": kind, **ENCODER, **scores})]
    else:
        made = [{"tie_word_embeddings": False}, JUDGE, OPTIONS.get(kind, {})]
        configs = [config_of(kind, **more) for more in made]
    rules, trees = FAMILIES[kind].rules, [hub.shapes(config) for config in configs]
    sharding.check(rules, *trees)
    placed = tree.flat(sharding.shardings(trees[0], rules, sharding.mesh(1, 2, 2, 1, 2)))
    for path, where in placed.items():
        cut = {axis for axis in where.spec if axis}
        if path.endswith("kernel") and "router" not in path and "gate/" not in path:
            assert cut >= {"fsdp", "tensor"}, path
        if "/experts/" in path:
            assert "expert" in cut, path


rewarding = pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in (*ENCODERS, "granite")])
JUDGE = {"architectures": ["SomeForSequenceClassification"], "num_labels": 1}


@rewarding
@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_has_a_score_in_the_output_layers_place_named_and_placed(kind, tied):
    config, rules = config_of(kind, tie_word_embeddings=tied, **JUDGE), FAMILIES[kind].rules
    shapes = hub.shapes(config)
    plain, judge = tree.flat(hub.shapes(config_of(kind, tie_word_embeddings=tied))), tree.flat(shapes)
    assert (config.labels, config.tied) == (1, False)
    assert {p: x.shape for p, x in judge.items()} == {p: x.shape for p, x in plain.items() if p != "head/table"} | {
        "score/kernel": (32, 1)
    }
    placed = tree.flat(sharding.shardings(shapes, rules, sharding.mesh(2, 2, 2)))
    assert placed.keys() == judge.keys()
    assert placed["score/kernel"].spec == jax.P("fsdp", None)
    for path, leaf in judge.items():
        names.leaf_names(FAMILIES[kind], path, leaf.shape)
    here, transposed = names.leaf_names(FAMILIES[kind], "score/kernel", (32, 1))
    assert (here.item(), transposed) == ("score.weight", True)
    assert FAMILIES[kind].classifier.endswith("ForSequenceClassification")
    model, tokens = models.build(config), jax.ShapeDtypeStruct((2, 12), jnp.int32)
    assert jax.eval_shape(model.features, {"params": shapes}, tokens).shape == (2, 12, 32)
    with pytest.raises(ValueError, match="scores whole texts and has no output layer, so it predicts no tokens"):
        model.output({"params": shapes})


@pytest.mark.parametrize(("kind", "message"), [
    ("granite", "transformers has no ...ForSequenceClassification of this family"),
    ("bert", "an encoder has no score of a text"),
    ("roberta", "an encoder has no score of a text"),
])  # fmt: skip
def test_families_that_cannot_score_say_so(kind, message):
    with pytest.raises(ValueError, match=message):
        models.with_labels(FAMILIES[kind], config_of(kind, **({} if kind in ENCODERS else JUDGE)), 1)


@compiled
def test_every_adapter_leaf_is_placed_and_gets_a_gradient(kind, built):
    model, params = built(kind)
    tables = "" if kind in ENCODERS else "embed|head|"
    adapter = lora.init(jax.random.key(1), params, lora.LoRA(rank=2, targets=tables + lora.ALL))
    placed = sharding.shardings(adapter, lora.rules(FAMILIES[kind].rules), sharding.mesh(2, 2, 2))
    assert tree.flat(placed).keys() == tree.flat(adapter).keys()
    kernels = [path for path in tree.flat(params) if path.endswith("/kernel")]
    # Heads, and what decides instead of computing, get no adapter unless their name is given.
    outside = [path for path in kernels if path.endswith(("mlm/dense/kernel", "router/kernel", "shared_gate/kernel"))]
    assert len(tree.flat(adapter)) == 3 * (len(kernels) - len(outside) + tables.count("|"))
    draw = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype("float32"), adapter)  # B = 0 hides A
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 64)
    ones = jnp.ones_like(tokens)
    batch = Tokens(tokens, ones > 0, jnp.arange(12) * ones, ones)
    loss = lambda low: objective(model)({"params": params, "lora": low}, batch, None).loss
    for path, grad in tree.flat(jax.jit(jax.grad(loss))(noisy)).items():
        assert np.abs(grad).max() > 0, path


@family
def test_every_kernel_of_the_layers_can_be_packed_placed_and_read(kind):
    config, mesh = config_of(kind), sharding.mesh(2, 2, 2)
    leaves = tree.flat(hub.shapes(config))
    kernels = {path: x for path, x in leaves.items() if tree.matches(f"blocks/{lora.ALL}/kernel", path)}
    rest = tree.nest({path: x for path, x in leaves.items() if path not in kernels})
    for way in quant.KINDS:
        pack = functools.partial(quant.pack, kind=way)
        packed = tree.nest({path.removesuffix("/kernel"): jax.eval_shape(pack, x) for path, x in kernels.items()})
        placed = sharding.shardings(packed, quant.rules(FAMILIES[kind].rules), mesh)
        assert all("tensor" in x.spec for path, x in tree.flat(placed).items() if path.endswith("/codes"))
        tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)
        out = jax.eval_shape(models.build(config).features, {"params": rest, "packed": packed}, tokens)
        assert out.shape == (2, 12, config.hidden + (kind in ENCODERS))  # the head's bias is one more feature


@compiled
def test_merged_answers_as_base_and_adapter(kind, built):
    model, params = built(kind)
    noisy = jax.tree.map(lambda x: x + 0.05, lora.init(jax.random.key(1), params, lora.LoRA(rank=2, alpha=2.0)))
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 64)
    apart = model.features({"params": params, "lora": noisy}, tokens)
    merged = model.features({"params": lora.merge({"params": params, "lora": noisy})}, tokens)
    np.testing.assert_allclose(merged, apart, atol=1e-5)


@compiled
def test_packed_and_padded_agree_with_alone(kind, built):
    model, params = built(kind)
    run = jax.jit(lambda *args: model.features({"params": params}, *args))
    ids = np.arange(40, dtype=np.int32) * 7 % 64
    alone = [run(ids[None, :9])[0], run(ids[None, 9:20])[0]]
    row = ids[None, :24]
    positions = np.array([[*range(9), *range(11), *[0] * 4]], np.int32)
    segments = np.array([[1] * 9 + [2] * 11 + [0] * 4], np.int32)
    packed = run(row, positions, segments)[0]
    np.testing.assert_allclose(packed[:9], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[9:20], alone[1], atol=1e-5)


@decoder
def test_answers_that_share_a_prompt_are_as_likely_as_in_documents_of_their_own(kind, built):
    model, params = built(kind)
    head = {"scale": model.config.logit_scale, "soft_cap": model.config.logit_soft_cap}

    @jax.jit
    def likely(tokens, mask, positions, segments):
        """The log-probability of what is learned in each segment of a row."""
        targets, learned = losses.shift(tokens, mask, segments)
        reads = types.reads(segments)
        features = model.features({"params": params}, tokens, positions, segments, reads=reads)
        lp = losses.logprobs(features, model.output({"params": params}), targets, learned, **head)
        return jax.ops.segment_sum(lp[0], segments[0], 10)

    row_of = lambda row: likely(*(array[None] for array in row[:4]))
    draw, pairs = np.random.default_rng(0), []
    for prompt, *answers in ((9, 5, 8), (1, 9, 3), (3, 4, 1)):
        asked = draw.integers(0, 64, prompt)
        sides = [np.r_[asked, draw.integers(0, 64, answer)] for answer in answers]
        pairs.append(tuple(data.Example(ids, np.arange(len(ids)) >= prompt) for ids in sides))
    packed, whole = (
        row_of(data.pairs_in_memory(pairs, 64, [[0, 1, 2]], share_prompt=share)[0]) for share in (True, False)
    )
    np.testing.assert_allclose(packed, whole, atol=1e-5, rtol=1e-6)
    for k, pair in enumerate(pairs):
        for side, document in enumerate(pair):
            alone = row_of(data.in_memory([document], 64)[0])[1]
            np.testing.assert_allclose(packed[3 * k + 2 + side], alone, atol=1e-5, rtol=1e-6)
            assert alone < -1


@decoder
def test_cached_agrees_with_alone(kind, built):
    model, params = built(kind)
    ids = np.arange(40, dtype=np.int32) * 7 % 64
    alone = jax.jit(model.features)({"params": params}, ids[None, :9])[0]
    places, real = np.arange(16)[None], (np.arange(16) < 5).astype(np.int32)[None]
    out, cache = model.read({"params": params}, ids[None, :16], places, real)  # what fills up the row is written over
    steps = [out[0, :5]]
    for at in (slice(5, 6), slice(6, 9)):
        out, cache = model.extend({"params": params}, ids[None, at], np.arange(9)[None, at], cache)
        steps.append(out[0])
    np.testing.assert_allclose(np.concatenate(steps), alone, atol=1e-5)


@encoder
def test_an_encoder_sees_both_sides_and_does_not_generate(kind, built):
    model, params = built(kind)
    ids = np.arange(9, dtype=np.int32)[None] * 7 % 64
    first, other = (model.features({"params": params}, row)[0] for row in (ids, np.where(ids == ids[0, 8], 1, ids)))
    assert np.abs(first[0] - other[0]).max() > 1e-4
    asks = lambda: model.cache(1, 16), lambda: model.read({"params": params}, ids, ids, ids)
    for ask in (*asks, lambda: model.extend({"params": params}, ids, ids, None)):
        with pytest.raises(ValueError, match="an encoder does not generate"):
            ask()
    with pytest.raises(ValueError, match="an encoder reads the next token before it predicts it"):
        objectives.supervised(model)


@decoder
def test_a_decoder_is_not_taught_masked_tokens(kind, built):
    with pytest.raises(ValueError, match="train.objective masked is for encoders, and this model is a decoder"):
        objectives.masked(built(kind)[0], mask_id=0, ordinary=np.arange(4, 64))


@family
def test_a_key_that_nobody_reads_is_refused_by_name(kind):
    with pytest.raises(ValueError, match="'hidden_dropout_of_doom' = 3"):
        config_of(kind, hidden_dropout_of_doom=3)
