import jax
import numpy as np
import pytest

from jaxsft import hub, lora
from jaxsft.run import RunError


def test_either_an_adapter_or_a_checkpoint(run_here, small, tmp_path):
    for more in ([], ["--adapter", "a", "--checkpoint", "c"]):
        with pytest.raises(RunError, match="either adapter .* or checkpoint"):
            run_here("merge", "--base", small, "--out", str(tmp_path), *more)


def test_a_folder_that_is_no_checkpoint(run_here, tmp_path):
    with pytest.raises(RunError, match=r"is no checkpoint; give RUN/checkpoints/STEP"):
        run_here("merge", "--checkpoint", str(tmp_path / "9"), "--out", str(tmp_path / "out"))


def test_a_folder_that_is_no_adapter(run_here, small, tmp_path):
    with pytest.raises(hub.CheckpointError, match=r"no adapter folder .*adapter_config.json"):
        run_here("merge", "--base", small, "--adapter", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """Adapter folders on the small base, one of them with a norm that trained too, and their trees."""
    (family, _), params, found = hub.read_config(hub.resolve(small)), hub.on_disk(small), {}
    for number, name in enumerate(("one", "two", "norm", "dora")):
        spec = lora.LoRA(rank=2 + number, alpha=3.0, dora=name == "dora", targets=".*/(q|down)|embed")
        low = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), lora.init(jax.random.key(number), params, spec))
        trained = {"norm": {"scale": np.full(32, 2, np.float32)}} if name == "norm" else {}
        folder = str(tmp_path_factory.mktemp(name))
        hub.export_adapter(folder, low, spec, trained=trained, family=family, base=small)
        found[name] = folder, low
    return found


def test_several_adapters_merge_as_their_weighted_sum(run_here, small, folders, tmp_path):
    (one, low), (two, other) = folders["one"], folders["two"]
    run_here(
        "merge", "--base", small, "--adapter", f"[{one}, {two}]", "--weights", "[0.75, -0.5]", "--out", str(tmp_path)
    )
    params, merged = hub.on_disk(small), hub.on_disk(str(tmp_path))
    for layer in lora.layers(low):
        kernel, total = np.asarray(lora.matrix(params, layer)), 0
        for tree_, weight in ((low, 0.75), (other, -0.5)):
            total = total + weight * (lora.adapted(kernel, lora.layers(tree_)[layer]) - kernel)
        np.testing.assert_allclose(lora.matrix(merged, layer), kernel + total, atol=1e-5, err_msg=layer)


def test_one_adapter_may_have_a_weight_too(run_here, small, folders, tmp_path):
    run_here("merge", "--base", small, "--adapter", folders["one"][0], "--weights", "[0.0]", "--out", str(tmp_path))
    params, merged = hub.on_disk(small), hub.on_disk(str(tmp_path))
    q = lambda tree_: np.asarray(tree_["blocks"]["0-1"]["attn"]["q"]["kernel"])
    np.testing.assert_array_equal(q(merged), q(params))


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["one", "two"], "[]", "there are 2 adapters and 0 weights; give a weight for each"),
        (["one", "two"], "[1.0]", "there are 2 adapters and 1 weights"),
        (["one", "norm"], "[1.0, 1.0]", "norm.* holds whole weights .modules_to_save., which do not add up"),
        (["dora", "one"], "[1.0, 1.0]", "is a DoRA, whose change is no sum"),
    ],
)
def test_adapters_that_do_not_add_up_are_refused(run_here, small, folders, tmp_path, names, weights, message):
    given = ", ".join(folders[name][0] for name in names)
    with pytest.raises((ValueError, RunError), match=message):
        run_here("merge", "--base", small, "--adapter", f"[{given}]", "--weights", weights, "--out", str(tmp_path))


def test_a_checkpoint_has_no_weights(run_here, tmp_path):
    with pytest.raises(RunError, match="weights are those of several adapters"):
        run_here("merge", "--checkpoint", str(tmp_path), "--weights", "[1.0]", "--out", str(tmp_path / "out"))


def test_the_adapter_of_a_reward_model_merges_into_one(run_here, small, tmp_path):
    (family, _), params, spec = hub.read_config(hub.resolve(small)), hub.on_disk(small), lora.LoRA(rank=2)
    low, kernel = lora.init(jax.random.key(0), params, spec), np.full((32, 1), 0.5, np.float32)
    given = {"trained": {"score": {"kernel": kernel}}, "family": family, "base": small}
    hub.export_adapter(str(tmp_path / "adapter"), low, spec, **given)
    run_here("merge", "--base", small, "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged"))
    model, merged = hub.load(str(tmp_path / "merged"))
    assert model.config.labels == 1
    np.testing.assert_array_equal(merged["score"]["kernel"], kernel)
    assert hub.load_tokenizer(str(tmp_path / "merged")).pad_token_id == 0


def test_a_norm_that_trained_beside_an_adapter_is_merged_with_it(run_here, small, folders, tmp_path):
    run_here("merge", "--base", small, "--adapter", folders["norm"][0], "--out", str(tmp_path))
    np.testing.assert_array_equal(hub.on_disk(str(tmp_path))["norm"]["scale"], np.full(32, 2))
