import pytest

from jaxsft.rag import where
from jaxsft.run import RunError


@pytest.mark.parametrize("condition", ["", "source", "=x", "!=x", "  = y"])
def test_what_is_no_condition_is_told(condition):
    with pytest.raises(RunError, match="a filter is key=value or key!=value, not .*; try source=handbook"):
        where.sql([condition])


@pytest.mark.parametrize("page", ["three", "-1", "1.5", "", "³", "1 OR 1=1"])
def test_a_page_is_a_whole_number(page):
    with pytest.raises(RunError, match="is no page's number"):
        where.sql([f"page={page}"])


def test_values_are_quoted_and_may_hold_any_sign():
    assert where.sql(["source=a'b=c!=d"]) == "(source = 'a''b=c!=d')"
    assert where.sql([" lang = en "]) == where.sql(["lang=en"])
    assert where.sql([]) == ""
