import errno
import json
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsft.hub import CheckpointError, files, resolve
from jaxsft.hub.files import INDEX, SINGLE, Reader, Tensor, copy_companions, read_json, write

ARRAYS = {f"w{i}": np.arange(100, dtype=np.float32) + i for i in range(5)}  # 400 bytes each


def tensors(arrays=ARRAYS):
    return [Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()]


def named(folder):
    """The files of a folder that have a final name."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".part"))


@pytest.fixture
def sharded(tmp_path):
    """A folder of three shards."""
    write(tmp_path, tensors(), shard_gb=800e-9)
    return tmp_path


def test_what_is_written_is_read_again_whole_and_in_slices(tmp_path):
    (file,) = write(tmp_path, tensors(), shard_gb=1.0)
    assert named(tmp_path) == [file.name] == [SINGLE]
    reader = Reader(tmp_path)
    assert list(reader.files) == sorted(ARRAYS)
    for name, x in ARRAYS.items():
        assert (reader.shape(name), reader.dtype(name)) == (x.shape, x.dtype)
        np.testing.assert_array_equal(reader.read(name), x)
        np.testing.assert_array_equal(reader.read(name, (slice(10, 20),)), x[10:20])


def test_shards_hold_at_most_the_limit_and_the_index_says_where_each_tensor_is(sharded):
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in ARRAYS.values())
    shards = {name: load_file(sharded / name) for name in set(index["weight_map"].values())}
    assert sorted(shards) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(sum(x.nbytes for x in shard.values()) <= 800 for shard in shards.values())
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(Reader(sharded).read(name), x)


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path):
    assert len(write(tmp_path, tensors(), shard_gb=1e-9)) == len(ARRAYS)


def test_writing_again_leaves_nothing_of_the_former_weights(sharded):
    write(sharded, tensors({"other": np.zeros(3)}), shard_gb=1.0)
    assert named(sharded) == [SINGLE]
    write(sharded, tensors(), shard_gb=800e-9)
    assert named(sharded) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]


def test_tensors_are_made_one_shard_at_a_time(tmp_path, monkeypatch):
    made, sizes = [], []
    real = files.save_file
    monkeypatch.setattr(files, "save_file", lambda *a, **k: (sizes.append(len(made)), real(*a, **k)))
    make = lambda name, x: made.append(name) or x
    write(
        tmp_path, [Tensor(n, x.shape, x.dtype, lambda n=n, x=x: make(n, x)) for n, x in ARRAYS.items()], shard_gb=8e-7
    )
    assert sizes == [2, 4, 5]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_checkpoint_error_and_leaves_no_file_under_a_final_name(tmp_path):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"big": np.zeros(50_000, np.float32)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, former[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*; free some space or choose another folder"):
            write(tmp_path, tensors(big), shard_gb=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert named(tmp_path) == []


def test_a_disk_that_fills_between_two_shards_leaves_a_folder_that_is_not_taken_for_whole(tmp_path, monkeypatch):
    real, calls = files.save_file, []
    monkeypatch.setattr(files, "save_file", lambda *a, **k: (calls.append(1), full() if calls[1:] else real(*a, **k)))
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, tensors(), shard_gb=8e-7)
    with pytest.raises(CheckpointError, match="has neither"):
        Reader(tmp_path)


def test_an_index_that_does_not_fit_is_not_left_half_written(tmp_path):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = {f"w{i:03}": np.zeros(2, np.float32) for i in range(100)}  # shards of some hundred bytes, a larger index
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, former[1]))
    try:
        with pytest.raises(CheckpointError, match="free some space"):
            write(tmp_path, tensors(many), shard_gb=1e-9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert INDEX not in named(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write(tmp_path / "file" / "out", tensors(), shard_gb=1.0)


@pytest.mark.parametrize("keep", [0, 4, 100, 1000])
def test_a_truncated_file_is_named_with_its_size(tmp_path, keep):
    write(tmp_path, tensors(), shard_gb=1.0)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=rf"model.safetensors \({keep:,} bytes\) is truncated or corrupt .*again"):
        Reader(tmp_path)


def test_a_file_of_garbage_is_refused(tmp_path):
    (tmp_path / SINGLE).write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        Reader(tmp_path)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing, though model.safetensors"):
        Reader(sharded)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(sharded):
    save_file({"w2": ARRAYS["w2"]}, sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors lacks 'w3', which model.safetensors"):
        Reader(sharded)


def test_a_folder_without_weights_lists_what_it_has(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"\(found: pytorch_model.bin\); only safetensors are read"):
        Reader(tmp_path)


def test_a_dtype_that_is_not_supported_is_named(tmp_path):
    save_file({"w": np.zeros(3, np.int8)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="'w' in .* has dtype I8; float32, float16 and bfloat16 are supported"):
        Reader(tmp_path).dtype("w")


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not valid JSON"),
    ("[1]", "holds a list; a JSON object was expected"),
    ("\xff", "is not valid JSON"),
])  # fmt: skip
def test_json_that_is_no_object_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json; is it a Hugging Face checkpoint folder\?"):
        read_json(tmp_path / "config.json")


def test_a_wrong_folder_names_the_nearest_one(tmp_path):
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(CheckpointError, match="no model folder '.*/quikstart'; .* has 'quickstart'; give a folder"):
        resolve(str(tmp_path / "quikstart"))
    assert resolve(str(tmp_path / "quickstart")) == tmp_path / "quickstart"


@pytest.mark.parametrize("path", ["", "./x", "/no/such/place", "a/b/c", "~/model"])
def test_what_can_be_no_hub_name_is_not_asked_of_the_hub(path):
    with pytest.raises(CheckpointError, match="no model folder '.*; give a folder with config.json, or a hub name"):
        resolve(path)


def test_a_hub_name_without_a_network_says_what_to_check():
    with pytest.raises(CheckpointError, match="'org/no-such-model' is no local folder, and the hub did not give it"):
        resolve("org/no-such-model")


@pytest.mark.parametrize("has", [["config.json", SINGLE, "flax_model.msgpack"], ["config.json", "flax_model.msgpack"]])
def test_msgpack_is_fetched_only_where_there_are_no_safetensors(tmp_path, monkeypatch, has):
    def download(name, allow_patterns):
        for file in has:
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (tmp_path / file).write_text(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name") == tmp_path
    assert named(tmp_path) == sorted(["config.json", SINGLE if SINGLE in has else "flax_model.msgpack"])


def test_companions_are_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    wanted = ["generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
    wanted += ["merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    wanted += [
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    ]
    for name in [*wanted, "config.json", "model.safetensors", "training_args.bin", "README.md"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    copy_companions(source, target)
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == sorted(wanted)
    assert all((target / name).read_text() == name for name in wanted)
    copy_companions(target, target)  # onto itself: nothing to do
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
