"""Exported and merged checkpoints are what transformers reads; adapters are what PEFT reads and writes."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from jaxsft import hub, lora, models
from jaxsft.hub.files import Reader
from jaxsft.lora import LoRA

from .pairs import CASES, documents, load_torch, ours, random_adapter, theirs, torch

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
every = pytest.mark.parametrize("pair", CASES, indirect=True)
# A family each, tied and untied, with and without biases and windows.
some = pytest.mark.parametrize(
    "pair", ["llama-gqa-tied", "llama-biases", "mistral-window", "qwen2-mixed-windows", "qwen3-tied"], indirect=True
)

SHARD = 4e-5  # GB: several shards of even these models
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.stack(documents([24] * 2, seed=4))


def same_weights(left, right) -> None:
    """Bit for bit, and the same names."""
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


def raw(folder) -> dict[str, tuple]:
    """Every tensor of a folder as dtype, shape and bytes."""
    reader = Reader(folder)
    return {n: (reader.dtype(n), reader.shape(n), reader.read(n).tobytes()) for n in reader.files}


def is_tied(model) -> bool:
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


@every
@pytest.mark.parametrize(
    ("dtype", "shard_gb"), [("float32", 5.0), ("bfloat16", SHARD)], ids=["float32-one-file", "bfloat16-shards"]
)
def test_an_export_loads_in_transformers_with_every_weight(pair, dtype, shard_gb, tmp_path, difference):
    files = hub.export(str(tmp_path), pair.params, source=str(pair.folder), shard_gb=shard_gb, dtype=dtype)
    assert (len(files) > 1) == (shard_gb == SHARD)
    back = load_torch(tmp_path)
    wanted = load_torch(pair.folder, dtype)
    same_weights(back, wanted)
    assert is_tied(back) == pair.model.config.tied == ("lm_head.weight" not in Reader(tmp_path).files)
    assert difference(f"logits, export in {dtype}", theirs(back, TOKENS), theirs(wanted, TOKENS)) == 0
    assert back.config.to_dict() | {"dtype": 0, "_name_or_path": 0} == pair.theirs.config.to_dict() | {
        "dtype": 0,
        "_name_or_path": 0,
    }


@some
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_untouched_merge_is_the_base_byte_for_byte(pair, dtype, tmp_path):
    base = tmp_path / "base"
    pair.fresh().to(getattr(torch, dtype)).save_pretrained(base, max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    hub.merge(str(base), str(tmp_path / "one"))
    hub.merge(str(base), str(tmp_path / "many"), shard_gb=SHARD)
    assert raw(tmp_path / "one") == raw(tmp_path / "many") == raw(base)
    same_weights(load_torch(tmp_path / "many"), load_torch(base))


@some
def test_a_merge_of_trained_weights_is_the_export_of_them(pair, tmp_path):
    new = jax.tree.map(lambda x: 1.25 * x + 0.01, pair.params)
    hub.export(str(tmp_path / "export"), new, source=str(pair.folder))
    hub.merge(str(pair.folder), str(tmp_path / "merge"), trained=new)
    left, right = load_torch(tmp_path / "export"), load_torch(tmp_path / "merge")
    same_weights(left, right)
    assert is_tied(left) == is_tied(right) == pair.model.config.tied


# --- adapters ---


def in_peft(pair, spec: LoRA) -> LoRA:
    """What PEFT can hold of an adapter.

    With transformers 5 it takes the adapters of experts through a conversion that doubles rank and alpha of gate and
    up, which rsLoRA's root does not stand; that takes every gate_proj of a Qwen mixture, also those of plain MLPs, for
    an expert's; and that has no word for gpt-oss.
    """
    moe = pair.model.config.moe
    fits = moe is None or (pair.name.startswith("mixtral") and not spec.rslora)
    return spec if fits else dataclasses.replace(spec, targets=".*/attn/.*")


def our_adapter(pair, spec: LoRA):
    """A and B of a size that moves the logits by about as much as they are."""
    fresh = lora.init(jax.random.key(1), pair.params, spec)
    return random_adapter(jax.random.key(2), fresh, 0.15)


def export_ours(pair, adapter, spec: LoRA, folder) -> None:
    hub.export_adapter(str(folder), adapter, spec, family=pair.family, base=str(pair.folder))


def with_peft(pair, folder):
    """The base with an adapter folder on it, every key of which must fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(pair.fresh(), str(folder))
    assert not [w for w in caught if "adapter keys" in str(w.message)]  # missing or unexpected
    return model.eval()


@every
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_our_adapter_gives_the_same_logits_in_peft(pair, rslora, tmp_path, difference):
    spec = in_peft(pair, LoRA(rank=4, alpha=6.0, rslora=rslora))
    adapter = our_adapter(pair, spec)
    export_ours(pair, adapter, spec, tmp_path)
    expected = theirs(with_peft(pair, tmp_path), TOKENS)
    assert np.abs(expected - theirs(pair.theirs, TOKENS)).max() > 0.5
    got = ours(pair.model, {"params": pair.params, "lora": adapter}, TOKENS)
    assert difference("logits, our adapter in PEFT", got, expected) < 1e-4


