"""Checkpoint folders: reading and writing safetensors, one tensor at a time.

A reader knows which file holds which tensor and reads slices of it; a writer takes tensors one after the other and
never holds more than one shard of them.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jax.numpy.bfloat16)}
OTHERS = {"F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
DTYPES = FLOATS | {name: np.dtype(kind) for name, kind in OTHERS.items()}  # of buffers, which are copied as they are
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "additional_chat_templates/*",
)
# What a merged model needs beside its weights, copied as it is.
COMPANIONS = (
    *TOKENIZER,
    "generation_config.json",
    "preprocessor_config.json",  # of images
    "modules.json",  # of sentence-transformers, like those below
    "*sentence*.json",
    "[0-9]_*/*",
)


WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # of a repository


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; says which file, what was found, what was expected, what to do."""


def resolve(path: str) -> Path:
    """Finds a checkpoint folder: a local one, or a model of the Hugging Face hub by name, downloaded once.

    Raises:
      CheckpointError: neither exists.
    """
    folder = Path(path)
    if path and folder.is_dir():  # Path("") would be the working directory
        return folder
    if not path or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        near = difflib.get_close_matches(folder.name, os.listdir(folder.parent), 1) if folder.parent.is_dir() else []
        hint = f"; {folder.parent} has {near[0]!r}" if near else ""
        raise CheckpointError(
            f"no model folder {path!r}{hint}; give a folder with config.json, or a hub name such as org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, allow_patterns=WANTED))
        if has_safetensors(folder):
            return folder
        return Path(snapshot_download(path, allow_patterns=[*WANTED, "*.msgpack"]))  # else an old Flax model's
    except Exception as error:
        raise CheckpointError(
            f"{path!r} is no local folder, and the hub did not give it ({type(error).__name__}: {error}); "
            "check the name, the network, and for gated models the token in HF_TOKEN"
        ) from error


def has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      CheckpointError: the file is missing or is no JSON object.
    """
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}; is it a Hugging Face checkpoint folder?")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download or export it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; a JSON object was expected")
    return value


class Reader:
    """The tensors of a folder, by name; nothing is read before it is asked for, and no file stays mapped after."""

    def __init__(self, folder: Path, single: str = SINGLE):
        self.folder = folder
        if (folder / INDEX).is_file():
            self.files: dict[str, str] = read_json(folder / INDEX).get("weight_map", {})
            headers = {file: self._header(file) for file in sorted(set(self.files.values()))}
        elif (folder / single).is_file():
            headers = {single: self._header(single)}
            self.files = dict.fromkeys(headers[single], single)
        else:
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
            raise CheckpointError(
                f"{folder} has neither {single} nor {INDEX} (found: {found}); only safetensors are read, and the "
                "flax_model.msgpack of transformers' Flax models"
            )
        for name, file in self.files.items():
            if name not in headers[file]:
                raise CheckpointError(f"{folder / file} lacks {name!r}, which {INDEX} places there; download it again")
        self._header_of = {name: headers[file][name] for name, file in self.files.items()}

    def _open(self, file: str):
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"shard {path} is missing, though {INDEX} names it; download it again")
        try:
            return safe_open(path, "np")
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} ({size:,} bytes) is truncated or corrupt ({error}); download or export it again"
            ) from error

    def _header(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        with self._open(file) as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header_of[name][0]

    def dtype(self, name: str, known: Mapping[str, np.dtype] = FLOATS) -> np.dtype:
        kind = self._header_of[name][1]
        if kind not in known:
            raise CheckpointError(
                f"{name!r} in {self.folder} has dtype {kind}; float32, float16 and bfloat16 are supported"
            )
        return known[kind]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or the part of it that `index` names."""
        with self._open(self.files[name]) as opened:  # opened anew: what stays mapped counts as memory in use
            return opened.get_slice(name)[index if index else ...]


class Tensor(NamedTuple):
    """A tensor to write: known by name and size, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write(folder: Path, tensors: Iterable[Tensor], *, shard_gb: float, single: str = SINGLE) -> list[Path]:
    """Writes tensors in shards of at most `shard_gb` (10^9 bytes), with an index if there is more than one.

    Every process calls it (making a tensor may gather it); the first one writes. What the folder held before is
    replaced when everything is on disk, and stays if anything fails.

    Returns:
      the files written.

    Raises:
      CheckpointError: the disk is full or refuses.
    """
    shards = _shards(tensors, shard_gb * 1e9)
    numbered = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = [single] if len(shards) == 1 else numbered
    parts = [folder / f"{name}.part" for name in names]
    writes = jax.process_index() == 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, shard in zip(parts, shards, strict=True):
            made = {t.name: np.asarray(t.make(), order="C") for t in shard}
            if writes:
                save_file(made, part, metadata={"format": "pt"})
                part.chmod(0o644)  # safetensors makes files that only their owner can read
        if writes:
            for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
                old.unlink(missing_ok=True)
            for part, name in zip(parts, names, strict=True):
                os.replace(part, folder / name)
            if len(shards) > 1:
                total = sum(t.nbytes for shard in shards for t in shard)
                weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
                write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    except (OSError, SafetensorError) as error:
        raise _refused(folder, error) from error
    finally:
        for part in parts if writes else ():
            with contextlib.suppress(OSError):
                part.unlink()
    return [folder / name for name in names]


def _shards(tensors: Iterable[Tensor], limit: float) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    room = limit
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = limit
        room -= tensor.nbytes
        shards[-1].append(tensor)
    return shards


def digest(folder: Path) -> str:
    """A digest of a checkpoint's config.json and weights, by content.

    Example:
      >>> import jaxsft
      >>> len(digest(Path(jaxsft.BASE)))
      32
    """
    hasher = hashlib.blake2b(digest_size=16)
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.msgpack")]):
        with file.open("rb") as stream:
            hasher.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
      CheckpointError: the disk is full or refuses.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _refused(file.parent, error) from error


def _refused(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot write {folder} ({error}); free some space or choose another folder")


def copy_companions(source: Path, folder: Path, patterns: Sequence[str] = COMPANIONS) -> None:
    """Copies tokenizer, chat template and generation config beside the weights, or what of them `patterns` name.

    Raises:
      CheckpointError: the disk is full or refuses.
    """
    if jax.process_index() != 0:
        return
    try:
        for pattern in patterns:
            for file in source.glob(pattern):
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                if file.is_file() and not (target.exists() and target.samefile(file)):
                    shutil.copyfile(file, target)
    except OSError as error:
        raise _refused(folder, error) from error
