r"""A reward for the right number, as in GSM8K: reasoning, and what it comes to at the end."""

import re
from decimal import Decimal

# 1,234.5 or 12 or .5; a minus counts where nothing stands before it that it could be subtracted from.
NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])-?\.[0-9]+"
)
# What people and LaTeX write in and around numbers: $ and other currencies, \$, 1{,}234, \!, the Unicode minus.
SPOKEN = (("\\$", ""), ("$", ""), ("€", ""), ("£", ""), ("¥", ""), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("−", "-"))
MARK, BOX = "####", "\\boxed{"


def exact_number(
    prompt: str,
    completion: str,
    answer: str | float | None = None,
    solution: str | float | None = None,
    label: str | float | None = None,
) -> float | None:
    """1 if the answer comes to the same number as the row's `answer`, `solution` or `label`; 0 otherwise.

    Which number of a text that is, `result` says. 18, 18.00 and $18 are the same; 50 and 50% are, 50% and 0.5 not.

    Args:
      prompt: not looked at.
      completion: what the model wrote.
      answer, solution, label: of the row, a number or a text that comes to one; the first that the row has.

    Returns:
      None, which is no reward at all, where the row has none of the three, or none with a number.

    Example:
      >>> row = "She has 9 eggs left and makes 9 * 2 = $<<9*2=18>>18.\\n#### 18"
      >>> exact_number("How much?", "9 eggs at 2 dollars: $18.00 a day.", row), exact_number("How much?", "20.", row)
      (1.0, 0.0)

    Source: Cobbe et al. 2021, arXiv:2110.14168 (the data, and its #### mark).
    """
    given = next((value for value in (answer, solution, label) if value is not None), None)
    right = None if given is None else result(str(given))
    return None if right is None else float(result(completion) == right)


def result(text: str) -> Decimal | None:
    """The number that a text comes to: in its last \\boxed{}, else right behind its last ####, else its last one.

    Example:
      >>> result("So 3 x 400 = \\\\boxed{1{,}200} eggs in 3 days"), result("12 - 5 = 7\\n#### 7 apples for 2")
      (Decimal('1200'), Decimal('7'))
      >>> result("Nobody knows.")
    """
    for written, plain in SPOKEN:
        text = text.replace(written, plain)
    if BOX in text:
        found = NUMBER.findall(_inside(text[text.rindex(BOX) + len(BOX) :]))
        if found:
            return _value(found[-1])
    if MARK in text:
        behind = NUMBER.search(text, text.rindex(MARK))
        if behind:
            return _value(behind[0])
    found = NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _inside(text: str) -> str:
    """What stands before the brace that closes one opened before the text."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:i]
    return text
