import json
from decimal import Decimal
from pathlib import Path

import pytest

from jaxsft.rewards.numbers import exact_number, result

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
TEXTS = [
    ("18", "18"),
    ("It is 18.", "18"),
    ("It is 18.50.", "18.50"),
    ("1,234,567 in all", "1234567"),
    ("$1,080", "1080"),
    (r"\$1{,}080", "1080"),
    ("5 %", "5"),
    ("50%", "50"),
    ("x = -7", "-7"),
    ("x = −7", "-7"),
    ("-$7", "-7"),
    ("$-7", "-7"),
    ("10-4", "4"),
    ("10 - 4 = 6", "6"),
    ("f(2)-3", "3"),
    (".5 of it", "0.5"),
    ("007", "7"),
    ("1, 2, 3", "3"),
    ("3,45", "45"),
    ("4 x 2.5 = 10.0", "10"),
    ("no number", None),
    ("", None),
    ("٣", None),
    # behind the last mark, the number that stands next to it
    ("2 + 2 = 4\n#### 4", "4"),
    ("#### 4\nQuestion 2: 7 + 1?", "4"),
    ("#### 4\n#### 5", "5"),
    ("#### $54,000 for 2", "54000"),
    ("it is 4\n####", "4"),
    # in the last box
    (r"3 of them: \boxed{12}. Check: 5", "12"),
    (r"\boxed{1} or \boxed{2}", "2"),
    (r"\boxed{\text{about } 1{,}200} in 3", "1200"),
    (r"\boxed{x = {12}} of 7", "12"),
    (r"\boxed{12", "12"),
    (r"9 \boxed{none}", "9"),
    ("#### 3 \\boxed{8}", "8"),
]


@pytest.mark.parametrize(("text", "number"), TEXTS, ids=[text[:24] for text, _ in TEXTS])
def test_the_number_that_a_text_comes_to(text, number):
    assert result(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("column", ["answer", "solution", "label"])
def test_the_right_number_may_stand_in_each_of_three_columns_as_text_or_number(column):
    for right in ("work\n#### 1,200", "1200", 1200, 1200.0):
        assert exact_number("", "So 1,200.00 in all", **{column: right}) == 1.0
        assert exact_number("", "So 1,201 in all", **{column: right}) == 0.0
        assert exact_number("", "no idea", **{column: right}) == 0.0


def test_a_row_without_a_right_number_has_no_reward():
    assert exact_number("", "4") is None
    assert exact_number("", "4", answer="Paris") is None


def test_long_numbers_are_compared_digit_by_digit():
    digits = "9" * 5000
    assert exact_number("", digits, answer=digits) == 1.0
    assert exact_number("", digits[:-1] + "8", answer=digits) == 0.0
    assert exact_number("", "0.1", answer="0.10000000000000001") == 0.0


@pytest.mark.skipif(not GSM8K.exists(), reason="shared data is not here")
def test_gsm8k_answers_come_to_what_stands_behind_their_mark():
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        stated = row["answer"].split("#### ")[1].replace(",", "")
        assert result(row["answer"]) == Decimal(stated)
        assert exact_number(row["question"], f"The answer is \\boxed{{{stated}}}.", answer=row["answer"]) == 1.0
        assert exact_number(row["question"], f"#### {int(stated) + 1}", answer=row["answer"]) == 0.0
