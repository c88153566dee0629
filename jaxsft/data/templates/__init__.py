"""Chat templates: the tokenizer's own, one of these by name, or a .jinja file.

A named template is a file beside this one and a line in `TEMPLATES`, which says what token ends an answer and which
tokens the tokenizer must have. It is for bases that lack a template; a chat model is best taught in its own.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.data.rows import DataError

DEFAULT = "alpaca"  # needs no token of its own


class Template(NamedTuple):
    """A chat template's demands."""

    stop: str | None  # the token that ends an answer; None: the tokenizer's eos
    tokens: tuple[str, ...] = ()  # which the vocabulary must hold


TEMPLATES = {
    "alpaca": Template(None),
    "chatml": Template("<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "deepseek": Template(None),
    "gemma": Template("<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "llama3": Template("<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": Template(None),
    "phi": Template("<|end|>", ("<|user|>", "<|assistant|>", "<|end|>")),
    "plain": Template(None),
    "vicuna": Template(None),
}


def source(name: str) -> str:
    """The jinja text of a named template.

    Example:
      >>> source("plain").splitlines()[0]
      '{#- No roles at all: what was said, a line each; an answer ends with eos. -#}'
    """
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def with_template(tokenizer: Any, template: str = "") -> Any:
    """Gives a tokenizer a chat template, and returns it.

    Args:
      tokenizer: of transformers; it is changed.
      template: a name of `TEMPLATES`, whose stop token becomes the tokenizer's eos; the path of a .jinja file (one
        that holds a named template counts as that); "" keeps the tokenizer's own, or gives it alpaca where it has none.

    Raises:
      DataError: there is no such template, or the vocabulary lacks its tokens.

    Example:
      >>> from types import SimpleNamespace
      >>> with_template(SimpleNamespace(chat_template=None)).chat_template == source("alpaca")
      True
    """
    if not template:
        tokenizer.chat_template = tokenizer.chat_template or source(DEFAULT)
        return tokenizer
    if template not in TEMPLATES:
        file = Path(template).expanduser()
        if not file.is_file():
            names = ", ".join(TEMPLATES)
            raise DataError(f"data.template is {template!r}; give one of {names}, or the path of a .jinja file")
        text = file.read_text(encoding="utf-8")
        template = next((name for name in TEMPLATES if source(name) == text.rstrip("\n")), "")
        if not template:
            tokenizer.chat_template = text
            return tokenizer
    stop, tokens = TEMPLATES[template]
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        free = ", ".join(name for name, one in TEMPLATES.items() if not one.tokens)
        raise DataError(
            f"data.template {template} needs {', '.join(missing)}, which the tokenizer does not have; "
            f"choose one that needs no tokens of its own: {free}"
        )
    if stop:
        tokenizer.eos_token = stop
    elif tokenizer.eos_token is None:
        raise DataError(f"data.template {template} ends answers with eos_token, and the tokenizer has none")
    tokenizer.chat_template = source(template)
    return tokenizer
