"""What a name means: one of ours, `package.module:function` or `path/to/file.py:function`, and how it is called."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from jaxsft.rewards.formats import json_valid, tags
from jaxsft.rewards.lengths import length, overlong
from jaxsft.rewards.numbers import exact_number
from jaxsft.rewards.texts import exact_match, prefix_match, regex

REWARDS: dict[str, Callable[..., float | None]] = {
    "exact_match": exact_match,
    "exact_number": exact_number,
    "json_valid": json_valid,
    "length": length,
    "overlong": overlong,
    "prefix_match": prefix_match,
    "regex": regex,
    "tags": tags,
}


class RewardError(ValueError):
    """A reward function that cannot be used; the message says why and what to do."""


class Manner(NamedTuple):
    """How a function is called: with what of an episode."""

    batch: bool  # once with lists, as TRL does, rather than once an episode
    takes: list[str] | None  # columns that it is given where a row has them; None: all
    needs: list[str]  # those that it cannot do without
    never: list[str]  # columns that it is not given, since it has something else by that name


class Named(NamedTuple):
    """A function and how it is called."""

    call: Callable[..., Any]
    manner: Manner


def find(name: str, arguments: Mapping[str, Any] | None = None) -> Named:
    """Finds a reward function.

    Args:
      name: a key of `REWARDS`, "package.module:function" or "path/to/file.py:function".
      arguments: keywords that are the same for every episode; a column of the same name is not looked at.

    Returns:
      the function with its arguments filled in, and how it is called: f(prompt, completion, **columns), or with lists
      if it has a parameter `prompts` or `completions`, f(prompts=..., completions=..., **columns).

    Raises:
      RewardError: nothing is there by that name, it takes no such argument, or it cannot be called so.

    Example:
      >>> found = find("regex", {"pattern": "[0-9]+"})
      >>> found.call("How many?", "12 of them"), found.manner
      (1.0, Manner(batch=False, takes=['whole'], needs=[], never=['prompt', 'completion', 'pattern']))
    """
    function = REWARDS.get(name) or _imported(name)
    given = dict(arguments or {})
    return Named(functools.partial(function, **given), _manner(name, function, given))


def _imported(name: str) -> Callable[..., Any]:
    place, _, attribute = name.rpartition(":")
    if not place:
        near = difflib.get_close_matches(name, REWARDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RewardError(
            f"there is no reward function {name!r}{hint} There are {', '.join(REWARDS)}; one of your own is "
            "package.module:function or path/to/file.py:function"
        )
    module = _file(place) if place.endswith(".py") else _module(place)
    found = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "has no function" if found is None else f"has {type(found).__name__}, not a function, at"
        raise RewardError(f"reward function {name}: {place} {what} {attribute!r}; it has {', '.join(own) or 'none'}")
    return found


def _module(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and place.startswith(error.name):
            raise RewardError(
                f"reward function: there is no module {place!r}; it is looked for where Python finds packages and in "
                f"{os.getcwd()}. A file is named by its path, path/to/file.py:function"
            ) from None
        raise


def _file(place: str) -> ModuleType:
    path = os.path.abspath(os.path.expanduser(place))
    if not os.path.isfile(path):
        raise RewardError(f"reward function: there is no file {place} (seen from {os.getcwd()})")
    folder, stem = os.path.split(path)[0], os.path.basename(path)[:-3]
    if folder not in sys.path:  # what stands beside it can be imported, as from a script
        sys.path.append(folder)
    key = f"{stem}@{path}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec
        assert spec.loader
        sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[key])
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def _manner(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Manner:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise RewardError(f"reward function {name} does not say what it takes; wrap it in one that does") from None
    names = [p.name for p in parameters]
    batch = bool({"prompts", "completions"} & set(names))
    fixed = ["prompts", "completions"] if batch else _first_two(name, parameters)
    open_ = any(p.kind is p.VAR_KEYWORD for p in parameters)
    keywords = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in fixed]
    for key in arguments:
        if key in fixed or not (open_ or key in [p.name for p in keywords]):
            known = ", ".join(p.name for p in keywords) or "none"
            raise RewardError(f"reward function {name} has no argument {key!r}; it has {known}")
    rest = [p for p in keywords if p.name not in arguments]
    return Manner(
        batch=batch,
        takes=None if open_ else [p.name for p in rest],
        needs=[p.name for p in rest if p.default is p.empty],
        # A parameter that is positional alone does not stand in the way of a column in **columns.
        never=[p.name for p in parameters if p.name in fixed and p.kind is not p.POSITIONAL_ONLY] + list(arguments),
    )


def _first_two(name: str, parameters: list[inspect.Parameter]) -> list[str]:
    """The parameters that take the prompt and the answer, whatever they are called; none if they go into *args."""
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    own = [p.name for p in parameters]
    swapped = any(word in own and own.index(word) != place for place, word in enumerate(("prompt", "completion")))
    if swapped or (len(places) < 2 and not rest):
        raise RewardError(
            f"reward function {name} takes ({', '.join(own)}); its first two parameters are the prompt and the model's "
            "answer, in this order, then come columns of the row: f(prompt, completion, solution)"
        )
    return [p.name for p in places[:2]]
