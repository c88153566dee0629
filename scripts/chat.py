"""Chat with a checkpoint, with or without an adapter, as it streams its answers.

    python scripts/chat.py --model runs/quickstart/merged
    python scripts/chat.py --model BASE --adapter runs/quickstart/adapter --sample.temperature 0.7
    python scripts/chat.py --config configs/chat.yaml --ask "Who are you?"

An empty line or Ctrl-D ends the talk; /new forgets it and begins another.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxsft import config, data, hub, run, sample, sections


@dataclass(frozen=True)
class Config:
    """Whom to talk to, and how."""

    model: str = ""
    """a folder with config.json and safetensors, or a hub name"""
    adapter: str = ""
    """an adapter folder in PEFT's format, to put on the model"""
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


def pieces(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Decodes as tokens come; holds back what is not yet a whole character."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]


def main(cfg: Config) -> None:
    template = cfg.template or (hub.adapter_template(cfg.adapter) if cfg.adapter else "")
    tokenizer = data.with_template(hub.load_tokenizer(cfg.model), template)
    model, variables = hub.load_variables(cfg.model, quantise=cfg.quantise, dtype=jnp.dtype(cfg.dtype))
    if cfg.adapter:
        family, _ = hub.read_config(hub.resolve(cfg.model))
        variables["lora"], _ = hub.load_adapter(
            cfg.adapter, hub.shapes(model.config), family=family, config=model.config
        )
    stop, draw = hub.stop_tokens(cfg.model, tokenizer), cfg.sample
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
        messages.append(data.Message("user", said))
        tokens = sample.stream(
            model,
            variables,
            data.prompt_ids(messages, tokenizer),
            max_new_tokens=draw.max_new_tokens,
            temperature=draw.temperature,
            top_k=draw.top_k,
            top_p=draw.top_p,
            stop=stop,
            key=jax.random.fold_in(jax.random.key(draw.seed), turn),
        )
        answer = ""
        for piece in pieces(tokenizer, tokens):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append(data.Message("assistant", answer))
        turn += 1
        if cfg.ask:
            return


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
