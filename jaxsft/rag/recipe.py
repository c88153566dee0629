"""How tokens become a text's vector: what a sentence-transformers folder says of it, read without that package.

    modules.json                         the modules in order: a Transformer, a Pooling, Dense layers, a Normalize
    1_Pooling/config.json                which tokens count, and how
    2_Dense/config.json, .safetensors    a layer over the pooled vector
    sentence_bert_config.json            the longest text, whether letters are lowered
    config_sentence_transformers.json    what is written before a question, and before a passage

A folder without modules.json is pooled as that package does it: a language model at its last token, anything else by
the mean. A module or a key that would change the vectors and is not known here is an error: ignored, it would give
vectors of another model. Whether there is a Normalize makes no difference, as ours are always of length 1.

Source: Reimers and Gurevych 2019, arXiv:1908.10084.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsft.hub import CheckpointError
from jaxsft.hub.files import Reader, read_json, write_json
from jaxsft.models import POOLINGS, pool, unit

# The former names of the ways to pool, in the order in which several are joined.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {"Identity": lambda x: x, "Tanh": jnp.tanh, "ReLU": jax.nn.relu, "Sigmoid": jax.nn.sigmoid}
PASSAGE = ("document", "passage", "corpus")  # the names under which a prompt for passages is looked for
# Keys that change nothing at these values. Of the reading of text alone; whatever else a folder may read is an error.
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
PLAIN = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": (TEXT,),
    **dict.fromkeys(("model_args", "tokenizer_args", "config_args"), ({},)),
    **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs", "processing_kwargs"), ({},)),
    **dict.fromkeys(("query_length", "document_length", "query_expansion"), ()),
}


class Layer(NamedTuple):
    """A Dense module: activation(x kernel + bias)."""

    kernel: Float[np.ndarray, "I O"]
    bias: Float[np.ndarray, "O"]
    activation: str


@dataclass(frozen=True, eq=False)  # compared by identity, as `jit` wants it of what holds arrays
class Recipe:
    """How a text becomes a vector."""

    folder: Path  # of the model and its tokenizer
    pooling: tuple[str, ...] = ("mean",)  # of `models.pooling.POOLINGS`
    layers: tuple[Layer, ...] = ()
    max_tokens: int | None = None  # None: as many as model and tokenizer take
    lower: bool = False
    query: str = ""  # written before a question
    document: str = ""  # written before a passage
    counts_prompt: bool = True  # do the tokens of those count in the pooling?
    static: bool = False  # a table of vectors, and no model


def vectors(
    recipe: Recipe, features: Float[Array, "B T D"], real: Bool[Array, "B T"], skip: Int[Array, ""] | int = 0
) -> Float[Array, "B E"]:
    """The unit vectors of texts, one a row, from the features of their tokens; float32.

    Args:
      recipe: from `read`.
      features, real, skip: as for `models.pooling.pool`.

    Example:
      >>> x = jnp.array([[[0.0, 4.0], [7.0, 7.0]]])
      >>> vectors(Recipe(Path(), ("cls",)), x, jnp.array([[True, True]])).tolist()
      [[0.0, 1.0]]
    """
    x = pool(features, real, recipe.pooling, skip)
    for layer in recipe.layers:
        x = ACTIVATIONS[layer.activation](jnp.matmul(x, layer.kernel, precision="highest") + layer.bias)
    return unit(x)


def read(folder: Path, pooling: str = "") -> Recipe:
    """Reads how the model in a folder is to be used.

    Args:
      folder: of sentence-transformers, or a model alone.
      pooling: of `POOLINGS`, several joined by +; by default what the folder says.

    Raises:
      CheckpointError: a module or key that is not known, a pooling that is not.

    Example:
      >>> import jaxsft
      >>> read(Path(jaxsft.BASE)).pooling, read(Path(jaxsft.BASE), "mean").pooling
      (('lasttoken',), ('mean',))
    """
    found = _modules(folder) if (folder / "modules.json").is_file() else _alone(folder)
    found = replace(found, **_prompts(folder))
    found = found if not pooling else replace(found, pooling=tuple(pooling.split("+")))
    if unknown := sorted(set(found.pooling) - set(POOLINGS)):
        raise CheckpointError(f"pooling {unknown[0]!r} is not known; known are {', '.join(POOLINGS)}")
    return found


def _alone(folder: Path) -> Recipe:
    config = read_json(folder / "config.json")
    writes = (config.get("architectures") or [""])[0].endswith("ForCausalLM")
    return Recipe(
        folder,
        pooling=("lasttoken",) if writes else ("mean",),
        static=config.get("model_type") == "model2vec",
        **_reading(folder),
    )


def _modules(folder: Path) -> Recipe:
    file, found, closed = folder / "modules.json", None, False
    for module in _listed(file):
        kind, at = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path") or "")
        if found is None and kind in ("Transformer", "StaticEmbedding"):
            static = kind == "StaticEmbedding"
            found = Recipe(at, pooling=(), static=static, **({} if static else _reading(at)))
        elif found and not found.pooling and not closed and kind == "Pooling":
            found = replace(found, **_pooling(at))
        elif found and (found.pooling or found.static) and not closed and kind == "Dense":
            found = replace(found, layers=(*found.layers, _dense(at)))
        elif found and kind == "Normalize":
            closed = True
        elif kind != "Dropout":
            raise CheckpointError(
                f"{file} has a module {module.get('type')!r} at {module.get('path')!r} that is not supported there; a "
                "Transformer or StaticEmbedding, a Pooling, Dense and Normalize in this order are"
            )
    if found is None or not (found.pooling or found.static):
        raise CheckpointError(f"{file} has no Transformer with a Pooling behind it; both are needed for one vector")
    return found if found.pooling else replace(found, pooling=("mean",))


def _listed(file: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download or export it again") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{file} is no list of modules; download or export it again")
    return modules


def _pooling(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    known = {*FLAGS, "pooling_mode", "include_prompt", "word_embedding_dimension", "embedding_dimension"}
    _refuse(folder / "config.json", set(config) - known, config)
    modes = config.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if config.get(flag)] or "mean"
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    return {"pooling": modes, "counts_prompt": bool(config.get("include_prompt", True))}


def _dense(folder: Path) -> Layer:
    file = folder / "config.json"
    config = read_json(file)
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    usual = {"module_input_name": "sentence_embedding", "module_output_name": None, "use_residual": False}
    changed = {key for key, value in usual.items() if config.get(key, value) not in (value, usual["module_input_name"])}
    changed |= set(config) - {*usual, "in_features", "out_features", "bias", "activation_function"}
    changed |= set() if activation in ACTIVATIONS else {"activation_function"}
    _refuse(file, changed, config)
    reader = Reader(folder)
    kernel = np.asarray(reader.read("linear.weight"), np.float32).T
    bias = reader.read("linear.bias") if config.get("bias", True) else np.zeros(kernel.shape[1])
    return Layer(kernel, np.asarray(bias, np.float32), activation)


def _reading(folder: Path) -> dict[str, Any]:
    """How long a text may be, and whether it is lowered."""
    file = next(iter(sorted(folder.glob("sentence_*_config.json"))), None)
    if file is None:
        return {}
    config = read_json(file)
    changed = {key for key, values in PLAIN.items() if config.get(key) not in (None, *values)}
    _refuse(file, changed | set(config) - {*PLAIN, "max_seq_length", "do_lower_case", "unpad_inputs"}, config)
    return {"max_tokens": config.get("max_seq_length"), "lower": bool(config.get("do_lower_case", False))}


def _prompts(folder: Path) -> dict[str, Any]:
    """The texts before a question and before a passage, as `encode_query` and `encode_document` choose them.

    Where several names are given for passages it is the first that is not empty: saving adds an empty `document`.
    """
    file = folder / "config_sentence_transformers.json"
    if not file.is_file():
        return {}
    config = read_json(file)
    known = {"__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"}
    _refuse(file, set(config) - known, config)
    scaled = not _normalised(folder)  # then lengths count in a dot product, and ours are all 1
    if config.get("similarity_fn_name") not in (None, "cosine", "euclidean", *([] if scaled else ["dot"])):
        _refuse(file, {"similarity_fn_name"}, config)
    prompts, usual = config.get("prompts") or {}, config.get("default_prompt_name")
    usual = "" if usual is None else prompts.get(usual) or ""
    passage = [prompts[name] or "" for name in PASSAGE if name in prompts]
    return {
        "query": prompts.get("query", usual) or "",
        "document": next(filter(None, passage), "") if passage else usual,
    }


def _normalised(folder: Path) -> bool:
    modules = _listed(folder / "modules.json") if (folder / "modules.json").is_file() else []
    return any(str(module.get("type", "")).endswith("Normalize") for module in modules)


def write(folder: Path, recipe: Recipe, hidden: int, max_tokens: int) -> None:
    """Writes beside a model how it is used, so that sentence-transformers makes the same vectors of it.

    Args:
      folder: with the model's weights and tokenizer.
      recipe: how it is used.
      hidden: features of a token.
      max_tokens: the longest text.

    Raises:
      CheckpointError: layers behind the pooling, which are not written; the disk is full or refuses.
    """
    if recipe.layers:
        raise CheckpointError(f"{recipe.folder} has Dense modules, which are kept only where nothing else changes")
    if jax.process_index():
        return
    parts = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(parts)
    ]
    flags = {flag: mode in recipe.pooling for flag, mode in FLAGS.items()}
    prompts = {name: text for name, text in (("query", recipe.query), ("document", recipe.document)) if text}
    files = {
        "1_Pooling/config.json": {"word_embedding_dimension": hidden, **flags, "include_prompt": recipe.counts_prompt},
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": recipe.lower},
        "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, value)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")


def _refuse(file: Path, keys: set[str], config: dict[str, Any]) -> None:
    if keys:
        said = ", ".join(f"{key!r} = {config.get(key)!r}" for key in sorted(keys))
        raise CheckpointError(f"{file} has {said}, which would change the vectors and is not supported")