@some
def test_our_adapter_on_some_targets_of_one_stack_gives_the_same_logits_in_peft(pair, tmp_path, difference):
    spec = LoRA(rank=3, alpha=5.0, targets=".*/1-[0-9]+/(attn/(q|v)|mlp/down)")
    params = models.split(pair.params, 1)
    fresh = lora.init(jax.random.key(1), params, spec)
    adapter = random_adapter(jax.random.key(2), fresh, 0.3)
    export_ours(pair, adapter, spec, tmp_path)
    expected = theirs(with_peft(pair, tmp_path), TOKENS)
    got = ours(pair.model, {"params": params, "lora": adapter}, TOKENS)
    assert difference("logits, our adapter on some layers in PEFT", got, expected) < 1e-4


PEFT_OPTIONS = {
    "all-seven": {"target_modules": SEVEN},
    "q-v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "some-layers": {"target_modules": SEVEN, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "regex": {"target_modules": r".*layers\.[12]\.mlp\.(up|down)_proj"},
    "rslora": {"target_modules": SEVEN, "use_rslora": True},
}


def their_adapter(pair, options, folder):
    """An adapter that PEFT made, with random A and B, saved by PEFT."""
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    model = peft.get_peft_model(pair.fresh(), config).eval()
    model.save_pretrained(str(folder))
    return model


@some
@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_an_adapter_of_peft_gives_the_same_logits_here(pair, options, tmp_path, difference):
    model = their_adapter(pair, PEFT_OPTIONS[options], tmp_path)
    expected = theirs(model, TOKENS)
    assert np.abs(expected - theirs(pair.theirs, TOKENS)).max() > 0.1
    adapter, spec, _ = hub.load_adapter(str(tmp_path), pair.params, family=pair.family, config=pair.model.config)
    assert (spec.rank, spec.alpha, spec.dropout, spec.rslora) == (4, 6.0, 0.1, options == "rslora")
    got = ours(pair.model, {"params": pair.params, "lora": adapter}, TOKENS)
    assert difference("logits, PEFT's adapter here", got, expected) < 1e-4


@some
def test_an_adapter_goes_through_both_formats_and_back(pair, tmp_path):
    spec = LoRA(rank=4, alpha=6.0, rslora=True)
    adapter = our_adapter(pair, spec)
    export_ours(pair, adapter, spec, tmp_path / "ours")
    with_peft(pair, tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    back, read, _ = hub.load_adapter(
        str(tmp_path / "theirs"), pair.params, family=pair.family, config=pair.model.config
    )
    assert read == LoRA(rank=4, alpha=6.0, rslora=True)
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), back, adapter)))


@every
def test_a_merged_checkpoint_answers_as_base_and_adapter_and_as_pefts_merge(pair, tmp_path, difference):
    spec = in_peft(pair, LoRA(rank=4, alpha=6.0))
    adapter = our_adapter(pair, spec)
    export_ours(pair, adapter, spec, tmp_path / "adapter")
    hub.merge(str(pair.folder), str(tmp_path / "merged"), adapter=adapter)
    merged = load_torch(tmp_path / "merged")
    got = theirs(merged, TOKENS)
    base = theirs(pair.theirs, TOKENS)
    size = np.abs(got).max()
    assert np.abs(got - base).max() > 0.1 * size  # the adapter is no whisper
    apart = ours(pair.model, {"params": pair.params, "lora": adapter}, TOKENS)
    assert difference("logits, merged against adapter, relative", got, apart, relative=True) < 1e-5

    peft_merged = with_peft(pair, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert difference("weights, our merge against PEFT's", weight, peft_merged[name]) < 1e-6
    folded = lora.merge({"params": pair.params, "lora": adapter})
    inside = ours(pair.model, {"params": folded}, TOKENS)
    assert difference("logits, lora.merge against hub.merge", inside, got) < 1e-4
    assert is_tied(merged) == pair.model.config.tied


@some
def test_a_bfloat16_merge_is_the_float32_sum_rounded_once(pair, tmp_path):
    base = tmp_path / "base"
    pair.fresh().to(torch.bfloat16).save_pretrained(base)
    spec = LoRA(rank=4, alpha=6.0)
    adapter = our_adapter(pair, spec)
    export_ours(pair, adapter, spec, tmp_path / "adapter")
    hub.merge(str(base), str(tmp_path / "merged"), adapter=adapter)
    full = peft.PeftModel.from_pretrained(load_torch(base).float(), str(tmp_path / "adapter")).merge_and_unload()
    differ = total = 0
    for name, weight in load_torch(tmp_path / "merged").state_dict().items():
        assert weight.dtype == torch.bfloat16
        wanted = full.state_dict()[name].to(torch.bfloat16)
        torch.testing.assert_close(weight, wanted, rtol=2**-7, atol=1e-6)  # one step of bfloat16
        differ, total = differ + (weight != wanted).sum().item(), total + weight.numel()
    assert differ < 1e-3 * total  # ties in the last float32 bit only
