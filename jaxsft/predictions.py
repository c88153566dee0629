"""Answers on disk: `generated_predictions.jsonl`, with the rows that LLaMA-Factory writes, as they come."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.run import RunError, read_metrics

FILE = "generated_predictions.jsonl"
SETTINGS = "generation.json"


class Prediction(NamedTuple):
    """One answer."""

    prompt: str  # as the model read it
    predict: str
    label: str  # the answer that was wanted, "" where the data has none


def append(folder: Path, rows: Sequence[Prediction]) -> None:
    """Writes some more answers."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)


def read(folder: Path) -> list[Prediction]:
    """The answers so far; a last line that a kill cut short is left out.

    Raises:
      RunError: another line is not JSON.
    """
    return [Prediction(**row) for row in read_metrics(folder / FILE)]


def keep(folder: Path, count: int) -> None:
    """Keeps the first answers, and takes out those behind them."""
    kept, part = read(folder)[:count], folder / f"{FILE}.part"
    if kept or (folder / FILE).exists():
        part.write_text("".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        os.replace(part, folder / FILE)


def settle(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes down what decides the answers; refuses to go on with answers that others decided.

    Raises:
      RunError: the folder has answers of other settings.
    """
    file = folder / SETTINGS
    if (folder / FILE).exists() and file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if other := [key for key in settings if known.get(key) != settings[key]]:
            key = other[0]
            raise RunError(
                f"the answers in {folder} were written with {key} {known.get(key)!r}, and now it is {settings[key]!r}; "
                "give the same, or --run.overwrite true to ask everything again"
            )
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
