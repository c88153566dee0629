import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import lora, models, quant, sharding, tree, tuning
from jaxsft.lora import LoRA
from jaxsft.models import split
from jaxsft.tuning import Config

DEPTH = 4
RULES = models.FAMILIES["llama"].rules
KERNELS = {"attn/q": (8, 8), "attn/o": (8, 8), "mlp/down": (12, 8)}


def params(cut=None):
    stack = {f"blocks/0-3/{name}/kernel": jnp.zeros((DEPTH, *shape)) for name, shape in KERNELS.items()}
    stack |= {"blocks/0-3/attn/q/bias": jnp.zeros((DEPTH, 8)), "blocks/0-3/attn_norm/scale": jnp.ones((DEPTH, 8))}
    whole = tree.nest({"embed/table": jnp.zeros((16, 8)), **stack, "norm/scale": jnp.ones(8)})
    return whole if cut is None else split(whole, cut)


def packed(kind="nf4", cut=None):
    """The same model, its kernels packed."""
    rest = {path: x for path, x in tree.flat(params()).items() if not path.endswith("/kernel")}
    layers = {
        f"blocks/0-3/{name}/{part}": x
        for name, shape in KERNELS.items()
        for part, x in quant.pack(jnp.ones((DEPTH, *shape)), kind).items()
    }
    both = {"params": tree.nest(rest), "packed": tree.nest(layers)}
    return both if cut is None else {name: split(part, cut) for name, part in both.items()}


def learns(config):
    """(addresses that learn, addresses that rest, cut) of a configuration on a model of four layers."""
    plan = tuning.plan(config, DEPTH)
    one = sharding.mesh(devices=jax.devices()[:1])
    made = tuning.apply(plan, {"params": params(plan.cut)}, jax.random.key(0), mesh=one, rules=RULES)
    trains, rests = (set(tree.flat(part)) for part in made)
    assert set(tree.flat(params(plan.cut))) <= {p.removeprefix("params/") for p in trains | rests}
    return trains, rests, plan.cut


def stack(span, kinds=("attn/q/kernel", "attn/o/kernel", "mlp/down/kernel", "attn/q/bias", "attn_norm/scale")):
    return {f"params/blocks/{span}/{kind}" for kind in kinds}


def adapters(span, layers=tuple(KERNELS)):
    return {f"lora/blocks/{span}/{layer}/{part}" for layer in layers for part in "ab"}


def test_full_tuning_trains_every_parameter_and_cuts_nothing():
    trains, rests, cut = learns(Config(method="full"))
    assert trains == {f"params/{p}" for p in tree.flat(params())}
    assert (rests, cut) == (set(), None)


@pytest.mark.parametrize(("layers", "cut", "span", "other"), [
    (1, 3, "3-3", "0-2"),
    (3, 1, "1-3", "0-0"),
    (-1, 1, "0-0", "1-3"),
    (-3, 3, "0-2", "3-3"),
])  # fmt: skip
def test_partial_tuning_trains_the_last_or_the_first_layers(layers, cut, span, other):
    trains, rests, at = learns(Config(method="partial", layers=layers))
    assert at == cut
    assert trains == stack(span)
    assert rests == stack(other) | {"params/embed/table", "params/norm/scale"}


@pytest.mark.parametrize("layers", [4, -4])
def test_all_layers_need_no_cut(layers):
    trains, rests, cut = learns(Config(method="partial", layers=layers))
    assert (trains, rests, cut) == (stack("0-3"), {"params/embed/table", "params/norm/scale"}, None)


def test_patterns_train_exactly_what_they_match():
    trains, _, cut = learns(Config(method="partial", trainable=[".*norm/scale", "embed/.*"]))
    assert trains == {"params/norm/scale", "params/blocks/0-3/attn_norm/scale", "params/embed/table"}
    assert cut is None


