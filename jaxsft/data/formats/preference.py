"""TRL's preferences: chosen and rejected, with the prompt beside them or as what both begin with."""

from typing import Any

from jaxsft.data.chat import Preference, Turns
from jaxsft.data.formats.turns import expect_order, judged, same_kind, show, tools
from jaxsft.data.rows import DataError

COLUMNS = ("chosen", "rejected")


def parse(fields: dict[str, Any]) -> Preference:
    """Makes a preference; without a prompt it is the turns, or the text, that both answers share at their start.

    Raises:
      DataError: text and messages mixed, equal answers, roles out of order, a margin that is no number.

    Example:
      >>> parse({"chosen": "The sky is blue.", "rejected": "The sky is green."})[:3]
      ('The sky is', ' blue.', ' green.')
    """
    margin = fields.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise DataError(f"margin is {show(margin)}; expected a number")
    names = ("prompt", "chosen", "rejected") if "prompt" in fields else ("chosen", "rejected")
    *prompt, chosen, rejected = same_kind(fields, *names)
    judged(fields, chosen, rejected)
    start = prompt[0] if prompt else chosen[: _shared(chosen, rejected)]
    if not prompt or not isinstance(start, str):  # messages may repeat an explicit prompt; text never does
        repeats = chosen[: len(start)] == start == rejected[: len(start)]
        chosen, rejected = (side[len(start) :] if repeats else side for side in (chosen, rejected))
    if not isinstance(start, str):
        for side, name in ((chosen, "chosen"), (rejected, "rejected")):
            expect_order((*start, *side), f"prompt + {name}", strict=False)  # type: ignore[misc]
    return Preference(start, chosen, rejected, tools(fields.get("tools")), float(margin))


def _shared(chosen: str | Turns, rejected: str | Turns) -> int:
    """How much both begin with; of text, whole words, the space before the next one left to the answers."""
    most = min(len(chosen), len(rejected))
    count = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if not isinstance(chosen, str):
        return count
    return next((i for i in range(count - 1, 0, -1) if chosen[i].isspace() and not chosen[i - 1].isspace()), 0)
