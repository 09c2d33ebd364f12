"""A failure in a table names every row that failed, and only these."""

from __future__ import annotations

import pytest
from rows import check_each, each_row


def test_every_row_that_fails_is_named():
    checked = []

    def check(number: int) -> None:
        checked.append(number)
        assert number % 2 == 0, "odd"

    with pytest.raises(AssertionError, match="2 of 4 rows failed") as error:
        check_each([2, 3, 4, 5], check)
    assert checked == [2, 3, 4, 5]
    message = str(error.value)
    assert [f"row {n}: {n + 2}\n" in message for n in range(4)] == [False, True, False, True]
    assert message.count("AssertionError: odd") == message.count("test_each_row.py:") == 2
    check_each([2, 4], check)


def test_an_exception_and_a_missing_exception_fail_a_row():
    def check(key: object) -> None:
        with pytest.raises(KeyError):
            {"present": 1}[key]

    with pytest.raises(AssertionError, match="2 of 3 rows failed") as error:
        check_each(["missing", [], "present"], check)
    assert "TypeError: unhashable" in str(error.value)
    assert "DID NOT RAISE" in str(error.value)


def test_a_table_without_rows_fails():
    with pytest.raises(AssertionError, match="without rows"):
        check_each([], lambda row: None)


@pytest.fixture
def ten() -> int:
    return 10


@pytest.mark.parametrize("sign", [-1, 1])
@each_row("a, b", [(1, 10), (2, 20)])
def test_a_decorated_test_gets_rows_fixtures_and_parameters(ten, sign, a, b):
    assert sign * a * ten == sign * b


@each_row("text", ["a", ""])
def _rows_of_one_name(text):
    assert text


def test_a_decorated_test_fails_with_the_names_of_its_arguments():
    with pytest.raises(AssertionError, match=r"1 of 2 rows failed:\nrow 1: text=''"):
        _rows_of_one_name()