def test_layers_and_patterns_add_up():
    trains, *_ = learns(Config(method="partial", layers=2, trainable=["norm/scale"]))
    assert trains == stack("2-3") | {"params/norm/scale"}


def test_a_pattern_with_alternatives_stays_one_pattern():
    trains, *_ = learns(Config(method="partial", trainable=["norm/scale|embed/table"]))
    assert trains == {"params/norm/scale", "params/embed/table"}


@pytest.mark.parametrize(("config", "beside"), [
    (Config(method="full"), {f"params/{p}" for p in tree.flat(params())}),
    (Config(method="partial", layers=1), stack("3-3")),
    (Config(method="partial", trainable=["norm/scale"]), {"params/norm/scale"}),
    (Config(lora=LoRA(rank=2, targets=".*")), adapters("0-3") | {f"lora/embed/{half}" for half in "ab"}),
    (Config(layers=2, trainable=["norm/scale", "score/.*"]), adapters("2-3") | {"params/norm/scale"}),
])  # fmt: skip
def test_a_new_score_trains_whatever_the_method_is(config, beside):
    plan = tuning.plan(config, DEPTH, also=["score/.*"])
    judge = {**params(plan.cut), "score": {"kernel": jnp.zeros((8, 1))}}
    one = sharding.mesh(devices=jax.devices()[:1])
    trains, rests = tuning.apply(plan, {"params": judge}, jax.random.key(0), mesh=one, rules=RULES)
    assert set(tree.flat(trains)) == beside | {"params/score/kernel"}
    assert {p for p in tree.flat(rests) if p.startswith("params/")} == {
        f"params/{p}" for p in tree.flat(params(plan.cut))
    } - beside
    learns, total = tree.count(trains), tree.count(trains) + tree.count(rests.get("params", {}))
    assert tuning.describe(plan, trains, rests)["parameters that train"].startswith(f"{learns:,} of {total:,} ")


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="matches no leaf"):
        learns(Config(method="partial", trainable=["norm/scale", "head/.*"]))


def test_lora_trains_a_and_b_of_every_kernel_and_nothing_of_the_base():
    trains, rests, cut = learns(Config(lora=LoRA(rank=2)))
    assert trains == adapters("0-3")
    assert {p for p in rests if p.startswith("params/")} == {f"params/{p}" for p in tree.flat(params())}
    assert cut is None


def test_lora_trains_what_patterns_name_of_the_base_beside_it():
    trains, rests, _ = learns(Config(lora=LoRA(rank=2, targets=".*/q"), trainable=["embed/table", ".*/(scale|bias)"]))
    beside = {"params/embed/table", "params/norm/scale", *stack("0-3", ("attn/q/bias", "attn_norm/scale"))}
    assert trains == adapters("0-3", ["attn/q"]) | beside
    assert {p for p in rests if p.startswith("params/")} == stack("0-3", [f"{name}/kernel" for name in KERNELS])


@pytest.mark.parametrize("config", [
    Config(lora=LoRA(rank=2)),
    Config(lora=LoRA(rank=2), trainable=["embed/table"]),
    Config(method="partial"),
    Config(method="partial", layers=1),
    Config(method="full"),
], ids=["lora", "lora and the table", "alone", "partial", "full"])  # fmt: skip
def test_tables_train_in_any_case_where_new_tokens_need_it(config):
    plan = tuning.plan(config, DEPTH, also=[models.TABLES])
    one = sharding.mesh(devices=jax.devices()[:1])
    trains, rests = tuning.apply(plan, {"params": params(plan.cut)}, jax.random.key(0), mesh=one, rules=RULES)
    others = set() if config == Config(method="partial") else learns(config)[0]
    assert set(tree.flat(trains)) == others | {"params/embed/table"}
    assert not set(tree.flat(trains)) & set(tree.flat(rests))


