"""Command line and YAML into one typed dataclass: `--config file.yaml --section.key value`.

jsonargparse does the work; this adds the nearest known name to an unknown key, and keeps tracebacks away from users.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

C = TypeVar("C")


def parse(kind: type[C], args: Sequence[str] | None = None, *, command: str = "") -> C:
    """Reads a configuration; the program ends with status 2 and one clear message if it is wrong.

    Args:
      kind: a dataclass, whose fields are values or dataclasses; the string under a field is its help.
      args: the command line without the program's name; that of the process by default.
      command: the word before `args`, of a program that has several; see `commands`.

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
    about = kind.__doc__ if command else sys.modules[kind.__module__].__doc__ or kind.__doc__
    program = f"{Path(sys.argv[0]).name} {command}" if command else None
    parser = ArgumentParser(prog=program, description=(about or "").split("\n")[0], exit_on_error=False)
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


def commands(kinds: Mapping[str, type], args: Sequence[str] | None = None) -> Any:
    """Reads the command line of a program with several commands, of which the first word says which.

    Args:
      kinds: the configuration of each command; the first line of its docstring is its help.
      args: as for `parse`.

    Returns:
      an instance of the command's configuration.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Find:
      ...     query: str = ""
      >>> commands({"find": Find}, ["find", "--query", "lamp"])
      Find(query='lamp')
    """
    words = list(sys.argv[1:] if args is None else args)
    name = words[0] if words else "--help"
    if name in kinds:
        return parse(kinds[name], words[1:], command=name)
    if name in ("-h", "--help"):
        lines = [f"  {known:10} {(kind.__doc__ or '').splitlines()[0]}" for known, kind in kinds.items()]
        program = Path(sys.argv[0]).name
        print(f"usage: {program} COMMAND [--key value ...]\n\ncommands:", *lines, sep="\n")
        print(f"\n{program} COMMAND --help lists the keys of a command")
        raise SystemExit(0)
    near = difflib.get_close_matches(name, kinds, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    print(f"error: unknown command {name!r}; {hint}there are {', '.join(kinds)}", file=sys.stderr)
    raise SystemExit(2)


def keys(kind: type, prefix: str = "") -> list[str]:
    """Lists the dotted keys of a dataclass of dataclasses.

    Example:
      >>> from jaxsft.sharding import Config
      >>> keys(Config, "mesh.")
      ['mesh.data', 'mesh.fsdp', 'mesh.tensor', 'mesh.context', 'mesh.expert', 'mesh.dcn']
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
      {'data': -1, 'fsdp': 2, 'tensor': 1, 'context': 1, 'expert': 1, 'dcn': 'data'}
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
