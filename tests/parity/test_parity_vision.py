"""Models of images give transformers' hidden states and scores at any size, and leave what it and PEFT read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, lora, tree
from jaxsft.lora import LoRA

from . import images
from .images import BARE, CASES, HEADED, hidden, ours, pixels, their_hidden, theirs, torch, transformers

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
SIZES = [(64, 64), (40, 40), (42, 70)]  # beside that of a tower's positions


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """name -> Pair, each made once."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = images.make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def picture(request, pictures):
    return pictures(request.param)


every = pytest.mark.parametrize("picture", CASES, indirect=True)
headed = pytest.mark.parametrize("picture", HEADED, indirect=True)


def loaded(folder):
    """What transformers makes of a folder, which must be complete."""
    kind = transformers.AutoModelForImageClassification
    model, info = kind.from_pretrained(str(folder), output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def native(pair) -> tuple[int, int]:
    return (pair.model.config.image_size,) * 2 if pair.model.config.layers else (32, 32)


# ---- what it computes -----------------------------------------------------------------------------------------------


@every
def test_hidden_states_are_those_of_torch_at_any_size(picture, difference):
    variables = {"params": picture.params}
    for size in (native(picture), *SIZES[:1]) if picture.name in BARE else (native(picture), *SIZES):
        expected = their_hidden(picture.theirs, pixels(*size))
        assert expected.std() > 0.2  # else an absolute tolerance would say nothing
        what = "images, hidden states" + ("" if size == native(picture) else ", interpolated")
        assert difference(what, hidden(picture.model, variables, pixels(*size)), expected) < 1e-4


@headed
def test_scores_are_those_of_torch_at_any_size(picture, difference):
    for size in (native(picture), SIZES[2]):
        expected = theirs(picture.theirs, pixels(*size))
        got = ours(picture.model, {"params": picture.params}, pixels(*size))
        assert difference("images, scores", got, expected) < 1e-4


# ---- what it leaves -------------------------------------------------------------------------------------------------


@headed
def test_an_export_is_the_same_classifier(picture, tmp_path):
    hub.export(str(tmp_path / "export"), picture.params, source=str(picture.folder))
    hub.merge(str(picture.folder), str(tmp_path / "merge"))
    for folder in (tmp_path / "export", tmp_path / "merge"):
        again = loaded(folder)
        left, right = again.state_dict(), picture.theirs.state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert again.config.id2label == picture.theirs.config.id2label
        assert type(again) is type(picture.theirs)


@every
def test_a_new_classifier_is_read_with_its_names(picture, tmp_path, difference):
    names = [f"class {i}" for i in range(5)]
    model, variables = hub.load_variables(str(picture.folder), labels=5, key=jax.random.key(1))
    assert model.config.labels == 5
    params = variables["params"]
    params["classifier"]["bias"] = jnp.arange(5.0)
    expected = ours(model, {"params": params}, pixels(*native(picture)))
    assert np.ptp(expected) > 1
    trained = {"classifier": params["classifier"]}
    hub.merge(str(picture.folder), str(tmp_path / "merge"), trained=trained, classes=names)
    hub.export(str(tmp_path / "export"), params, source=str(picture.folder), classes=names)
    for folder in (tmp_path / "merge", tmp_path / "export"):
        again = loaded(folder)
        assert [again.config.id2label[i] for i in range(5)] == hub.classes(str(folder)) == names
        assert again.config.label2id == {name: i for i, name in enumerate(names)}
        assert difference("images, new classifier", theirs(again, pixels(*native(picture))), expected) < 1e-5
    back, own = hub.load(str(tmp_path / "merge"))
    np.testing.assert_array_equal(ours(back, {"params": own}, pixels(*native(picture))), expected)


@headed
def test_classes_are_read(picture):
    named = picture.theirs.config.id2label
    assert hub.classes(str(picture.folder)) == [named[i] for i in range(len(named))]


# ---- adapters -------------------------------------------------------------------------------------------------------


TARGETS = {"convnext": ".*/(up|down)", "dinov2-gated": ".*/(q|v|down)"}  # the latter's gate_up is two modules there
ADAPTED = ["vit", "deit", "dinov2", "registers", "clip", "siglip", "convnext"]


def fresh(pair, labels: int | None = None):
    """A copy of the torch model, with a new classifier of so many classes if wanted."""
    if labels is None:
        return transformers.AutoModelForImageClassification.from_pretrained(str(pair.folder)).eval()
    kind = getattr(transformers, pair.family.classifier)
    return kind.from_pretrained(str(pair.folder), num_labels=labels, ignore_mismatched_sizes=True).eval()


@pytest.mark.parametrize("picture", [*ADAPTED, "dinov2-base", "dinov2-gated"], indirect=True)
def test_our_adapter_with_its_classifier_gives_the_same_in_peft_and_merged(picture, tmp_path, difference):
    model, variables = hub.load_variables(str(picture.folder), labels=5, key=jax.random.key(1))
    params, targets = variables["params"], TARGETS.get(picture.name, "all")
    spec = LoRA(rank=3, alpha=6.0, targets=targets)
    low = lora.init(jax.random.key(2), params, spec)
    draw = np.random.default_rng(3)
    low = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32) * (x.ndim > 1), low)
    trained = {"classifier": params["classifier"]}
    expected = ours(model, {"params": params, "lora": low}, pixels(*native(picture)))
    assert np.abs(expected - ours(model, {"params": params}, pixels(*native(picture)))).max() > 1e-3
    given = {"family": picture.family, "base": str(picture.folder), "config": model.config}
    hub.export_adapter(str(tmp_path / "adapter"), low, spec, trained=trained, **given)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    theirs_ = peft.PeftModel.from_pretrained(fresh(picture, 5), str(tmp_path / "adapter")).eval()
    assert difference("images, our adapter in PEFT", theirs(theirs_, pixels(*native(picture))), expected) < 1e-5
    hub.merge(str(picture.folder), str(tmp_path / "merged"), adapter=low, trained=trained)
    got = theirs(loaded(tmp_path / "merged"), pixels(*native(picture)))
    assert difference("images, merged against adapter", got, expected) < 1e-5
    again = hub.load_adapter(str(tmp_path / "adapter"), picture.params, family=picture.family, config=model.config)
    for path, leaf in tree.flat(again.lora).items():
        np.testing.assert_allclose(leaf, tree.flat(low)[path], rtol=1e-6, err_msg=path)
    assert tree.flat(again.params).keys() == {"classifier/kernel", "classifier/bias"}


