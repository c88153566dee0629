"""Tokenizers: loaded through transformers, with what decides where an answer ends."""

import os
from pathlib import Path

import jax

from jaxsft.data import chat
from jaxsft.hub.files import CheckpointError, read_json, resolve


def load_tokenizer(path: str):
    """Loads the tokenizer of a folder or hub name; one without a chat template gets the default one.

    Raises:
      CheckpointError: the folder has none that transformers can read without running the folder's own code.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss torch, which nobody needs here
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = resolve(path)
    # AutoTokenizer builds some classes (LlamaTokenizer) anew and drops the normalizer that tokenizer.json has.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder} has no tokenizer that loads ({type(error).__name__}: {error})") from error
    return chat.with_template(tokenizer)


def stop_tokens(path: str, tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's eos and those of the generation config."""
    stops = {tokenizer.eos_token_id} - {None}
    file = resolve(path) / "generation_config.json"
    listed = read_json(file).get("eos_token_id") if file.is_file() else None
    stops |= set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return tuple(sorted(stops))


def save_template(folder: Path, tokenizer) -> None:
    """Writes the chat template beside exported weights where their source had none, so that people ask as we taught."""
    has = (folder / "chat_template.jinja").exists()
    file = folder / "tokenizer_config.json"
    has = has or (file.is_file() and read_json(file).get("chat_template"))
    if not has and jax.process_index() == 0:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
