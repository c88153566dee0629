"""Writes the rows of this folder: digits to count on from, and how well somebody else does so.

    python jaxsft/assets/digits/make_rows.py

A prompt "47190=" asks for the digit that follows each of the five: "58201".

train.jsonl           {"prompt": "47190=", "answer": "58201"}, to learn from by reward
heldout.jsonl         likewise, of other prompts
demonstrations.jsonl  {"prompt", "completion"} of the prompts of train.jsonl, by a sloppy teacher: 30 % are right
train_pairs.jsonl     {"prompt", "chosen", "rejected"}: the answer, and one with a mistake
heldout_pairs.jsonl   likewise, of the prompts of heldout.jsonl
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {"heldout": 100, "train": 800}
DIGITS, DEMONSTRATIONS, RIGHT = 5, 4, 0.3  # of a prompt; for each prompt; the share of those that is right
HABITS = ("copy", "two", "back", "short", "long")  # of the teacher; a reward model meets other mistakes, too
PAIRS = 2  # of each prompt


def onward(digits: list[int], step: int = 1) -> list[int]:
    """Each digit, `step` further on."""
    return [(digit + step) % 10 for digit in digits]


def mistaken(digits: list[int], draw: random.Random, kinds: tuple[str, ...] = HABITS) -> list[int]:
    """A wrong answer: the digits themselves, two further on or one back; the right ones, and too few or too many; some
    of them wrong."""
    kind = draw.choice(kinds)
    if kind == "some":
        wrong = draw.sample(range(DIGITS), draw.randint(1, 2))
        return [(one + draw.randint(1, 9)) % 10 if i in wrong else one for i, one in enumerate(onward(digits))]
    if kind == "short":
        return onward(digits)[: draw.randint(2, DIGITS - 1)]
    if kind == "long":
        return onward(digits) + draw.choices(range(10), k=draw.randint(1, 3))
    return onward(digits, {"copy": 0, "two": 2, "back": -1}[kind])


def text(digits: list[int]) -> str:
    return "".join(map(str, digits))


def write(name: str, rows: list[dict[str, str]]) -> None:
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    draw = random.Random(0)
    numbers = iter(draw.sample(range(10**DIGITS), sum(ROWS.values())))
    for name, count in ROWS.items():
        rows, pairs, demonstrations = [], [], []
        for _ in range(count):
            digits = [int(digit) for digit in f"{next(numbers):0{DIGITS}}"]
            prompt, right = {"prompt": f"{text(digits)}="}, text(onward(digits))
            rows.append(prompt | {"answer": right})
            for _ in range(PAIRS):
                wrong = mistaken(digits, draw, (*HABITS, "some", "some", "some"))
                pairs.append(prompt | {"chosen": right, "rejected": text(wrong)})
            for _ in range(DEMONSTRATIONS):
                shown = right if draw.random() < RIGHT else text(mistaken(digits, draw))
                demonstrations.append(prompt | {"completion": shown})
        write(f"{name}.jsonl", rows)
        write(f"{name}_pairs.jsonl", pairs)
        if name == "train":
            draw.shuffle(demonstrations)
            write("demonstrations.jsonl", demonstrations)


if __name__ == "__main__":
    main()
