import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsft import lora, models, sharding, tree
from jaxsft.lora import LoRA

from .conftest import base

Q, DOWN = "blocks/0-2/attn/q", "blocks/0-2/mlp/down"


@pytest.mark.parametrize(("spec", "expected"), [
    (LoRA(rank=8, alpha=32.0), 4.0),
    (LoRA(rank=64, alpha=32.0), 0.5),
    (LoRA(rank=64, alpha=32.0, rslora=True), 4.0),
    (LoRA(rank=8, alpha=32.0, rank_pattern={".*/q": 16}), 2.0),
    (LoRA(rank=8, alpha=32.0, alpha_pattern={".*/down": 1.0, ".*/q": 12.0, ".*": 2.0}), 1.5),
    (LoRA(rank=8, alpha=32.0, rank_pattern={"blocks/.*": 4}, alpha_pattern={".*/q": 6.0}, rslora=True), 3.0),
])  # fmt: skip
def test_the_scale_is_alpha_over_rank_or_over_its_root_as_the_first_pattern_says(spec, expected):
    assert lora.scale(spec, Q) == expected


@pytest.mark.parametrize(("targets", "chosen"), [
    ("all", {Q, DOWN}),
    (".*/q", {Q}),
    ("blocks/[^/]+/mlp/.*", {DOWN}),
    ("embed|head", {"embed", "head"}),
    ("embed|.*/down", {"embed", DOWN}),
])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_targets_choose_layers_by_address_a_tied_output_layer_too(targets, chosen, tied):
    assert set(lora.targets(base(tied=tied), LoRA(targets=targets))) == chosen


def test_a_score_trains_whole_and_takes_no_adapter():
    params = {**base(tied=True), "score": {"kernel": np.zeros((8, 1), np.float32)}}
    assert lora.targets(params, LoRA(targets=".*")) == [Q, DOWN, "embed"]
    with pytest.raises(ValueError, match="targets 'score|head' matches no layer; there are blocks/0-2/attn/q"):
        lora.targets(params, LoRA(targets="score|head"))


def test_targets_that_match_nothing_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"targets 'q_proj' matches no layer; there are blocks/0-2/attn/q, .*head"):
        lora.targets(base(), LoRA(targets="q_proj"))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_layer_is_refused(name):
    spec = LoRA(targets=".*/q", **{name: {".*/q": 2, ".*/down": 4}})
    with pytest.raises(ValueError, match=rf"tuning.lora.{name} '\.\*/down' matches none of blocks/0-2/attn/q"):
        lora.targets(base(), spec)


def test_the_matrix_of_a_layer_is_turned_from_input_to_output():
    params = base()
    assert lora.matrix(params, Q) is params["blocks"]["0-2"]["attn"]["q"]["kernel"]
    assert lora.matrix(params, "embed") is params["embed"]["table"]
    np.testing.assert_array_equal(lora.matrix(params, "head"), params["head"]["table"].T)
    np.testing.assert_array_equal(lora.matrix(base(tied=True), "head"), params["embed"]["table"].T)
    with pytest.raises(ValueError, match="adapter at blocks/0-2/attn/k has no kernel"):
        lora.matrix(params, "blocks/0-2/attn/k")


def test_sharding_rules_of_an_adapter_follow_those_of_the_weights():
    kernels = ("x/(q|k)/kernel", P(None, "fsdp", "tensor"))
    found = lora.rules((kernels, ("x/q/bias", P(None, "tensor")), ("(embed|head)/table", P("tensor", "fsdp"))))
    assert found == (
        ("x/(q|k)/a0?", P(None, "fsdp", None)),
        ("x/(q|k)/b0?", P(None, None, "tensor")),
        ("x/(q|k)/m", P(None, "tensor")),
        ("x/(q|k)/scale", P(None)),
        ("embed/a0?", P("tensor", None)),
        ("embed/b0?", P(None, "fsdp")),
        ("embed/m", P("fsdp")),
        ("embed/scale", P()),
        ("head/a0?", P("fsdp", None)),
        ("head/b0?", P(None, "tensor")),
        ("head/m", P("tensor")),
        ("head/scale", P()),
    )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_rules_of_every_family_cover_every_adapter(family):
    mesh, spec = sharding.mesh(2, 2, 2), LoRA(rank=2, init="pissa", dora=True, targets=f"embed|head|{lora.ALL}")
    for tied in (False, True):
        adapter = jax.eval_shape(functools.partial(lora.init, spec=spec), jax.random.key(0), base(tied=tied))
        placed = sharding.shardings(adapter, lora.rules(models.FAMILIES[family].rules), mesh)
        assert tree.flat(placed).keys() == tree.flat(adapter).keys()
        q, down = placed["blocks"]["0-2"]["attn"]["q"], placed["blocks"]["0-2"]["mlp"]["down"]
        assert q["a"].spec == q["a0"].spec == P(None, "fsdp", None)
        assert down["b"].spec == down["b0"].spec == P(None, None, "fsdp")
        assert q["m"].spec == P(None, "tensor")
