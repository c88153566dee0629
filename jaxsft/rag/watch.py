"""Watching a folder: what changes in it is told a moment later, many changes at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsft.rag.extra import need

SETTLES = 400  # milliseconds without another change: an editor writes a file in several steps
LONGEST = 5_000  # milliseconds that changes are waited for in all


def changes(folder: Path, *, besides: Path | None = None, stop: Any = None) -> Iterator[int]:
    """Gives the number of changed paths each time that something in a folder has changed, until Ctrl-C.

    The first is given at once, and counts nothing: whatever changed before the watch began is to be looked for.

    Args:
      folder: to watch, with all folders in it.
      besides: a folder in it whose changes do not count, such as a store that is written to.
      stop: an event that ends it.
    """
    watchfiles = need("watchfiles")
    hidden = besides.resolve() if besides else None
    counts = lambda _, path: hidden is None or not Path(path).resolve().is_relative_to(hidden)
    how = {"debounce": LONGEST, "step": SETTLES, "rust_timeout": 200, "yield_on_timeout": True}
    first = True
    for found in watchfiles.watch(folder, watch_filter=counts, stop_event=stop, raise_interrupt=False, **how):
        if found or first:
            yield len(found)
        first = False
