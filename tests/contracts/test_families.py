"""What every registered model family keeps to; a new one is covered the moment it is registered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, lora, models, objectives, sharding, tree
from jaxsft.hub import names
from jaxsft.models import FAMILIES
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
family = pytest.mark.parametrize("kind", FAMILIES)


def config_of(kind: str, **more):
    return FAMILIES[kind].read_config({"model_type": kind, **SMALL, **more})


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
    for tied in (True, False):
        shapes = hub.shapes(config_of(kind, tie_word_embeddings=tied))
        mesh = sharding.mesh(2, 2, 2)
        placed = tree.flat(sharding.shardings(shapes, FAMILIES[kind].rules, mesh))
        found = []
        for path, leaf in tree.flat(shapes).items():
            here, transposed = names.leaf_names(FAMILIES[kind], path)
            assert len(here) == (leaf.shape[0] if path.startswith("blocks/") else 1)
            assert transposed == path.endswith("/kernel")
            assert len(placed[path].spec) == len(leaf.shape)
            found += here
        assert len(found) == len(set(found))
        assert any("tensor" in placed[p].spec for p in placed)
        assert ("lm_head.weight" in found) != tied


@family
def test_every_adapter_leaf_is_placed_and_gets_a_gradient(kind, built):
    model, params = built(kind)
    adapter = lora.init(jax.random.key(1), params, lora.LoRA(rank=2, targets=f"embed|head|{lora.ALL}"))
    placed = sharding.shardings(adapter, lora.rules(FAMILIES[kind].rules), sharding.mesh(2, 2, 2))
    assert tree.flat(placed).keys() == tree.flat(adapter).keys()
    kernels = [path for path in tree.flat(params) if path.endswith("/kernel")]
    assert len(tree.flat(adapter)) == 3 * (len(kernels) + 2)
    noisy = jax.tree.map(lambda x: x + 0.1, adapter)  # B = 0 would give A no gradient
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 64)
    ones = jnp.ones_like(tokens)
    batch = Tokens(tokens, ones > 0, jnp.arange(12) * ones, ones)
    loss = lambda low: objectives.supervised(model)({"params": params, "lora": low}, batch, None).loss
    for path, grad in tree.flat(jax.jit(jax.grad(loss))(noisy)).items():
        assert np.abs(grad).max() > 0, path


@family
def test_merged_answers_as_base_and_adapter(kind, built):
    model, params = built(kind)
    noisy = jax.tree.map(lambda x: x + 0.05, lora.init(jax.random.key(1), params, lora.LoRA(rank=2, alpha=2.0)))
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 64)
    apart = model.features({"params": params, "lora": noisy}, tokens)
    merged = model.features({"params": lora.merge({"params": params, "lora": noisy})}, tokens)
    np.testing.assert_allclose(merged, apart, atol=1e-5)


@family
def test_packed_padded_and_cached_agree_with_alone(kind, built):
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
    cache, steps = model.cache(1, 16), []
    for at in (slice(0, 5), slice(5, 6), slice(6, 9)):
        out, cache = model.extend({"params": params}, ids[None, at], np.arange(9)[None, at], cache)
        steps.append(out[0])
    np.testing.assert_allclose(np.concatenate(steps), alone[0], atol=1e-5)


@family
def test_a_key_that_nobody_reads_is_refused_by_name(kind):
    with pytest.raises(ValueError, match="'hidden_dropout_of_doom' = 3"):
        config_of(kind, hidden_dropout_of_doom=3)
