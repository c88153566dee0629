"""TRL's unpaired preferences, for KTO: prompt, completion, and a label that says whether the completion is wanted."""

from typing import Any

from jaxsft.data.chat import Unpaired
from jaxsft.data.formats.turns import expect_order, same_kind, show, tools
from jaxsft.data.rows import DataError

COLUMNS = ("prompt", "completion", "label")


def parse(fields: dict[str, Any]) -> Unpaired:
    """Makes an unpaired answer.

    Raises:
      DataError: label is no boolean, text and messages are mixed, or roles are out of order.

    Example:
      >>> parse({"prompt": "The sky is", "completion": " blue.", "label": True}).label
      True
    """
    prompt, completion = same_kind(fields, "prompt", "completion")
    if not isinstance(label := fields["label"], bool):
        raise DataError(f"label is {show(label)}; expected true or false")
    if not isinstance(prompt, str) and not isinstance(completion, str):
        expect_order(prompt + completion, "prompt + completion", strict=False)
    return Unpaired(prompt, completion, label, tools(fields.get("tools")))
