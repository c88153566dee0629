"""Who answers: the variables of a checkpoint, with or without an adapter, and the tokenizer that goes with them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsft import data, hub, lora, sample, sharding
from jaxsft.models import Model
from jaxsft.run import RunError


class Voice(NamedTuple):
    """What `sample.generate` and `sample.stream` are asked with."""

    variables: Mapping
    tokenizer: Any  # with the chat template that was taught
    stop: tuple[int, ...]  # tokens that end an answer
    strings: sample.Strings | None  # that end it, too


def load(
    path: str,
    model: Model,
    base: Mapping,
    *,
    adapter: str = "",
    template: str = "",
    strings: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Voice:
    """Puts an adapter on a base, whose arrays are then there once; and finds how it is asked, and where answers end.

    Args:
      path: of the base.
      model, base: from `hub.load_variables`.
      adapter: a folder in PEFT's format, "" for the base alone.
      template: of the chat, by name or a .jinja file; by default the adapter's, or the base's own.
      strings: texts that end an answer, beside the tokenizer's own end.
      mesh: where the base lies.

    Raises:
      RunError: the adapter is that of a reward model.
      CheckpointError, DataError: see `hub.load_adapter`, `data.with_template`.
    """
    variables = base
    if adapter:
        family, _ = hub.read_config(hub.resolve(path))
        found = hub.load_adapter(adapter, hub.on_disk(path), family=family, config=model.config)
        if "score" in found.params:
            raise RunError(f"{adapter} is the adapter of a reward model, which scores texts and writes none")
        place = lambda part, rules: jax.tree.map(jnp.asarray, part)
        if mesh is not None:
            place = lambda part, rules: jax.device_put(part, sharding.shardings(part, rules, mesh))
        found = found._replace(
            lora=place(found.lora, lora.rules(family.rules)), params=place(found.params, family.rules)
        )
        variables = {**base, **lora.attach(base["params"], found)}
    tokenizer = hub.adapter_tokenizer(adapter, path) if adapter else hub.load_tokenizer(path)
    tokenizer = data.with_template(tokenizer, template or (hub.adapter_template(adapter) if adapter else ""))
    stop = hub.stop_tokens(path, tokenizer)
    return Voice(variables, tokenizer, stop, sample.stops.compile(strings, tokenizer))