def test_dora_trains_its_magnitudes_and_pissa_keeps_what_it_started_at():
    trains, rests, _ = learns(Config(lora=LoRA(rank=2, dora=True, init="pissa")))
    assert trains == {f"lora/blocks/0-3/{layer}/{part}" for layer in KERNELS for part in ("a", "b", "m")}
    constants = {f"lora/blocks/0-3/{layer}/{part}" for layer in KERNELS for part in ("a0", "b0", "scale")}
    assert {p for p in rests if p.startswith("lora/")} == constants


@pytest.mark.parametrize(("targets", "trainable", "name"), [
    (".*/q", ".*/q/kernel", "blocks/0-3/attn/q/kernel"),
    ("embed", "embed/table", "embed/table"),
    ("head", "embed/table", "embed/table"),  # tied: the output layer has no other
])  # fmt: skip
def test_a_weight_that_would_train_beside_its_own_adapter_is_refused(targets, trainable, name):
    with pytest.raises(ValueError, match=f"{name} is in tuning.trainable and has an adapter; take it out of one"):
        learns(Config(lora=LoRA(rank=2, targets=targets), trainable=[trainable]))


Q_O = ".*/q|.*/o", ("attn/q", "attn/o")


@pytest.mark.parametrize(
    ("count", "span", "targets", "layers"),
    [
        (1, "3-3", "all", tuple(KERNELS)),
        (-4, "0-3", "all", tuple(KERNELS)),
        (-1, "0-0", *Q_O),
        (4, "0-3", *Q_O),
    ],
)
def test_lora_may_be_on_some_layers_only(count, span, targets, layers):
    trains, *_ = learns(Config(layers=count, lora=LoRA(rank=2, targets=targets)))
    assert trains == adapters(span, layers)


def test_a_new_adapter_lies_on_the_mesh_as_its_kernels_do_and_equals_a_plain_one():
    mesh, plan = sharding.mesh(2, 2, 2), tuning.plan(Config(lora=LoRA(rank=2)), DEPTH)
    trains, _ = tuning.apply(plan, {"params": params()}, jax.random.key(3), mesh=mesh, rules=RULES)
    plain = tree.flat(lora.init(jax.random.key(3), params(), LoRA(rank=2)))
    for path, leaf in tree.flat(trains["lora"]).items():
        np.testing.assert_allclose(leaf, plain[path], rtol=1e-6)
    a = trains["lora"]["blocks"]["0-3"]["attn"]["q"]["a"]
    assert {shard.data.shape for shard in a.addressable_shards} == {(4, 4, 2)}


@pytest.mark.parametrize(("config", "message"), [
    (Config(method="full", layers=2), "tuning.layers is for tuning.method lora or partial; the method is full"),
    (Config(method="full", trainable=["x"]), "tuning.trainable is for tuning.method lora or partial; the"),
    (Config(method="partial"), "tuning.method partial needs tuning.layers or tuning.trainable"),
    (Config(method="partial", layers=0), "tuning.layers is 0, but the model has 4 layers"),
    (Config(method="partial", layers=5), "tuning.layers is 5, but the model has 4 layers; give 1 to 4, or negative"),
    (Config(method="lora", layers=-5), "tuning.layers is -5, but the model has 4 layers"),
])  # fmt: skip
def test_settings_that_contradict_each_other_or_the_model_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tuning.plan(config, DEPTH)


def test_layers_of_a_model_of_stages_are_named():
    with pytest.raises(
        ValueError, match="this model has stages .*; name those that train in tuning.trainable, such as"
    ):
        tuning.plan(Config(method="partial", layers=2), 0)


def test_the_description_counts_what_trains():
    plan = tuning.plan(Config(method="partial", trainable=["norm/scale"]), DEPTH)
    lines = tuning.describe(plan, *tree.partition({"params": params()}, plan.trainable))
    size = 16 * 8 + 4 * (8 * 8 + 8 * 8 + 12 * 8 + 8 + 8) + 8
    assert lines["parameters that train"] == f"8 of {size:,} ({8 / size:.2%})"
    assert lines["arrays that train"] == "1 of 7"


