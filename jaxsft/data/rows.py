"""A row as it was found, and one that cannot be used."""

from typing import Any, NamedTuple


class DataError(ValueError):
    """The data cannot be used as it is; the message says where and what to do."""


class Row(NamedTuple):
    """One row as it was found."""

    fields: dict[str, Any]
    place: str  # "train.jsonl line 12", "train.json row 3"
    folder: str = ""  # of its file


class Bad(NamedTuple):
    """A row that cannot be used."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"
