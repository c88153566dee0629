"""Command line and YAML into one typed dataclass: `--config file.yaml --section.key value`.

jsonargparse does the work; this adds the nearest known name to an unknown key, and keeps tracebacks away from users.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar, get_args

C = TypeVar("C")


def parse(kind: type[C], args: Sequence[str] | None = None) -> C:
    """Reads a configuration; the program ends with status 2 and one clear message if it is wrong.

    Args:
      kind: a dataclass, whose fields are values or dataclasses; the string under a field is its help.
      args: the command line without the program's name; that of the process by default.

    Returns:
      an instance of `kind`: its defaults, then the YAML of `--config`, then the command line, later ones first.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     rate: float = 0.1
      ...     steps: int = 10
      >>> parse(Config, ["--rate", "1e-3"])
      Config(rate=0.001, steps=10)
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    summary = (sys.modules[kind.__module__].__doc__ or kind.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file of the keys below, by section")
    parser.add_class_arguments(kind)
    try:
        given = parser.instantiate(parser.parse_args(args))
    except (ArgumentError, TypeError, ValueError) as error:
        words = list(sys.argv[1:] if args is None else args)
        given = [value for word, value in pairwise(words) if word == "--config"]
        where = f" (read from {', '.join(given)} and the command line)" if given else ""
        print(f"error: {explain(str(error), keys(kind) + item_keys(kind))}{where}", file=sys.stderr)
        raise SystemExit(2) from None
    return kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def keys(kind: type, prefix: str = "") -> list[str]:
    """Lists the dotted keys of a dataclass of dataclasses.

    Example:
      >>> from jaxsft.sharding import Config
      >>> keys(Config, "mesh.")
      ['mesh.data', 'mesh.fsdp', 'mesh.tensor']
    """
    found = []
    for field in dataclasses.fields(kind):
        part = field.type
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            found += keys(part, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


def item_keys(kind: type, prefix: str = "") -> list[str]:
    """Lists the dotted keys of dataclasses in lists, which stand behind the key of the list.

    Example:
      >>> from jaxsft.data.load import Config
      >>> item_keys(Config)[:2]
      ['train.path', 'train.format']
    """
    found = []
    for field in dataclasses.fields(kind):
        part = field.type
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            found += item_keys(part, f"{prefix}{field.name}.")
        else:
            found += [key for one in _inside(part) for key in keys(one, f"{prefix}{field.name}.")]
    return found


def _inside(part: object) -> list[type]:
    """The dataclasses that a type like str | list[str | Source] mentions."""
    if isinstance(part, type) and dataclasses.is_dataclass(part):
        return [part]
    return [one for argument in get_args(part) for one in _inside(argument)]


def explain(message: str, known: list[str]) -> str:
    """Adds to a parser's complaint about an unknown key the known one that is nearest to it."""
    group = re.search(r"Group '([^']+)'", message)
    name = re.search(r"(?:unrecognized arguments: --|option |Option )'?([\w.]+)", message)
    if not name:
        return message
    key = f"{group[1]}.{name[1]}" if group else name[1]
    # A key of a list's item comes without its section; then the last words are compared.
    last = {one.rpartition(".")[2]: one for one in reversed(known)}
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    near = near or [last[word] for word in difflib.get_close_matches(key, last, 1)]
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key {key!r}; {hint}--help lists all keys"


def flat(config) -> dict[str, object]:
    """The values of a configuration by dotted key.

    Example:
      >>> from jaxsft.sharding import Config
      >>> flat(Config(fsdp=2))
      {'data': -1, 'fsdp': 2, 'tensor': 1}
    """
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{key}": inner for key, inner in flat(value).items()}
        elif isinstance(value, list):
            plain = lambda one: dataclasses.asdict(one) if dataclasses.is_dataclass(one) else one  # type: ignore[arg-type]
            found[field.name] = [plain(one) for one in value]
        else:
            found[field.name] = value
    return found
