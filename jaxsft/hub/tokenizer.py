"""Tokenizers: loaded through transformers, with what decides where an answer ends."""

import os
from pathlib import Path

import jax

from jaxsft.data import templates
from jaxsft.hub.files import CheckpointError, read_json, resolve, write_json


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
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one of a BERT's config.json
        raise CheckpointError(f"{folder} has no tokenizer: a tokenizer.json, or a vocab.txt, was expected")
    return templates.with_template(tokenizer)


def stop_tokens(path: str, tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's eos and those of the generation config."""
    stops = {tokenizer.eos_token_id} - {None}
    file = resolve(path) / "generation_config.json"
    listed = read_json(file).get("eos_token_id") if file.is_file() else None
    stops |= set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return tuple(sorted(stops))


def adapter_template(adapter: str) -> str:
    """The path of the chat template that lies with an adapter, "" if there is none."""
    file = Path(adapter) / "chat_template.jinja"
    return str(file) if file.is_file() else ""


def save_template(folder: Path, tokenizer) -> None:
    """Makes exported files ask as we taught: the chat template and the token that ends an answer, where they differ."""
    if jax.process_index() or not isinstance(tokenizer.chat_template, str):  # several templates, those of the base
        return
    settings = folder / "tokenizer_config.json"
    known = read_json(settings) if settings.is_file() else {}
    file = folder / "chat_template.jinja"
    own = file.read_text(encoding="utf-8") if file.is_file() else known.get("chat_template")
    if own != tokenizer.chat_template:
        file.write_text(tokenizer.chat_template, encoding="utf-8")
    if not known:  # an adapter's folder
        return
    eos = known.get("eos_token")
    changed = {key: value for key, value in known.items() if key != "chat_template" or own == tokenizer.chat_template}
    if (eos.get("content") if isinstance(eos, dict) else eos) != tokenizer.eos_token:
        changed["eos_token"] = tokenizer.eos_token
        generation = folder / "generation_config.json"
        write_json(
            generation,
            (read_json(generation) if generation.is_file() else {}) | {"eos_token_id": tokenizer.eos_token_id},
        )
    if changed != known:
        write_json(settings, changed)
