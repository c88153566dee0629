"""Chat with a checkpoint, with or without an adapter, as it streams its answers.

    python scripts/chat.py --model runs/quickstart/merged
    python scripts/chat.py --model BASE --adapter runs/quickstart/adapter --sample.temperature 0.7
    python scripts/chat.py --model BASE --adapters '{calm: runs/a/adapter, wild: runs/b/adapter}'
    python scripts/chat.py --config configs/chat.yaml --ask "Who are you?"
    python scripts/chat.py --model BASE --ask "Count to ten." --sample.stop '["five"]'
    python scripts/chat.py --model BASE --store runs/store

An empty line or Ctrl-D ends the talk; /new forgets it and begins another. With several adapters, of which the first one
answers at first, /use wild lets another one answer, and /use base the model without any; the talk goes on.

With a store of scripts/rag.py, each question is answered from the documents in it, and what the numbers in the answer
stand for is told. A follow-up is searched for as the model writes it to stand alone; that is shown, too.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

from jaxsft import config, data, hub, models, run, sections, talk, voice
from jaxsft.talk import Speaker
from jaxsft.voice import Voice


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
    store: str = ""
    """a store of documents to answer from, made by scripts/rag.py index"""
    retrieval: talk.Config = talk.Config()
    sample: sections.Sample = sections.Sample()


def voices(cfg: Config, model: models.Model, base: Mapping) -> dict[str, Voice]:
    """The base, and each adapter on it, by name; the base's arrays are there once."""
    if cfg.adapter and cfg.adapters:
        raise run.RunError("give either adapter, one folder, or adapters, {name: folder}")
    if "base" in cfg.adapters:
        raise run.RunError("an adapter cannot be called base, which means none; give it another name")
    folders = {**({"adapter": cfg.adapter} if cfg.adapter else cfg.adapters), "base": ""}
    how = {"template": cfg.template, "strings": cfg.sample.stop}
    return {name: voice.load(cfg.model, model, base, adapter=folder, **how) for name, folder in folders.items()}


def main(cfg: Config) -> None:
    model, base = hub.load_variables(cfg.model, quantise=cfg.quantise, dtype=jnp.dtype(cfg.dtype))
    known = voices(cfg, model, base)
    who = next(iter(known.values()))
    find = talk.searcher(cfg.store, cfg.retrieval) if cfg.store else None
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
            who = known.get(name, who)
            print(f"{name} answers" if name in known else f"there is no {name!r}; there are {', '.join(known)}")
            continue
        speaker = Speaker(model, who, cfg.sample)
        key = jax.random.fold_in(jax.random.key(cfg.sample.seed), turn)
        if find is None:
            told = speaker.show(data.prompt_ids([*messages, data.Message("user", said)], who.tokenizer), key)
        else:
            told = talk.reply(said, find, speaker, cfg.retrieval, key, history=messages)
        messages += [data.Message("user", said), data.Message("assistant", told)]
        turn += 1
        if cfg.ask:
            return


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