@pytest.mark.parametrize("picture", ["dinov2-gated"], indirect=True)
def test_an_adapter_of_a_kernel_that_is_two_modules_in_transformers_is_refused(picture, tmp_path):
    spec = LoRA(rank=2, targets=".*/gate_up")
    low = lora.init(jax.random.key(2), picture.params, spec)
    given = {"family": picture.family, "base": str(picture.folder), "config": picture.model.config}
    with pytest.raises(hub.CheckpointError, match=r"weights_in\.weight' is two modules in transformers, .* merge it"):
        hub.export_adapter(str(tmp_path), low, spec, **given)


@pytest.mark.parametrize("picture", ADAPTED[:-1], indirect=True)
def test_an_adapter_of_peft_with_its_classifier_gives_the_same_here(picture, tmp_path, difference):
    torch.manual_seed(5)
    target = r".*\blayers?\.\d+\..*\.(q_proj|v_proj|fc1)"
    spec = peft.LoraConfig(
        r=3, lora_alpha=6, init_lora_weights=False, target_modules=target, modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(fresh(picture, 4), spec).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.copy_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(str(tmp_path))
    expected = theirs(model, pixels(*native(picture)))
    found = hub.load_adapter(str(tmp_path), picture.params, family=picture.family, config=picture.model.config)
    assert found.spec.rank == 3
    four, variables = hub.load_variables(str(picture.folder), labels=4, key=jax.random.key(0))
    params = {**variables["params"], **found.params}
    got = ours(four, {"params": params, "lora": found.lora}, pixels(*native(picture)))
    assert np.abs(got - ours(four, {"params": params}, pixels(*native(picture)))).max() > 1e-3
    assert difference("images, PEFT's adapter here", got, expected) < 1e-5
