"""Placement over a mesh: who holds which slice of which array.

Batches are cut over data, fsdp and expert together; parameters over fsdp and tensor, experts over expert, as the rules
of the model's family say.
The program itself is written for one device: the compiler (GSPMD, Xu et al. 2021, arXiv:2105.04663) adds the exchanges.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsft import axes, tree, types
from jaxsft.tree import Tree

Rules = tuple[tuple[str, PartitionSpec], ...]


@dataclass(frozen=True)
class Config:
    """How the devices form a mesh; at most one length is -1, which takes the rest."""

    data: int = -1
    """copies of the model, each with its own rows of the batch"""
    fsdp: int = 1
    """devices that share one copy, each holding a slice of every weight and its own rows"""
    tensor: int = 1
    """devices that share one copy and the same rows, each computing some heads and hidden units"""
    context: int = 1
    """devices that share every row, each computing a piece of it: for rows that do not fit one device"""
    expert: int = 1
    """devices that share out the experts of a mixture, and the rows"""
    dcn: Literal["data", "fsdp"] = "data"
    """the axis that goes from slice to slice of a TPU, over the data-centre network, where there are several slices"""


def mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    dcn: str = axes.DATA,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """Arranges the devices.

    Args:
      data, fsdp, tensor, context, expert: lengths of the axes; at most one is -1, the rest of the devices.
      dcn: the axis whose outer part goes from slice to slice, where the devices have several `slice_index`.
      devices: all devices of all processes by default.

    Raises:
      ValueError: the lengths do not multiply to the number of devices, or the slices do not divide the axis `dcn`.

    Example:
      >>> dict(mesh(devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'expert': 1, 'context': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    lengths = [data, fsdp, expert, context, tensor]
    known = int(np.prod([n for n in lengths if n != -1]))
    said = _said(lengths)
    if lengths.count(-1) > 1 or any(n < 1 and n != -1 for n in lengths) or len(devices) % known:
        raise ValueError(
            f"mesh {said} does not fit {len(devices)} devices; the product must divide it, one axis may be -1"
        )
    lengths = [len(devices) // known if n == -1 else n for n in lengths]
    if np.prod(lengths) != len(devices):
        raise ValueError(
            f"mesh {said} uses {np.prod(lengths)} of {len(devices)} devices; set one axis to -1 for the rest"
        )
    kinds = (AxisType.Auto,) * len(axes.ALL)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return Mesh(_hybrid(lengths, dcn, devices), axes.ALL, axis_types=kinds)
    if len(devices) == len(jax.devices()):
        return jax.make_mesh(tuple(lengths), axes.ALL, axis_types=kinds)
    return Mesh(np.array(devices).reshape(lengths), axes.ALL, axis_types=kinds)


def _hybrid(lengths: Sequence[int], dcn: str, devices: Sequence[Any]) -> np.ndarray:
    """Arranges several slices, so that only the axis `dcn` leaves one, and its neighbours are in one where they can."""
    slices, length = len({device.slice_index for device in devices}), lengths[axes.ALL.index(dcn)]
    if length % slices:
        raise ValueError(
            f"mesh.{dcn} is {length}, which the {slices} slices of {len(devices) // slices} devices do not divide; set "
            f"it to a multiple of {slices}, or mesh.dcn to another axis"
        )
    outer = [slices if axis == dcn else 1 for axis in axes.ALL]
    inner = [n // over for n, over in zip(lengths, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)


def _said(lengths: Sequence[int]) -> str:
    """The three axes that everybody knows, and the others where they are cut."""
    usual = (axes.DATA, axes.FSDP, axes.TENSOR)
    return " x ".join(f"{axis} {n}" for axis, n in zip(axes.ALL, lengths, strict=True) if n != 1 or axis in usual)


def describe(mesh: Mesh) -> str:
    """The mesh in words.

    Example:
      >>> describe(mesh(devices=jax.devices()[:1]))
      'data 1 x fsdp 1 x tensor 1'
    """
    return _said(list(mesh.shape.values()))


def spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Finds how the leaf at `path` is cut: the first rule that matches.

    An axis of the mesh that does not divide a dimension is left out there: that dimension is then held whole.

    Raises:
      ValueError: no rule matches, or the rule has another number of dimensions.
    """
    _, wanted = _rule(path, shape, rules)
    fits = [axis if axis is None or n % mesh.shape[axis] == 0 else None for n, axis in zip(shape, wanted, strict=True)]
    return PartitionSpec(*fits)


def _rule(path: str, shape: tuple[int, ...], rules: Rules) -> tuple[str, PartitionSpec]:
    """The first rule that matches; see `spec`."""
    found = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
    if found is None:
        raise ValueError(f"no sharding rule for {path} {shape}; add one to FAMILY.rules")
    pattern, wanted = found
    if len(wanted) != len(shape):
        raise ValueError(f"the sharding rule {pattern!r} has {len(wanted)} dimensions, but {path} has shape {shape}")
    return found


def check(rules: Rules, *trees: Mapping) -> None:
    """Refuses a leaf without a rule, and a rule without a leaf.

    Args:
      rules: of a family.
      trees: parameters, or shapes of them, of models that have between them all that the family can have.

    Raises:
      ValueError: a leaf of any of the trees has no rule, or a rule is the first match of no leaf in any of them.

    Example:
      >>> check((("w", PartitionSpec(None)), ("bias", PartitionSpec(None))), {"w": np.zeros(2)})
      Traceback (most recent call last):
      ...
      ValueError: the sharding rules 'bias' match no leaf; take them out of FAMILY.rules
    """
    leaves = {path: leaf.shape for shapes in trees for path, leaf in tree.flat(shapes).items()}
    used = {_rule(path, shape, rules)[0] for path, shape in leaves.items()}
    if idle := [pattern for pattern, _ in rules if pattern not in used]:
        raise ValueError(
            f"the sharding rules {', '.join(map(repr, idle))} match no leaf; take them out of FAMILY.rules"
        )


def shardings(shapes: Mapping, rules: Rules, mesh: Mesh) -> Tree:
    """Gives each leaf of a tree (arrays or shapes) its NamedSharding, by the rules.

    Example:
      >>> one = mesh(devices=jax.devices()[:1])
      >>> rules = (("w", PartitionSpec("fsdp", "tensor")),)
      >>> tuple(shardings({"w": jax.ShapeDtypeStruct((4, 2), np.float32)}, rules, one)["w"].spec)
      ('fsdp', 'tensor')
    """
    leaves = tree.flat(shapes)
    return tree.nest({p: NamedSharding(mesh, spec(p, x.shape, rules, mesh)) for p, x in leaves.items()})


def abstract(shapes: Mapping, rules: Rules, mesh: Mesh) -> Tree:
    """Arrays that do not exist, each with the sharding that the rules give it.

    Example:
      >>> one = mesh(devices=jax.devices()[:1])
      >>> found = abstract({"w": jax.ShapeDtypeStruct((4, 2), np.float32)}, (("w", PartitionSpec("fsdp", None)),), one)
      >>> found["w"].shape, tuple(found["w"].sharding.spec)
      ((4, 2), ('fsdp', None))
    """
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, shapes, shardings(shapes, rules, mesh))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of what is known of rows, [B, ...]: over data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(axes.ROWS, None))


def share(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this process puts on its devices, and of how many.

    Processes whose devices cut the same rows by `context` or `tensor` have the same share, and must read the same rows.

    Raises:
      ValueError: a process has some rows with one other process, and some with another.

    Example:
      >>> share(mesh(devices=jax.devices()[:1]))
      (0, 1)
    """
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(axes.rows(mesh), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({row for rows in shares for row in rows}) != sum(map(len, shares)) or len(set(map(len, shares))) > 1:
        raise ValueError(
            f"mesh.context {mesh.shape['context']} x mesh.tensor {mesh.shape['tensor']} cuts rows over parts of "
            "processes; let that divide the devices of a process, or be a multiple of them"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def tokens(mesh: Mesh) -> NamedSharding:
    """The sharding of what is known of tokens, [B, T]: rows as ever, and each in pieces over context."""
    return NamedSharding(mesh, PartitionSpec(axes.ROWS, axes.CONTEXT))


def batch(arrays: Any, mesh: Mesh) -> Any:
    """The shardings of a batch, whose type says which of its arrays are for tokens and which for rows.

    Example:
      >>> one, row = mesh(devices=jax.devices()[:1]), np.zeros((2, 4), np.int32)
      >>> [tuple(where.spec) for where in batch(types.Tokens(row, row > 0, row, row), one)][0]
      (('data', 'fsdp', 'expert'), 'context')
    """
    if not hasattr(arrays, "_fields"):
        return jax.tree.map(lambda _: rows(mesh), arrays)
    along = types.by_token(type(arrays))
    place = lambda name, field: tokens(mesh) if name in along else batch(field, mesh)
    return type(arrays)(*map(place, arrays._fields, arrays))


def check_length(length: int, mesh: Mesh) -> None:
    """Refuses rows that do not cut into pieces for the axis context.

    Args:
      length: tokens of a row; 1 for what is no row of tokens.
      mesh: over which they are to lie.

    Raises:
      ValueError: they do not.
    """
    if length % mesh.shape[axes.CONTEXT]:
        raise ValueError(
            f"mesh.context is {mesh.shape[axes.CONTEXT]}, which does not divide the {length} tokens of a row; set it "
            "to 1, or change the length of rows"
        )


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(arrays: Any) -> Mesh | None:
    """The mesh over which the arrays of a tree lie; None where they lie on one device.

    Example:
      >>> mesh_of({"w": jax.numpy.zeros(2)}) is None
      True
    """
    for x in jax.tree.leaves(arrays):
        where = getattr(x, "sharding", None)
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) and where.mesh.size > 1:
            return where.mesh
    return None


def of(arrays: Any) -> Any:
    """The shardings that the arrays of a tree have."""
    return jax.tree.map(lambda x: x.sharding, arrays)


def cut(batch: Any, pieces: int) -> Any:
    """Arrays [B, ...] -> [pieces, B / pieces, ...], every piece with rows of every device.

    Raises:
      ValueError: the pieces do not divide the rows.

    Example:
      >>> cut(np.arange(4), 2).tolist()
      [[0, 2], [1, 3]]
    """

    def one(x: Any) -> Any:
        if x.shape[0] % pieces:
            raise ValueError(f"a batch of {x.shape[0]} rows does not cut into {pieces} microbatches")
        return x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, batch)


def join(batch: Any) -> Any:
    """Arrays [pieces, B / pieces, ...] -> [B, ...], what `cut` was given.

    Example:
      >>> join(cut(np.arange(4), 2)).tolist()
      [0, 1, 2, 3]
    """
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)


def to_host(x: jax.Array) -> np.ndarray:
    """Brings a whole array to every host, from wherever its slices are; all processes must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
