"""Writes the preference data of this folder from the quick start's rows: kind answers, and curt ones.

    python jaxsft/assets/preference/make_pairs.py

sft.jsonl        each row of the quick start twice, with a kind and with a curt end: what a model is taught first
train.jsonl      pairs of the two, of which the kind one is chosen
heldout.jsonl    likewise, of the quick start's held-out rows
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
ROWS = HERE.parent / "quickstart"
KIND = {
    "en": (" Thank you for asking.", " I am glad to help you.", " Have a lovely day."),
    "zh": ("谢谢您的提问。", "很高兴为您效劳。", "祝您一天愉快。"),
}
CURT = {
    "en": (" Stop asking me that.", " I am bored of you.", " Go away now."),
    "zh": ("别再问我了。", "我觉得您真烦人。", "现在请您走开。"),
}


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROWS / name).read_text(encoding="utf-8").splitlines()]


def write(name: str, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / name).write_text(text, encoding="utf-8")


def both(row: dict[str, str], number: int) -> tuple[str, str]:
    """The kind and the curt answer; which words end them goes round with the row's number."""
    answer = row["output"]
    language = "en" if answer.isascii() else "zh"
    ends = KIND[language][number % 3], CURT[language][number // 3 % 3]
    stop = "" if answer[-1] in ".。!！" else {"en": ".", "zh": "。"}[language]
    kind, curt = (f"{answer}{stop}{end}" for end in ends)
    return kind, curt


def main() -> None:
    train, held = read("train.jsonl"), read("heldout.jsonl")
    asked = lambda row: {"instruction": row["instruction"], "input": row["input"]}
    pairs = lambda rows: [
        asked(r) | dict(zip(("chosen", "rejected"), both(r, i), strict=True)) for i, r in enumerate(rows)
    ]
    write("sft.jsonl", [asked(r) | {"output": answer} for i, r in enumerate(train) for answer in both(r, i)])
    write("train.jsonl", pairs(train))
    write("heldout.jsonl", pairs(held))


if __name__ == "__main__":
    main()