def test_lora_over_packed_kernels_is_the_adapter_that_the_kernels_would_have():
    mesh, plan = sharding.mesh(2, 2, 2), tuning.plan(Config(layers=1, lora=LoRA(rank=2)), DEPTH)
    trains, rests = tuning.apply(plan, packed(cut=plan.cut), jax.random.key(3), mesh=mesh, rules=RULES)
    plain, _ = tuning.apply(plan, {"params": params(plan.cut)}, jax.random.key(3), mesh=mesh, rules=RULES)
    assert tree.flat(trains).keys() == adapters("3-3")
    assert all(np.array_equal(x, tree.flat(plain)[path]) for path, x in tree.flat(trains).items())
    assert tree.flat(rests["packed"]).keys() == tree.flat(packed(cut=plan.cut)["packed"]).keys()


@pytest.mark.parametrize(("config", "kernel"), [
    (Config(method="full"), "blocks/0-3/attn/q/kernel"),
    (Config(method="partial", layers=2), "blocks/2-3/attn/[qo]/kernel"),
    (Config(method="partial", trainable=["norm/scale", ".*/down/.*"]), "blocks/0-3/mlp/down/kernel"),
])  # fmt: skip
def test_packed_kernels_do_not_train(config, kernel):
    plan = tuning.plan(config, DEPTH)
    with pytest.raises(ValueError, match=rf"{kernel} is to train, but model.quantise packs it.*tuning.method lora"):
        tuning.apply(plan, packed(cut=plan.cut), jax.random.key(0), mesh=sharding.mesh(), rules=RULES)


def test_what_is_not_packed_may_train():
    plan = tuning.plan(Config(method="partial", trainable=["norm/scale", ".*/attn_norm/.*"]), DEPTH)
    trains, _ = tuning.apply(plan, packed(), jax.random.key(0), mesh=sharding.mesh(), rules=RULES)
    assert tree.flat(trains).keys() == {"params/norm/scale", "params/blocks/0-3/attn_norm/scale"}


@pytest.mark.parametrize(("kind", "size"), [
    ("int8", 896 + 4 * 4 * 24),  # a byte a weight, a scale for each of 24 outputs of 4 layers
    ("nf4", 896 // 2 + 4 * 24 + 2 * 4 * 4 * 3),  # half a byte, a block for each output, two numbers for each kernel
])  # fmt: skip
def test_the_description_counts_a_packed_kernel_as_what_it_stands_for(kind, size):
    plan, one = tuning.plan(Config(lora=LoRA(rank=2)), DEPTH), sharding.mesh(devices=jax.devices()[:1])
    lines, plain = (
        tuning.describe(plan, *tuning.apply(plan, base, jax.random.key(0), mesh=one, rules=RULES))
        for base in (packed(kind), {"params": params()})
    )
    assert lines == plain | {"packed": f"896 parameters in 0.00 MB, {8 * size / 896:.2f} bits each"}


def test_the_description_of_an_adapter_leaves_its_constants_out():
    plan = tuning.plan(
        Config(lora=LoRA(rank=2, dora=True, init="pissa", targets=".*/q"), trainable=["norm/scale"]), DEPTH
    )
    base = {"params": params()}
    made = tuning.apply(plan, base, jax.random.key(0), mesh=sharding.mesh(devices=jax.devices()[:1]), rules=RULES)
    lines = tuning.describe(plan, *made)
    learned, count = 4 * (8 * 2 + 2 * 8 + 8) + 8, tree.count(params())
    assert (
        lines["parameters that train"]
        == f"{learned:,} of {learned + count - 8:,} ({learned / (learned + count - 8):.2%})"
    )
    assert lines["arrays that train"] == "4 of 10"
    assert lines["trains"] == "lora/.*/(a|b|m) params/(norm/scale)"
