"""Chat with a checkpoint, with or without an adapter, as it streams its answers.

    python scripts/chat.py --model runs/quickstart/merged
    python scripts/chat.py --model BASE --adapter runs/quickstart/adapter --sample.temperature 0.7
    python scripts/chat.py --model BASE --adapters '{calm: runs/a/adapter, wild: runs/b/adapter}'
    python scripts/chat.py --config configs/chat.yaml --ask "Who are you?"

An empty line or Ctrl-D ends the talk; /new forgets it and begins another. With several adapters, of which the first one
answers at first, /use wild lets another one answer, and /use base the model without any; the talk goes on.
"""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft import config, data, hub, lora, run, sample, sections


@dataclass(frozen=True)
class Config:
    """Whom to talk to, and how."""

    model: str = ""
    """a folder with config.json and safetensors, or a hub name"""
    adapter: str = ""
    """an adapter folder in PEFT's format, to put on the model"""
    adapters: dict[str, str] = field(default_factory=dict)
    """several of them, {name: folder}, over one base; /use name switches"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of weights and computation"""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """keep the kernels of the layers as int8 or nf4, as for model.quantise: an adapter that was trained over a packed
    base answers on it just as it did then"""
    template: str = ""
    """a chat template by name, or a .jinja file, as for data.template; by default the adapter's or
    the model's own"""
    system: str = ""
    """a system message, where the chat template takes one"""
    ask: str = ""
    """one question: prints the answer and ends"""
    sample: sections.Sample = sections.Sample()


class Voice(NamedTuple):
    """Who answers: variables, and the tokenizer with the chat template that was taught."""

    variables: dict
    tokenizer: Any
    stop: tuple[int, ...]
    strings: sample.Strings | None


def voices(cfg: Config, model, base: dict) -> dict[str, Voice]:
    """The base, and each adapter on it, by name; the base's arrays are there once."""
    if cfg.adapter and cfg.adapters:
        raise run.RunError("give either adapter, one folder, or adapters, {name: folder}")
    if "base" in cfg.adapters:
        raise run.RunError("an adapter cannot be called base, which means none; give it another name")
    family, _ = hub.read_config(hub.resolve(cfg.model))
    found = {}
    for name, folder in {**({"adapter": cfg.adapter} if cfg.adapter else cfg.adapters), "base": ""}.items():
        variables = base
        if folder:
            adapter = hub.load_adapter(folder, hub.on_disk(cfg.model), family=family, config=model.config)
            if "score" in adapter.params:
                raise run.RunError(f"{folder} is the adapter of a reward model, which scores texts and writes none")
            variables = base | jax.tree.map(jnp.asarray, lora.attach(base["params"], adapter))
        template = cfg.template or (hub.adapter_template(folder) if folder else "")
        tokenizer = hub.adapter_tokenizer(folder, cfg.model) if folder else hub.load_tokenizer(cfg.model)
        tokenizer = data.with_template(tokenizer, template)
        strings = sample.stops.compile(cfg.sample.stop, tokenizer)
        found[name] = Voice(variables, tokenizer, hub.stop_tokens(cfg.model, tokenizer), strings)
    return found


def main(cfg: Config) -> None:
    model, base = hub.load_variables(cfg.model, quantise=cfg.quantise, dtype=jnp.dtype(cfg.dtype))
    known = voices(cfg, model, base)
    voice = next(iter(known.values()))
    first = [data.Message("system", cfg.system)] if cfg.system else []
    messages, turn = list(first), 0
    while True:
        try:
            said = cfg.ask or (input("you: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
        except (EOFError, KeyboardInterrupt):
            said = ""
        if not said:
            return
        if said == "/new":
            messages = list(first)
            continue
        command, _, name = said.partition(" ")
        if command == "/use":
            voice = known.get(name, voice)
            print(f"{name} answers" if name in known else f"there is no {name!r}; there are {', '.join(known)}")
            continue
        messages.append(data.Message("user", said))
        tokens = sample.stream(
            model,
            voice.variables,
            data.prompt_ids(messages, voice.tokenizer),
            max_new_tokens=cfg.sample.max_new_tokens,
            draw=cfg.sample.draw,
            stop=voice.stop,
            strings=voice.strings,
            key=jax.random.fold_in(jax.random.key(cfg.sample.seed), turn),
        )
        answer = ""
        for piece in sample.pieces(voice.tokenizer, tokens, cfg.sample.stop):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append(data.Message("assistant", answer))
        turn += 1
        if cfg.ask:
            return


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
