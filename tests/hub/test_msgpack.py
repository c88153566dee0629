"""Files of transformers' Flax models, written here by hand: nothing of Flax is asked."""

import json
import shutil
import sys

import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsft import hub, tree
from jaxsft.hub import CheckpointError
from jaxsft.hub import msgpack as flax
from jaxsft.hub.files import SINGLE

# How the modules of FlaxBertForMaskedLM, FlaxRobertaForMaskedLM and FlaxLlamaForCausalLM call their last parts.
NORMS = ("LayerNorm", "layer_norm")
EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "embed_tokens")


def array(x) -> msgpack.ExtType:
    """Flax's extension type 1: shape, name of the dtype, bytes in C order."""
    return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes()), use_bin_type=True))


def to_flax(raw) -> dict:
    """The nested parameters of a Flax model from PyTorch's tensors, by the names of its modules."""
    params: dict = {}
    for name, x in raw.items():
        *modules, last = name.split(".")
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        if last == "weight" and modules[-1] in NORMS:
            node["scale"] = x
        elif last == "weight" and modules[-1] in EMBEDDINGS:
            node["embedding"] = x
        elif last == "weight" and x.ndim == 2:
            node["kernel"] = np.ascontiguousarray(x.T)
        else:
            node[last] = x  # biases, and the norms of FlaxLlama, whose scale is called weight
    return params


def packed(params) -> bytes:
    pack = lambda node: {key: pack(value) for key, value in node.items()} if isinstance(node, dict) else node
    return msgpack.packb(pack(params), default=array, strict_types=True)


def chunked(x, size: int) -> dict:
    flat = x.reshape(-1)
    chunks = [flat[i : i + size] for i in range(0, flat.size, size)]
    numbered = lambda values: {str(i): value for i, value in enumerate(values)}
    return {"__msgpack_chunked_array__": True, "shape": numbered(x.shape), "chunks": numbered(chunks)}


def converted(folder, tmp_path):
    """(a folder with the Flax file in the safetensors' place, the tensors)."""
    other = shutil.copytree(folder, tmp_path / "flax")
    raw = load_file(folder / SINGLE)
    (other / SINGLE).unlink()
    (other / flax.SINGLE).write_bytes(packed(to_flax(raw)))
    return other, raw


def same(left, right):
    left, right = tree.flat(left), tree.flat(right)
    assert set(left) == set(right)
    for path, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[path], err_msg=path, strict=True)


CASES = {
    "llama": {},
    "mistral": {"dtype": "bfloat16"},
    "gemma": {"tied": True},
    "bert": {},
    "bert-base": {"architectures": ["BertModel"], "dtype": "float16"},
    "bert-pretraining": {"architectures": ["BertForPreTraining"]},
    "roberta": {},
}


