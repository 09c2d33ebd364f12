"""The canonical text of receipts, their digests, and what counts as a receipt."""

from __future__ import annotations

import copy
import json
import random

import pytest
from example_receipt import example_receipt
from hypothesis import given
from hypothesis import strategies as st

from tokasaurus.receipts.form import (
    SECTIONS,
    NotAReceipt,
    altered_parts,
    canonical,
    checked,
    found_in,
    void,
)

# From RFC 8785, appendix B and section 3.2.
NUMBERS = {
    0.0: "0",
    1.0: "1",
    5e-324: "5e-324",
    1.7976931348623157e308: "1.7976931348623157e+308",
    9007199254740992.0: "9007199254740992",
    295147905179352830000.0: "295147905179352830000",
    999999999999999900000.0: "999999999999999900000",
    1e21: "1e+21",
    9.999999999999997e-7: "9.999999999999997e-7",
    1e-6: "0.000001",
    333333333.33333329: "333333333.3333333",
    -0.0000033333333333333333: "-0.0000033333333333333333",
    4.5: "4.5",
    2e-3: "0.002",
    1e-27: "1e-27",
}


def test_numbers_are_written_as_in_rfc_8785():
    assert {value: canonical(value).decode() for value in NUMBERS} == NUMBERS
    assert canonical(-0.0) == b"0"


def test_texts_and_keys_are_written_as_in_rfc_8785():
    text = '\u20ac$\u000f\u000aA\'\u0042"\\\\"/'
    assert canonical(text).decode() == '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'
    # The order of UTF-16, in which an emoji comes before a Hebrew presentation form.
    keys = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    order = ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert list(json.loads(canonical(keys))) == order


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_keeps_its_value(value):
    assert float(canonical(value)) == value


def as_another_program_writes_it(value):
    """The same JSON with another order of keys, and whole numbers without a point."""
    if isinstance(value, dict):
        items = [(key, as_another_program_writes_it(each)) for key, each in value.items()]
        random.Random(0).shuffle(items)
        return dict(items)
    if isinstance(value, list):
        return [as_another_program_writes_it(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def test_a_receipt_survives_other_programs():
    receipt = as_another_program_writes_it(example_receipt())
    written = json.dumps(receipt, indent=3, ensure_ascii=True)
    assert altered_parts(checked(found_in(written))) == []
    # A double has 53 bits: longer numbers are texts.
    numbers: list[int] = []
    json.loads(written, parse_int=lambda digits: numbers.append(int(digits)))
    assert max(numbers) < 1 << 53


def test_a_change_by_hand_is_found_in_its_section():
    for section in SECTIONS:
        receipt = example_receipt()
        place = receipt[section]
        (place[0] if isinstance(place, list) else place)["added"] = 1
        assert altered_parts(receipt) == [section]
    receipt = example_receipt()
    receipt["digests"]["answer"] = receipt["digests"]["request"]
    assert altered_parts(receipt) == ["answer", "digests"]
    receipt = example_receipt()
    receipt["digest"] = "0" * 64
    assert altered_parts(receipt) == ["digests"]


def test_a_receipt_is_found_in_what_clients_keep():
    receipt = example_receipt()
    answer = {"id": "cmpl-1", "choices": [], "receipt": receipt, "usage": {}}
    line = {"id": "b", "response": {"status_code": 200, "body": answer}, "error": None}
    chunk = json.dumps({"id": "cmpl-1", "choices": []})
    stream = f"data: {chunk}\n\ndata: {json.dumps(answer)}\n\ndata: [DONE]\n\n"
    last = {"response": {"id": "resp", "receipt": receipt}, "type": "response.completed"}
    events = f"event: response.completed\ndata: {json.dumps(last)}\n\n"
    # JSON may hold what Python takes for the end of a line.
    separator = json.dumps({**answer, "choices": ["\u2028\x85"]}, ensure_ascii=False)
    raw = f"data: {separator}\r\n\r\ndata: [DONE]\r\n"
    for text in (*map(json.dumps, (receipt, answer, line)), stream, events, raw):
        assert found_in(text) == receipt, text[:40]


def test_what_is_no_receipt_is_refused_with_a_reason():
    incomplete = example_receipt()
    del incomplete["answer"][0]["choices"][0]["token_ids"]
    short = copy.deepcopy(example_receipt())
    short["answer"] = []
    strange, deep = example_receipt(), example_receipt()
    strange["environment"]["threads"] = float("nan")
    deep["environment"]["threads"] = json.loads("[" * 700 + "]" * 700)
    twice = example_receipt()
    twice["answer"][0]["choices"] *= 2
    cases = [
        (json.dumps(twice), "two choices with the same index"),
        (json.dumps({**example_receipt(), "more": 1}), "no receipt has: more"),
        (json.dumps({"receipt_version": json.loads("[" * 700 + "]" * 700)}), "brackets"),
        (json.dumps(strange), "NaN"),
        (json.dumps(deep), "brackets"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"custom_id": "a"}\n{"custom_id": "b"}\n', "several lines; keep the line of one answer"),
        ("[" * 100_000, "not JSON"),
        ("data: {oops\n\n", "not JSON"),
        ("7", "has no receipt"),
        ('{"id": "cmpl-1", "receipt": null}', "has no receipt"),
        ('{"receipt": 7}', "is a JSON object"),
        ('{"receipt_version": 2}', "receipt_version is 2"),
        (json.dumps({"receipt": void("it was aborted")}), "no receipt: it was aborted"),
        ('{"receipt_version": 1}', "not complete"),
        (json.dumps(incomplete), r"not complete: .*token_ids.*answer\[0\]"),
        (json.dumps(short), "1 prompts and 0 answers"),
    ]
    for text, reason in cases:
        with pytest.raises(NotAReceipt, match=reason):
            checked(found_in(text))
