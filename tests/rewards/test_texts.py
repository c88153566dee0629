import pytest

from jaxsft.rewards import exact_match, prefix_match, regex


def verl_reward(completion: str, answer: str) -> float:
    """Upstream's rule as a loop: each right character, and the end, is worth 1 / (len + 1) up to the first wrong."""
    earned, said, right = 0, [*completion, "end"], [*answer, "end"]
    for i in range(len(right)):
        if i >= len(said) or said[i] != right[i]:
            break
        earned += 1
    return earned / (len(answer) + 1)


@pytest.mark.parametrize("completion", ["7,3,8", "7,3,8,1", "7,3", "7,8,8", "", " 7,3,8", "7,3,8 ", "9"])
def test_prefix_match_is_the_share_up_to_the_first_wrong_character(completion):
    assert prefix_match("", completion, "7,3,8") == verl_reward(completion, "7,3,8")


def test_prefix_match_of_an_empty_answer_is_that_there_is_none():
    assert prefix_match("", "", "") == 1.0
    assert prefix_match("", "x", "") == 0.0


def test_exact_match_minds_case_unless_told_and_no_spaces_around():
    assert exact_match("", "\n Paris ", "Paris") == 1.0
    assert exact_match("", "paris", "Paris") == 0.0
    assert exact_match("", "STRASSE", "straße", ignore_case=True) == 1.0
    assert exact_match("", "42", 42) == 1.0


def test_regex_looks_anywhere_or_at_the_whole():
    assert regex("", "it is 42.", r"\d+") == 1.0
    assert regex("", "it is 42.", r"\d+", whole=True) == 0.0
    assert regex("", "42", r"\d+", whole=True) == 1.0
    assert regex("", "a\nb", "a.b") == 0.0
    assert regex("", "a\nb", "(?s)a.b") == 1.0
