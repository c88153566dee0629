"""What a family is, and the reading of `config.json` that all families share.

A family is all that differs between llama, qwen, ...: how its config reads, what its weights are called, how they are
sharded. A config key that is neither read nor listed here as harmless is an error: an ignored key is a wrong model.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from jaxsft.models.block import DecoderConfig
from jaxsft.models.encoder import EncoderConfig
from jaxsft.models.rope import KINDS, Rope
from jaxsft.models.vision.depthwise import ConvNextConfig
from jaxsft.models.vision.residual import ResNetConfig
from jaxsft.models.vision.tower import TowerConfig

VisionConfig = TowerConfig | ResNetConfig | ConvNextConfig
ModelConfig = DecoderConfig | EncoderConfig | VisionConfig
HEADS = "score/kernel|classifier/(kernel|bias)"  # the leaves that a model with other labels has anew
TABLES = "(embed|head)/table|mlm/bias"  # the leaves that have a row for each token
Rules = tuple[tuple[str, PartitionSpec], ...]


class Name(NamedTuple):
    """One kind of weight here and in a Hugging Face file, where kernels are [out, in] and layers are apart."""

    path: str  # without the stack's name: blocks/attn/q/kernel
    hf: str  # with {layer} for a stacked one, {expert} for one of several: model.layers.{layer}.self_attn.q_proj.weight
    transposed: bool = False

    @property
    def axes(self) -> int:
        """The first axes of the leaf here that are separate tensors there."""
        return ("{layer}" in self.hf) + ("{expert}" in self.hf)


def dense(here: str, there: str, *, transposed: bool = True) -> tuple[Name, Name]:
    """The names of a linear layer's kernel and bias."""
    return Name(f"{here}/kernel", f"{there}.weight", transposed), Name(f"{here}/bias", f"{there}.bias")


def norm(here: str, there: str) -> tuple[Name, Name]:
    """The names of a LayerNorm's scale and bias."""
    return Name(f"{here}/scale", f"{there}.weight"), Name(f"{here}/bias", f"{there}.bias")


def conv(here: str, there: str) -> tuple[Name, Name]:
    """The names of a convolution's filters and bias, which lie there as they do here."""
    return Name(f"{here}/filters", f"{there}.weight"), Name(f"{here}/bias", f"{there}.bias")


SCORE = Name("score/kernel", "score.weight", transposed=True)  # of every ...ForSequenceClassification over a decoder


class Family(NamedTuple):
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    names: tuple[Name, ...]  # those that a config leaves out (biases, an untied head) are simply not in its tree
    rules: Rules  # (path pattern, PartitionSpec), first match; there is no catch-all
    prefix: str = "model."  # of the names of all but the heads; a checkpoint of the base model alone leaves it out
    # (name, name): where weights are tied, a file may hold one under a second name, which follows that of the first.
    copies: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)
    unused: tuple[str, ...] = ()  # patterns over names of tensors that nothing here computes with: copied as they are
    task: str | None = "CAUSAL_LM"  # PEFT's word for what the model does
    classifier: str = ""  # transformers' class of reward models, or of models of images that classify
    lost: tuple[str, ...] = ()  # of `unused`, those that class has no place for
    parent: str = ""  # the model_type of which this is the vision tower, where that class is of both towers
    # (pattern, replacement): what in names of files transformers' modules are called otherwise, and with them PEFT's.
    modules: tuple[tuple[str, str], ...] = ()
    checkpoints: tuple[str, ...] = ()  # some on the hub whose config.json is one of the family's, for docs/models.md


# Bookkeeping, training-time and generation-time keys: none changes the logits of a loaded model.
HARMLESS = frozenset(
    "_attn_implementation _name_or_path architectures attention_dropout attn_implementation attn_pdrop auto_map "
    "bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size "
    "eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label "
    "initializer_range is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length min_length "
    "model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type "
    "remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers_version transformers.js_config typical_p unsloth_fixed unsloth_version "
    "use_bfloat16 use_cache".split()
)


