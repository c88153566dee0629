"""Whole models, loaded: into sharded arrays, packed if wanted, or as shapes alone.

Loading asks the reader for the slices of each weight that the devices of this process hold, each of them once, so no
host reads or holds what is another's; kernels that are to be packed are read whole and packed tensor by tensor, so that
in full precision they never exist together.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxsft import lora, quant, sharding, tree
from jaxsft.hub import names
from jaxsft.hub.disk import check, once, part_of
from jaxsft.hub.files import CheckpointError, read_json, resolve
from jaxsft.hub.source import headless, open_weights, read_config, shapes
from jaxsft.hub.vocabulary import Vocabulary, grown, with_rows
from jaxsft.models import HEADS, STATISTICS, TABLES, Model, ModelConfig, VisionConfig, build
from jaxsft.tree import Pattern, Tree
from jaxsft.types import Key


def load(
    path: str,
    mesh: Mesh | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    full_precision: Pattern = (),
    cut: int | None = None,
    remat: str = "dots",
    attention: str = "auto",
    lora_dropout: float = 0.0,
    vocabulary: Vocabulary | None = None,
) -> tuple[Model, Tree]:
    """Loads a Hugging Face checkpoint.

    Args:
      path: a folder with config.json and safetensors (or an old flax_model.msgpack), or a hub name.
      mesh: from `sharding.mesh`; one device by default. Every array lands sharded by its family's rules.
      dtype: of the computation and of the weights.
      full_precision: addresses ("params/...") whose weights are float32 whatever dtype is: those that will train.
      cut: a layer before which the stack is cut, see `models.split`.
      remat, attention, lora_dropout: see `models.build`.
      vocabulary: from `hub.load_vocabulary`; the tables then have rows for its new tokens, at the mean of the others.

    Returns:
      (model, params).

    Raises:
      CheckpointError: a missing, truncated or corrupt file, an unknown architecture or config key, a tensor that is
        missing, superfluous, of another shape, or not finite.

    Example:
      >>> import jaxsft
      >>> model, params = load(jaxsft.BASE)
      >>> model.config.layers
      4
    """
    kind = {"dtype": dtype, "full_precision": full_precision, "cut": cut, "remat": remat}
    kind |= {"attention": attention, "lora_dropout": lora_dropout}
    model, variables = load_variables(path, mesh, vocabulary=vocabulary, **kind)
    return model, variables["params"]


def load_variables(
    path: str,
    mesh: Mesh | None = None,
    *,
    quantise: str = "none",
    dtype: jax.typing.DTypeLike = jnp.float32,
    full_precision: Pattern = (),
    cut: int | None = None,
    remat: str = "dots",
    attention: str = "auto",
    lora_dropout: float = 0.0,
    labels: int | None = None,
    key: Key | None = None,
    head: bool = True,
    vocabulary: Vocabulary | None = None,
) -> tuple[Model, dict[str, Tree]]:
    """Loads a Hugging Face checkpoint, its kernels packed if wanted; the other arguments are those of `load`.

    Args:
      quantise: how the kernels of the layers are packed, "int8" or "nf4" (see `quant`), or "none". Embeddings, norms,
        biases and the output layer are parameters in any case.
      labels: 1 for a reward model, the number of classes for a model of images. Where the checkpoint has another number
        all but its output layer is loaded, and a new one is drawn, float32 as it is to train. By default the checkpoint
        is what its config.json says.
      key: draws the new layer: normal, of the deviation that config.json has for initializer_range, else 0.02; its bias
        is 0.
      head: False for the hidden states alone: what makes scores of tokens is not read, and may be missing.

    Returns:
      (model, variables): {"params": ...}, and "packed" where there is something packed.

    Raises:
      ValueError: a kernel that `full_precision` names would be packed; a score to draw, and no key.
      CheckpointError: as `load`; a model that cannot be a reward model.

    Example:
      >>> import jaxsft
      >>> model, variables = load_variables(jaxsft.BASE, quantise="nf4")
      >>> sorted(variables["packed"]["blocks"]["0-3"]["attn"]["q"])
      ['absmax', 'absmax_mean', 'absmax_scale', 'codes']
      >>> model, variables = load_variables(jaxsft.BASE, labels=1, key=jax.random.key(0))
      >>> variables["params"]["score"]["kernel"].shape
      (192, 1)
    """
    folder = resolve(path)
    family, config = read_config(folder, labels)
    mesh = sharding.mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    reader = open_weights(folder)
    config, left_out = (config, set()) if head else headless(family, config, reader.files)
    leaves, config = tree.flat(shapes(config, cut)), with_rows(config, vocabulary)
    placed = sharding.shardings(shapes(config, cut), family.rules, mesh)
    packs = _packs(leaves, quantise)
    quant.check(full_precision, packs)
    params, packed, wanted, drawn = {}, {}, set(), _drawn(folder, config)
    for path_, place in tree.flat(placed).items():
        if path_ in drawn:
            params[path_] = _draw(folder, path_, leaves[path_].shape, key, place)
            continue
        here, transposed = names.leaf_names(family, path_, leaves[path_].shape, reader.files)
        check(reader, here, leaves[path_].shape, transposed)
        wanted |= set(here.flat)
        if path_ in packs:
            parts = _pack(reader, here, leaves[path_].shape, transposed, quantise)
            host = {f"{path_.removesuffix('/kernel')}/{name}": part for name, part in parts.items()}
            packed |= _put(host, sharding.shardings(host, quant.rules(family.rules), mesh))
        else:
            full = tree.matches(full_precision, f"params/{path_}") or tree.matches(STATISTICS, path_)
            kind = jnp.float32 if full else dtype
            grows = vocabulary if tree.matches(TABLES, path_) else None
            params[path_] = _place(reader, here, leaves[path_].shape, transposed, kind, place, grows)
    spare = {copy for copy, _ in family.copies} if config.tied or config.labels else set()
    spare |= names.heads(family, reader.files) if isinstance(config, VisionConfig) else set()
    if unknown := sorted(n for n in set(reader.files) - wanted - spare - left_out if not names.unused(family, n)):
        raise CheckpointError(f"{folder} has tensors this family does not know: {', '.join(unknown[:5])}")
    if broken := [p for p, ok in [(p, _finite(x)) for p, x in params.items()] if not ok]:
        raise CheckpointError(f"{folder} holds NaN or infinite numbers in {broken[0]}; download or export it again")
    how = {"remat": remat, "attention": attention, "lora_dropout": lora_dropout, "mesh": mesh}
    model = build(config, dtype=dtype, follows=full_precision, **how)
    return model, {"params": tree.nest(params)} | ({"packed": tree.nest(packed)} if packed else {})


def _packs(leaves: Mapping, quantise: str) -> list[str]:
    """The kernels that are packed: those of the layers that get an adapter too, not what routes tokens to experts."""
    return [p for p in leaves if quantise != "none" and tree.matches(f"blocks/{lora.ALL}/kernel", p)]


def abstract(
    path: str,
    mesh: Mesh,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    full_precision: Pattern = (),
    cut: int | None = None,
    remat: str = "dots",
    attention: str = "auto",
    lora_dropout: float = 0.0,
    quantise: str = "none",
    labels: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Model, Tree]:
    """What `load_variables` would give, as shapes with shardings: it reads config.json alone.

    Example:
      >>> import jaxsft
      >>> model, variables = abstract(jaxsft.BASE, sharding.mesh(devices=jax.devices()[:1]), quantise="int8")
      >>> variables["packed"]["blocks"]["0-3"]["attn"]["q"]["codes"].dtype
      dtype('int8')
    """
    folder = resolve(path)
    family, config = read_config(folder, labels)
    config = with_rows(config, vocabulary)
    described = tree.flat(shapes(config, cut))
    packs = _packs(described, quantise)
    quant.check(full_precision, packs)

    drawn = _drawn(folder, config)
    named = lambda path: tree.matches(full_precision, f"params/{path}") or tree.matches(STATISTICS, path)
    full = lambda path: path in drawn or named(path)
    kind = lambda path: jnp.float32 if full(path) else dtype
    plain = {p: jax.ShapeDtypeStruct(x.shape, kind(p)) for p, x in described.items() if p not in packs}
    packed = {}
    for p in packs:
        parts = jax.eval_shape(lambda p=p: quant.pack(jnp.zeros(described[p].shape), quantise))
        packed |= {f"{p.removesuffix('/kernel')}/{name}": part for name, part in parts.items()}
    variables = {"params": sharding.abstract(tree.nest(plain), family.rules, mesh)}
    if packed:
        variables["packed"] = sharding.abstract(tree.nest(packed), quant.rules(family.rules), mesh)
    how = {"remat": remat, "attention": attention, "lora_dropout": lora_dropout, "mesh": mesh}
    return build(config, dtype=dtype, follows=full_precision, **how), variables


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _drawn(folder: Path, config: ModelConfig) -> set[str]:
    """What the checkpoint does not have of the model: the output layer, where it has another number of labels."""
    if config.labels in (0, read_config(folder)[1].labels):
        return set()
    return {path for path in tree.flat(shapes(config)) if tree.matches(HEADS, path)}


def _draw(folder: Path, path: str, shape: tuple[int, ...], key: Key | None, place: NamedSharding) -> jax.Array:
    if path.endswith("/bias"):
        return jax.jit(lambda: jnp.zeros(shape), out_shardings=place)()
    if key is None:
        raise ValueError(
            f"{folder} has no output layer for labels={shape[-1]}, so one is drawn; give a key, as jax.random.key(0)"
        )
    deviation = read_json(folder / "config.json").get("initializer_range") or 0.02
    return jax.jit(lambda key: deviation * jax.random.normal(key, shape), out_shardings=place)(key)


def _place(reader, here, shape, transposed, dtype, place, vocabulary) -> jax.Array:
    """Makes one leaf of the slices that this process's devices hold; a table with a vocabulary's rows, if any."""
    part = lambda dtype: part_of(reader, here, shape, transposed, dtype)
    if vocabulary is None:
        return jax.make_array_from_callback(shape, place, once(part(dtype)))
    rows = grown(part(jnp.float32), shape, vocabulary, jnp.dtype(dtype))
    return jax.make_array_from_callback((vocabulary.size, *shape[1:]), place, once(rows))


_packed = jax.jit(quant.pack, static_argnums=1)


def _pack(reader, here, shape, transposed, kind) -> dict[str, np.ndarray]:
    """Packs the kernels of some layers; one tensor is read at a time, and whole: its scales are over all of it."""
    like = jax.eval_shape(lambda: quant.pack(jnp.zeros(shape), kind))
    stacks = {part: np.empty(x.shape, x.dtype) for part, x in like.items()}
    read = lambda name: reader.read(name).T if transposed else reader.read(name)
    for row, name in np.ndenumerate(here):
        # Nothing is bound to the tensor, so that it is gone before the next is read; jit would hold on to its argument.
        parts = jax.device_get(_packed(jax.device_put(read(name)), kind))
        if not all(np.isfinite(x).all() for x in parts.values()):  # NaN in a kernel is NaN in its scales
            raise CheckpointError(
                f"{reader.folder} holds NaN or infinite numbers in {name}; download or export it again"
            )
        for part, x in parts.items():
            stacks[part][row] = x
    return stacks


def _put(host: dict[str, np.ndarray], placed: Tree) -> dict[str, jax.Array]:
    """Puts whole arrays on the devices, each of which gets its slice."""
    where = tree.flat(placed)
    return {path: jax.make_array_from_callback(x.shape, where[path], x.__getitem__) for path, x in host.items()}


def init(
    path: str,
    key: Key,
    mesh: Mesh | None = None,
    *,
    dtype=jnp.float32,
    remat: str = "dots",
    attention: str = "auto",
    labels: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Model, Tree]:
    """Makes a fresh model of the shape that `path`/config.json describes, for training from scratch.

    `labels` are those of `load_variables`.
    """
    family, config = read_config(resolve(path), labels)
    config = with_rows(config, vocabulary)
    mesh = sharding.mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    model = build(config, dtype=dtype, remat=remat, attention=attention, mesh=mesh, follows="params/.*")
    placed = sharding.shardings(shapes(config), family.rules, mesh)
    return model, jax.jit(model.init, out_shardings=placed)(key)
