"""The process that runs reward functions: it is told which, then takes calls and gives an outcome for each.

Messages are JSON over one connection. The first is the functions, [[name, arguments], ...], and the reply how each is
called, or {"error": ...}; every other one is calls, [[function, positional, keywords], ...], and the replies, one each,
{"value": number or null}, {"values": [such outcomes]} of a function that takes lists, or {"error": why}.
"""

import asyncio
import inspect
import json
import math
import os
import queue
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from jaxsft.rewards.named import Named, RewardError, find

Outcome = dict[str, Any]


def main(handle: int) -> None:
    """Serves until the other end closes.

    Args:
      handle: the number of the open file that the connection is.
    """
    link, inbox = Connection(handle), queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, inbox), daemon=True).start()
    try:
        functions = [_found(*spec) for spec in inbox.get() or ()]
    except RewardError as error:
        _reply(link, {"error": str(error)})
        return
    _reply(link, [function.manner._asdict() for function in functions])
    while (calls := inbox.get()) is not None:
        for number, positional, keywords in calls:
            _reply(link, outcome(functions[number], positional, keywords))


def outcome(function: Named, positional: list[Any], keywords: dict[str, Any]) -> Outcome:
    """Calls a function, whatever it does.

    Example:
      >>> outcome(find("exact_match"), ["2 + 2?", "4"], {"answer": "4"})
      {'value': 1.0}
      >>> outcome(find("length"), ["2 + 2?", "4"], {"completion_ids": [4], "target": 0})["error"]
      'ValueError: target is 0 tokens; it must be at least 1 (lengths.py line ... in length)'
    """
    try:
        value = function.call(*positional, **keywords)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        if not function.manner.batch:
            return checked(value)
        values, count = list(value), len(keywords.get("completions", keywords.get("prompts", ())))
    except BaseException as error:  # a function may call sys.exit, too
        return {"error": _told(error, function)}
    if len(values) != count:
        return {
            "error": f"it returned {len(values)} rewards for {count} answers; expected one each, None for no reward"
        }
    return {"values": [checked(one) for one in values]}


def checked(value: Any) -> Outcome:
    """Takes a number, or None or NaN for no reward; anything else is an error.

    Example:
      >>> checked(True), checked(None), checked("1")
      ({'value': 1.0}, {'value': None}, {'error': "it returned '1' (str); expected a number, or None for no reward"})
    """
    number = math.inf
    if not isinstance(value, str | bytes):  # which float would read
        with suppress(Exception):
            number = math.nan if value is None else float(value)
    if math.isinf(number):
        shown = repr(value)
        shown = shown if len(shown) < 80 else f"{shown[:80]}..."
        return {"error": f"it returned {shown} ({type(value).__name__}); expected a number, or None for no reward"}
    return {"value": None if math.isnan(number) else number}


def _found(name: str, arguments: dict[str, Any]) -> Named:
    try:
        return find(name, arguments)
    except RewardError:
        raise
    except BaseException as error:  # the module's own code
        raise RewardError(f"reward function {name} cannot be imported: {_told(error)}") from error


def _told(error: BaseException, function: Named | None = None) -> str:
    """An exception with the last line of the function's own file on its way, or else the last of all."""
    places, trace = [], error.__traceback__
    while trace:
        places.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame.f_code.co_name))
        trace = trace.tb_next
    code = function and getattr(getattr(function.call, "func", None), "__code__", None)
    own = [place for place in places if code and place[0] == code.co_filename]
    file, line, name = (own or places)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(file)} line {line} in {name})"


def _reply(link: Connection, message: Any) -> None:
    link.send_bytes(json.dumps(message).encode())


def _listen(link: Connection, inbox: queue.SimpleQueue) -> None:
    """Hands on what comes; when the other end is gone, so is this process, even out of an endless loop."""
    try:
        while True:
            inbox.put(json.loads(link.recv_bytes()))
    except (EOFError, OSError):
        inbox.put(None)
    time.sleep(1)
    os._exit(1)