class Reader:
    """Takes keys out of a config and refuses, at the end, whatever nobody asked for."""

    def __init__(self, config: Mapping[str, Any]):
        self.config, self.used = config, set()

    def __call__(self, key: str, *default: Any) -> Any:
        self.used.add(key)
        value = self.config.get(key)
        if value is not None:
            return value
        if default:
            return default[0]
        near = difflib.get_close_matches(key, self.config, 1)
        hint = f"; did {near[0]!r} mean it?" if near else ""
        raise ValueError(f"config.json has no {key!r}, which {self.config.get('model_type')!r} models need{hint}")

    def expect(self, key: str, *known: Any) -> None:
        """Accepts a key only at values that change nothing here."""
        value = self(key, known[0])
        if value not in known:
            wanted = " or ".join(map(repr, known))
            raise ValueError(f"config.json sets {key!r} to {value!r}; only {wanted} is supported for this family")

    def skip(self, *keys: str) -> None:
        """Accepts keys that concern a part of the model we do not have, at any value."""
        self.used.update(keys)

    def finish(self) -> None:
        unknown = sorted(set(self.config) - self.used - HARMLESS)
        if unknown:
            keys = ", ".join(f"{key!r} = {self.config[key]!r}" for key in unknown)
            raise ValueError(
                f"config.json of {self.config.get('model_type')!r} has keys this family does not know: {keys}. A key"
                " that changes the model must be read in its family file; a harmless one added to HARMLESS."
            )


def read_rope(read: Reader, theta: float = 10_000.0) -> Rope:
    """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5); `theta` is the default."""
    given, old, new = read("rope_theta", None), read("rope_scaling", None), read("rope_parameters", None)
    scaling = dict(new or old or {})
    longest = read("max_position_embeddings", 2048)
    return to_rope(scaling, scaling.pop("rope_theta", given) or theta, longest)


def to_rope(scaling: dict[str, Any], theta: float, longest: int = 2048) -> Rope:
    """A rope of the keys that config.json has for it; `longest` is its max_position_embeddings."""
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    scaling.pop("type", None)
    known = [one for one in KINDS if one != "none"]
    if kind not in known:
        raise ValueError(f"config.json asks for rope type {kind!r}; known are {', '.join(known)}")
    fields = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kind == "yarn":
        fields |= {"beta_fast", "beta_slow", "attention_factor", "truncate"}
        scaling = {key: value for key, value in scaling.items() if value is not None}
    if kind == "longrope":
        fields |= {"short_factor", "long_factor", "attention_factor"}
        scaling = {key: tuple(value) if isinstance(value, list) else value for key, value in scaling.items()}
        scaling.setdefault("factor", longest / scaling.get("original_max_position_embeddings", longest))
    partial = scaling.pop("partial_rotary_factor", None) or 1.0
    if unknown := sorted(set(scaling) - fields):
        raise ValueError(f"config.json's rope settings have keys that are not known: {', '.join(unknown)}")
    if kind != "default" and "factor" not in scaling:
        raise ValueError(f"config.json asks for rope type {kind!r} without its 'factor'")
    needs = {"yarn": ["original_max_position_embeddings"]}
    needs["longrope"] = [*needs["yarn"], "short_factor", "long_factor"]
    for key in needs.get(kind, ()):
        if key not in scaling:
            raise ValueError(f"config.json asks for rope type {kind!r} without its {key!r}")
    original = scaling.pop("original_max_position_embeddings", 8192)
    # transformers stretches "dynamic" from max_position_embeddings on, whatever else the config says.
    scaling["original_max_position"] = longest if kind == "dynamic" else original
    return Rope(theta=float(theta), kind=kind, partial=float(partial), **scaling)


def read_labels(read: Reader) -> int:
    """Reads whether this is a model that scores texts: 1 if so, 0 for a language model.

    Raises:
      ValueError: a classifier of several labels.
    """
    classifiers = [name for name in read("architectures", []) if name.endswith("ForSequenceClassification")]
    count, names = read("num_labels", None), read("id2label", {})
    if not classifiers:
        return 0
    count = len(names) or (2 if count is None else count)  # what transformers means where neither is given
    if count != 1:
        raise ValueError(
            f"config.json names {classifiers[0]} with {count} labels (num_labels, id2label); of classifiers only "
            "reward models and cross-encoders are supported, which have 1"
        )
    return 1


def read_classes(read: Reader, classifier: str) -> int:
    """Reads how many classes a model of images knows; 0 where `classifier` is none of its architectures."""
    named, count, labels = read("architectures", []), read("num_labels", 2), read("id2label", {})
    return (len(labels) or count) if classifier in named else 0


