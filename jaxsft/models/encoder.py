"""The one encoder, BERT-shaped: post-norm blocks of attention to both sides and a plain MLP, scanned over layers.

Parameters are a nested dict, with the stacks of layers that `decoder` describes:

    embed/table                 [V, D]      what a token is, embed/positions where it stands, embed/types which sentence
    embed/norm/{scale,bias}     [D]
    blocks/0-5/attn/q/kernel    [6, D, D]
    mlm/{dense,norm}/...                    the head that predicts masked tokens; absent in a sentence encoder
    mlm/bias                    [V]         of the scores, beside the table, which is that of the embedding
    rank/{dense,out}/...                    the head that scores two texts together (`relevance`), of a cross-encoder

`features` are the last hidden states or, with the head, what meets the output table: the head's result and a 1 behind
it, as the bias is the table's last column. So scores, and losses that never hold all of them, are those of a decoder.

Left out: dropout other than LoRA's, positions other than learned ones.
Source: Devlin et al. 2018, arXiv:1810.04805; two texts in one row: Nogueira and Cho 2019, arXiv:1901.04085.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxsft import narrow
from jaxsft.models.attention import BOTH_SIDES, Where, attend, choose, describe
from jaxsft.models.layers import ACTIVATIONS, MLP, Dense, LayerNorm, fan_out
from jaxsft.models.model import Model, by_rows, span
from jaxsft.models.remat import rematerialise
from jaxsft.tree import Tree
from jaxsft.types import Key

INIT = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class EncoderConfig:
    """The numbers that make a checkpoint's architecture; families read them from `config.json`."""

    vocab_size: int
    hidden: int
    mlp_hidden: int
    layers: int
    heads: int
    max_position: int  # tokens of the longest document
    first_position: int = 0  # rows of the table of positions before that of a document's first token (RoBERTa: 2)
    types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    mlm: bool = True  # has the head that predicts masked tokens
    mlm_activation: str = "gelu"
    ranks: bool = False  # has the head that scores two texts together
    # Of the scores, as a decoder's: the output layer is the embedding, and nothing bends them.
    tied: ClassVar[bool] = True
    logit_scale: ClassVar[float] = 1.0
    logit_soft_cap: ClassVar[float | None] = None
    labels: ClassVar[int] = 0

    def __post_init__(self):
        for activation in (self.activation, self.mlm_activation):
            if activation not in ACTIVATIONS:
                raise ValueError(f"activation {activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
        if self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads cannot share {self.hidden} features; the one must divide the other")


class Attention(nn.Module):
    config: EncoderConfig
    lora_dropout: float
    kernel: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], where: Where) -> Float[Array, "B T D"]:
        (B, T, D), N = x.shape, self.config.heads
        q, k, v = (y.reshape(B, T, N, D // N) for y in fan_out(self, x, dict.fromkeys("qkv", D), True, init=INIT))
        out = attend(q, k, v, where, causal=False, kernel=self.kernel, mesh=self.mesh)
        return Dense(D, True, self.lora_dropout, INIT, name="o")(out.reshape(B, T, D))


class Block(nn.Module):
    config: EncoderConfig
    lora_dropout: float = 0.0
    kernel: str = "blocks"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x, where: Where):
        c = self.config
        attn = Attention(c, self.lora_dropout, self.kernel, self.mesh, name="attn")
        mlp = MLP(c.mlp_hidden, c.activation, True, self.lora_dropout, INIT, name="mlp")
        x = LayerNorm(c.norm_eps, name="attn_norm")(x + attn(x, where))
        return LayerNorm(c.norm_eps, name="mlp_norm")(x + mlp(x))


class Head(nn.Module):
    """What a masked token is predicted from: one more layer behind the last (Devlin et al. 2018, `run_pretraining`)."""

    config: EncoderConfig
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        x = ACTIVATIONS[c.mlm_activation](Dense(x.shape[-1], True, self.lora_dropout, INIT, name="dense")(x))
        return LayerNorm(c.norm_eps, name="norm")(x)


def _init(config: EncoderConfig, key: Key) -> Tree:
    c, (key_embed, key_blocks, key_head) = config, jax.random.split(key, 3)
    x, where = jnp.zeros((1, 1, c.hidden)), Where(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    one = lambda k: Block(c).init(k, x, where)["params"]
    rows = {"table": c.vocab_size, "positions": c.max_position + c.first_position, "types": c.types}
    keys = dict(zip(rows, jax.random.split(key_embed, len(rows)), strict=True))
    tables = {name: INIT(keys[name], (n, c.hidden)) for name, n in rows.items()}
    params = {
        "embed": {**tables, "norm": {"scale": jnp.ones(c.hidden), "bias": jnp.zeros(c.hidden)}},
        "blocks": {f"0-{c.layers - 1}": jax.vmap(one)(jax.random.split(key_blocks, c.layers))},
    }
    if c.mlm:
        params["mlm"] = {**Head(c).init(key_head, x)["params"], "bias": jnp.zeros(c.vocab_size)}
    if c.ranks:
        widths, keys = {"dense": c.hidden, "out": 1}, jax.random.split(key_head)
        draw = lambda key, width: {"kernel": INIT(key, (c.hidden, width)), "bias": jnp.zeros(width)}
        params["rank"] = {name: draw(key, widths[name]) for name, key in zip(widths, keys, strict=True)}
    return params


def relevance(variables: Mapping, features: Float[Array, "B T D"]) -> Float[Array, "B"]:
    """How well the two texts of each row belong together, w tanh(W x + b) + c of the first token's features x.

    In float32, and before any sigmoid: only the order of several texts beside one question means anything.

    Args:
      variables: of a model whose config has `ranks`.
      features: from `model.features`, with `types` 1 at the second text where the model has them.

    Example:
      >>> model = build(EncoderConfig(32, 8, 16, 2, heads=2, max_position=64, mlm=False, ranks=True))
      >>> variables = {"params": model.init(jax.random.key(0))}
      >>> tokens, types = jnp.arange(6)[None], jnp.array([[0, 0, 0, 1, 1, 1]])
      >>> relevance(variables, model.features(variables, tokens, types=types)).shape
      (1,)
    """
    head = jax.tree.map(lambda x: x.astype(jnp.float32), variables["params"]["rank"])
    line = lambda name, x: jnp.matmul(x, head[name]["kernel"], precision="highest") + head[name]["bias"]
    return line("out", jnp.tanh(line("dense", features[:, 0].astype(jnp.float32))))[:, 0]


def _no_cache(*_) -> NoReturn:
    raise ValueError(
        "an encoder does not generate: it reads a text from both sides at once; choose a decoder, as llama"
    )


def build(
    config: EncoderConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "dots",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
    attention: str = "auto",
) -> Model:
    """Makes the functions of a model; arguments as for `decoder.build`.

    Of a checkpoint with the head, `build(dataclasses.replace(config, mlm=False))` gives the hidden states, from the
    same parameters.

    Returns:
      the model. `features` takes `types` besides, the sentence that each token is of, 0 by default. `output` copies the
      embedding, to put the bias beside it: V x D numbers more while a step runs.
      `read`, `extend` and `cache` raise.

    Raises:
      ValueError: an unknown remat policy, a kernel that attends to one side alone.

    Example:
      >>> model = build(EncoderConfig(32, 8, 16, 2, heads=2, max_position=64))
      >>> variables = {"params": model.init(jax.random.key(0))}
      >>> model.features(variables, jnp.arange(6)[None]).shape, model.output(variables).shape
      ((1, 6, 9), (32, 9))
    """
    again = rematerialise(remat)
    kernel = choose(attention, {BOTH_SIDES}, mesh)
    block, head = Block(config, lora_dropout, kernel, mesh), Head(config, lora_dropout)
    norm = LayerNorm(config.norm_eps)

    def embed(
        params: Mapping, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], types: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        rows = {"table": tokens, "positions": positions + config.first_position}
        rows |= {} if types is None else {"types": types}
        # What a table has no row for is NaN, which training refuses, and not the table's last row.
        parts = [params[name].at[at].get(mode="fill", fill_value=jnp.nan) for name, at in rows.items()]
        parts += [params["types"][0]] if types is None else []
        x = sum(part.astype(jnp.float32) for part in parts)
        return cast(Array, norm.apply({"params": params["norm"]}, x)).astype(dtype)

    def features(variables, tokens, positions=None, segments=None, dropout=None, reads=None, types=None):
        params, lora = variables["params"], variables.get("lora", {})
        if reads is not None:
            raise ValueError(
                "an encoder sees both sides, so what it computes of a prompt depends on the answer, and no two can "
                "share it; load the pairs with share_prompt=False, and leave out reads"
            )
        if positions is None:
            if tokens.shape[1] > config.max_position:
                raise ValueError(f"{tokens.shape[1]} tokens exceed the model's {config.max_position} positions")
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        where = Where(positions, jnp.ones_like(tokens) if segments is None else segments)
        dropouts = lambda key: None if key is None else {"dropout": key}

        def layer(x, inputs):
            weights, key = inputs
            return cast(Array, block.apply(weights, x, where, rngs=dropouts(key))), None

        if {"embed", "head"} & set(lora):
            raise ValueError("embed and head of an encoder take no adapter; leave them out of tuning.lora.targets")
        x = by_rows(embed(params["embed"], tokens, positions, types), mesh)
        beside = {kind: variables.get(kind, {}).get("blocks", {}) for kind in ("lora", "packed")}
        for name, stack in sorted(params["blocks"].items(), key=lambda item: span(item[0]).start):
            layers = span(name)
            weights = {"params": stack} | {kind: stacks[name] for kind, stacks in beside.items() if name in stacks}
            keys = None if dropout is None else jax.random.split(jax.random.fold_in(dropout, layers.start), len(layers))
            x, _ = narrow.scan(layer, x, (weights, keys), again)
        if not config.mlm:
            return x
        key = None if dropout is None else jax.random.fold_in(dropout, config.layers)
        x = head.apply({"params": params["mlm"], "lora": lora.get("mlm", {})}, x, rngs=dropouts(key))
        return jnp.concatenate([cast(Array, x), jnp.ones((*tokens.shape, 1), dtype)], axis=-1)

    def output(variables):
        if not config.mlm:
            raise ValueError(
                "this encoder has no head that predicts masked tokens, so there are no scores; "
                "choose a checkpoint whose config.json names a ...ForMaskedLM among its architectures"
            )
        table, bias = variables["params"]["embed"]["table"], variables["params"]["mlm"]["bias"]
        return jnp.concatenate([table, bias[:, None].astype(table.dtype)], axis=1)

    def learn(*args, **more):
        return features(*args, **more), jnp.float32(0)

    init, none = functools.partial(_init, config), _no_cache
    return Model(config, init, features, learn, output, none, none, none, describe(kernel, mesh), mesh)
