"""Tokenizers: loaded through transformers, with what decides where an answer ends and where padding begins."""

import os
from pathlib import Path

import jax

from jaxsft.data import templates
from jaxsft.hub.files import CheckpointError, read_json, resolve, write_json
from jaxsft.hub.source import read_config
from jaxsft.models import VisionConfig

# Tokens that end no text, the first that a vocabulary has: those named for padding, what stands for nothing, and the
# byte 0xFF, which no UTF-8 holds, as byte-fallback and byte-level vocabularies write it.
PADDING = (
    *("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"),
    *("<|endoftext|>", "<unk>", "<0xFF>", "\u00ff"),
)


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
    return tuple(sorted(stops | _listed(resolve(path) / "generation_config.json")))


def _listed(file: Path) -> set[int]:
    """What a config counts as eos."""
    listed = read_json(file).get("eos_token_id") if file.is_file() else None
    return set(listed if isinstance(listed, list) else [] if listed is None else [listed])


def adapter_tokenizer(adapter: str, base: str):
    """The tokenizer that lies with an adapter, which may have tokens that the base has not, or else the base's."""
    return load_tokenizer(adapter if (Path(adapter) / "tokenizer.json").is_file() else base)


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
    pad_apart(folder)


def pad_apart(folder: Path) -> None:
    """Gives a reward model's folder a token for padding that ends no text; leaves other folders alone.

    transformers scores the last token of a row that is not config.json's pad_token_id. Where that ends texts too, as in
    many a checkpoint that has no other, it scores the token before, which ours are not taught to. The tokenizer's own
    stays, or else config.json's, unless it is what the tokenizer ends a text with, or the model has no row for it. Then
    the first of `PADDING` takes its place, in both. Where there is none it is null: transformers refuses several rows.
    """
    file = folder / "config.json"
    if jax.process_index() or not file.is_file() or not (shape := read_config(folder)[1]).labels:
        return
    if isinstance(shape, VisionConfig):  # a classifier of images pads nothing
        return
    config, stops = read_json(file), _listed(file) | _listed(folder / "generation_config.json")
    has_row = lambda token: token is not None and token < shape.vocab_size
    own = config.get("pad_token_id")
    if not (any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()):
        write_json(file, config | {"pad_token_id": own if has_row(own) and own not in stops else None})
        return
    tokenizer = load_tokenizer(str(folder))
    known, end = tokenizer.get_vocab(), tokenizer.eos_token_id
    named = {token: name for name, token in known.items() if has_row(token)}
    kept = [token for token in (tokenizer.pad_token_id, own) if token != end]
    new = [token for token in map(known.get, PADDING) if token not in stops | {end}]
    chosen = next((token for token in kept + new if token in named), None)
    write_json(file, config | {"pad_token_id": chosen})
    if chosen != tokenizer.pad_token_id:
        settings, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        for said in (settings, older) if older.is_file() else (settings,):
            told = read_json(said) if said.is_file() else {}
            write_json(said, told | {"pad_token": named.get(chosen)})