def read_square(read: Reader, key: str, default: int) -> int:
    """Reads the side of a square: a number, or twice the same.

    Raises:
      ValueError: height and width that differ.
    """
    value = read(key, default)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"config.json sets {key!r} to {value!r}; only squares are supported")
    return int(sides.pop())


def with_labels(family: Family, config: ModelConfig, labels: int | None) -> ModelConfig:
    """The config of the same model with `labels` scores of a text, or of an image, in the place of its output layer.

    Args:
      family, config: of a checkpoint.
      labels: of a text 1 for a reward model, 0 for a language model; of an image the number of classes, 0 for its
        vector alone; None for what the checkpoint is.

    Raises:
      ValueError: a model that cannot be that.

    Example:
      >>> from jaxsft.models import FAMILIES
      >>> shape = DecoderConfig(32, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64, tied=True)
      >>> made = with_labels(FAMILIES["llama"], shape, 1)
      >>> made.labels, made.tied
      (1, False)
    """
    labels = config.labels if labels is None else labels
    if isinstance(config, VisionConfig):
        if labels < 0:
            raise ValueError(f"labels is {labels}; it must be the number of classes, or 0 for none")
        return dataclasses.replace(config, labels=labels)
    if labels not in (0, 1):
        raise ValueError(f"labels is {labels}; it must be 1, a reward model, or 0, a language model")
    if config.labels and not labels:
        raise ValueError("this model scores whole texts and has no output layer; choose a ...ForCausalLM")
    if not labels:
        return config
    if isinstance(config, EncoderConfig):
        raise ValueError("an encoder has no score of a text here; reward models are decoders, such as llama")
    if not family.classifier:
        raise ValueError(
            "transformers has no ...ForSequenceClassification of this family, so that nothing could read a reward model"
            " of it; choose another, such as llama or qwen3"
        )
    return config if config.labels else dataclasses.replace(config, labels=labels, tied=False)


def layers_of(config: ModelConfig, path: str) -> int:
    """How many layers the leaves at a path, without its stack's name, stand for: of a stage, or of the network.

    Example:
      >>> layers_of(ResNetConfig(8, (8, 16), (1, 4)), "stage1/layer0/conv/filters")
      4
    """
    if isinstance(config, ResNetConfig | ConvNextConfig):
        stage = int(path.partition("/")[0].removeprefix("stage"))
        return config.depths[stage] if stage < len(config.depths) else 0
    return config.layers


def read_types(read: Reader, default: list[str]) -> list[str]:
    """Reads what kind of attention each layer has: full_attention or sliding_attention.

    Raises:
      ValueError: another kind.
    """
    types = read("layer_types", default)
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"config.json has layer types that are not known: {', '.join(unknown)}")
    return types


def read_shape(read: Reader, rope: Rope | None = None, *, tied: bool = False) -> DecoderConfig:
    """Reads the keys that every Llama-shaped config has; `rope` is given where a family reads its own."""
    hidden, heads, labels = read("hidden_size"), read("num_attention_heads"), read_labels(read)
    rope = read_rope(read) if rope is None else rope
    longest = read("max_position_embeddings", 2048)
    return DecoderConfig(
        vocab_size=read("vocab_size"),
        hidden=hidden,
        mlp_hidden=read("intermediate_size"),
        layers=read("num_hidden_layers"),
        heads=heads,
        kv_heads=read("num_key_value_heads", heads),
        head_dim=read("head_dim", hidden // heads),
        max_position=int(longest * rope.factor) if rope.kind == "dynamic" else longest,
        rope=rope,
        norm_eps=read("rms_norm_eps", 1e-6),
        activation=read("hidden_act", "silu"),
        tied=read("tie_word_embeddings", tied) and not labels,
        labels=labels,
    )


def with_windows(config: DecoderConfig, windows: list[int | None]) -> DecoderConfig:
    """Sets each layer's sliding window, or none at all where no layer has one."""
    if len(windows) != config.layers:
        raise ValueError(f"config.json names {len(windows)} layer types for {config.layers} layers")
    return dataclasses.replace(config, windows=tuple(windows) if any(windows) else None)