@pytest.mark.parametrize("case", CASES)
def test_a_flax_checkpoint_loads_as_its_safetensors_do_and_merges_into_them(tiny, tmp_path, case):
    folder = tiny(case.split("-")[0], num_hidden_layers=2, **CASES[case])
    old, raw = converted(folder, tmp_path)
    params = to_flax(raw)
    if case == "bert":
        assert set(params["cls"]["predictions"]) == {"transform", "bias"}
        assert set(params["bert"]["embeddings"]["LayerNorm"]) == {"scale", "bias"}
        assert set(params["bert"]["encoder"]["layer"]["1"]["attention"]["self"]["query"]) == {"kernel", "bias"}
    if case == "llama":
        assert set(params["model"]["layers"]["1"]["self_attn"]["q_proj"]) == {"kernel"}
        assert set(params["model"]["norm"]) == {"weight"}
        assert params["lm_head"]["kernel"].shape == (32, 96)
    same(hub.load(str(old))[1], hub.load(str(folder))[1])
    hub.merge(str(old), str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged" / SINGLE)
    assert set(merged) == set(raw)
    for name, x in raw.items():
        np.testing.assert_array_equal(merged[name], x, err_msg=name, strict=True)


def test_a_conv1d_kernel_is_the_transpose_of_pytorchs_as_every_other(tmp_path):
    """FlaxGPT2's Conv1D keeps its kernel [out, in]; PyTorch's Conv1D its weight [in, out]."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    params = {"transformer": {"h": {"0": {"attn": {"c_attn": {"kernel": weight.T.copy(), "bias": weight[0]}}}}}}
    (tmp_path / flax.SINGLE).write_bytes(packed(params))
    reader = flax.Reader(tmp_path)
    assert reader.shape("transformer.h.0.attn.c_attn.weight") == (2, 3)
    np.testing.assert_array_equal(reader.read("transformer.h.0.attn.c_attn.weight"), weight)
    assert set(reader.files) == {f"transformer.h.0.attn.c_attn.{part}" for part in ("weight", "bias")}


def test_shards_with_an_index_read_as_one_file_does(tiny, tmp_path):
    folder = tiny("bert", num_hidden_layers=2)
    old, raw = converted(folder, tmp_path)
    (old / flax.SINGLE).unlink()
    flat = tree.flat(to_flax(raw))
    names, index = [f"flax_model-0000{i}-of-00003.msgpack" for i in (1, 2, 3)], {}
    for number, file in enumerate(names):
        own = dict(list(flat.items())[number::3])
        (old / file).write_bytes(packed(tree.nest(own)))
        index |= dict.fromkeys(own, file)
    (old / flax.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    same(hub.load(str(old))[1], hub.load(str(folder))[1])
    (old / names[1]).unlink()
    with pytest.raises(CheckpointError, match=r"flax_model-00002-of-00003.msgpack is missing, though flax_model.msg"):
        hub.load(str(old))


@pytest.mark.parametrize("size", [7, 20, 1000])
def test_an_array_in_chunks_is_put_together(tmp_path, size):
    x = np.arange(60, dtype=np.float32).reshape(6, 10)
    (tmp_path / flax.SINGLE).write_bytes(packed({"a": {"kernel": chunked(x, size)}, "b": {"embedding": x}}))
    reader = flax.Reader(tmp_path)
    np.testing.assert_array_equal(reader.read("a.weight"), x.T)
    np.testing.assert_array_equal(reader.read("a.weight", (slice(2, 5), slice(1, 3))), x.T[2:5, 1:3])
    np.testing.assert_array_equal(reader.read("b.weight", (slice(2, 5), slice(1, 3))), x[2:5, 1:3])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_of_every_dtype_scalars_and_empty_arrays_come_back(tmp_path, dtype):
    params = {"params": {"a": {"bias": np.arange(5).astype(dtype), "kernel": np.zeros((0, 3), dtype)}}}
    scalar = msgpack.ExtType(3, msgpack.packb(((), np.dtype(dtype).name, dtype(2.5).tobytes()), use_bin_type=True))
    file = packed(params | {"params": params["params"] | {"scale": scalar}})
    (tmp_path / flax.SINGLE).write_bytes(file)
    reader = flax.Reader(tmp_path)
    assert list(reader.files) == ["a.bias", "a.weight", "weight"]
    np.testing.assert_array_equal(reader.read("a.bias"), np.arange(5).astype(dtype), strict=True)
    assert (reader.shape("a.weight"), reader.read("a.weight").shape) == ((3, 0), (3, 0))
    assert (reader.dtype("weight"), reader.shape("weight"), reader.read("weight")) == (np.dtype(dtype), (), 2.5)


def test_numbers_are_read_when_they_are_asked_for_and_safetensors_come_first(tiny, tmp_path):
    folder = tiny("bert", num_hidden_layers=1)
    (folder / flax.SINGLE).write_bytes(b"no msgpack at all")
    hub.load(str(folder))
    x = np.ones(8, np.float32)
    (tmp_path / flax.SINGLE).write_bytes(packed({"bias": x}))
    reader = flax.Reader(tmp_path)
    (tmp_path / flax.SINGLE).write_bytes(packed({"bias": 3 * x}))
    np.testing.assert_array_equal(reader.read("bias"), 3 * x)


@pytest.mark.parametrize("keep", [0, 1, 40, 1000, -1, -100])
def test_a_truncated_file_is_named_with_its_size(tiny, tmp_path, keep):
    old, _ = converted(tiny("bert", num_hidden_layers=1), tmp_path)
    data = (old / flax.SINGLE).read_bytes()[:keep]
    (old / flax.SINGLE).write_bytes(data)
    with pytest.raises(
        CheckpointError, match=rf"flax_model.msgpack \({len(data):,} bytes\) is truncated or corrupt .*; do"
    ):
        hub.load(str(old))


def ext(code, *parts):
    return msgpack.ExtType(code, msgpack.packb(parts, use_bin_type=True))


ONE = np.ones(2, np.float32).tobytes()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))}, "value of extension type 2; only arrays"),
        ({"a": msgpack.ExtType(42, b"cos\nsystem")}, "value of extension type 42; only arrays"),
        ({"a": {"step": 3}}, "holds int at a/step; arrays were expected"),
        ({"a": [np.ones(2, np.float32)]}, "holds list at a; arrays were expected"),
        (
            {"a": ext(1, (3,), "float32", ONE)},
            r"truncated or corrupt \(an array of shape \(3,\) and dtype float32 has 8",
        ),
        ({"a": ext(1, (-2, -1), "float32", ONE)}, "truncated or corrupt"),
        ({"a": ext(1, (1,), "object", ONE)}, "truncated or corrupt"),
        ({"a": ext(1, (2,), "float99", ONE)}, "truncated or corrupt"),
        ({"a": ext(1, (2,), "float32")}, "truncated or corrupt"),
        ({"a": chunked(np.ones(4, np.float32), 2) | {"shape": {"0": 5}}}, "pieces of an array do not fill its shape"),
        ({"a": chunked(np.ones(4, np.float32), 2) | {"chunks": {"1": 1}}}, "truncated or corrupt"),
    ],
)
def test_what_is_no_array_is_refused(tmp_path, params, message):
    (tmp_path / flax.SINGLE).write_bytes(packed(params))
    with pytest.raises(CheckpointError, match=message):
        flax.Reader(tmp_path)


@pytest.mark.parametrize(
    "data", [b"\x93\x01\x02\x03", bytes(range(256)) * 4, b"\x80\x80", b"\x81" * 3000, b"\x81\xc4\x01a\xc0"]
)
def test_garbage_is_refused(tmp_path, data):
    (tmp_path / flax.SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or corrupt|arrays were expected"):
        flax.Reader(tmp_path)


def test_numbers_that_are_not_finite_or_not_floats_are_refused(tiny, tmp_path):
    old, raw = converted(tiny("bert", num_hidden_layers=1), tmp_path)
    write = lambda change: (old / flax.SINGLE).write_bytes(packed(to_flax(raw | change)))
    write({"bert.embeddings.LayerNorm.bias": np.full(32, np.nan, np.float32)})
    with pytest.raises(
        CheckpointError, match="flax holds NaN or infinite numbers in embed/norm/bias; download or export"
    ):
        hub.load(str(old))
    write({"bert.embeddings.LayerNorm.bias": np.zeros(32, np.int32)})
    with pytest.raises(
        CheckpointError, match="'bert.embeddings.LayerNorm.bias' in .* has dtype int32; float32, float16"
    ):
        hub.load(str(old))


def test_neither_flax_nor_pickle_is_asked(tiny, tmp_path, monkeypatch):
    old, _ = converted(tiny("bert", num_hidden_layers=1), tmp_path)
    for module in ("flax.serialization", "pickle"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(flax.Reader(old).files) == 26


def test_an_export_from_a_flax_checkpoint_has_its_names(tiny, tmp_path):
    old, raw = converted(tiny("bert", num_hidden_layers=1, architectures=["BertModel"]), tmp_path)
    params = hub.load(str(old))[1]
    hub.export(str(tmp_path / "out"), params, source=str(old))
    assert set(load_file(tmp_path / "out" / SINGLE)) == set(raw)


def test_flaxs_own_bytes_are_read(tmp_path):
    """The same by the library that wrote such files."""
    from flax import serialization

    params = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}}
    (tmp_path / flax.SINGLE).write_bytes(serialization.to_bytes(params))
    reader = flax.Reader(tmp_path)
    np.testing.assert_array_equal(reader.read("layer.weight"), np.arange(6.0).reshape(2, 3).T)
    assert reader.read("layer.bias").dtype == ml_dtypes.bfloat16


def test_a_folder_with_both_merges_its_safetensors(tiny, tmp_path):
    folder = tiny("bert", num_hidden_layers=1)
    raw = load_file(folder / SINGLE)
    (folder / flax.SINGLE).write_bytes(packed(to_flax({name: 0 * x for name, x in raw.items()})))
    hub.merge(str(folder), str(tmp_path / "out"))
    merged = load_file(tmp_path / "out" / SINGLE)
    assert all(np.array_equal(merged[name], x) for name, x in raw.items())
    assert not (tmp_path / "out" / flax.SINGLE).exists()
