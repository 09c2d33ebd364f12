"""JSON from clients: how deep it may be, and that recursion over the result is safe."""

from __future__ import annotations

import json

import pytest
from rows import each_row

from tokasaurus import untrusted_json
from tokasaurus.untrusted_json import MAX_DEPTH


@each_row("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth_is_limited(opening, closing):
    count = MAX_DEPTH // (opening.count("[") + opening.count("{"))
    deepest = f"{opening * count}1{closing * count}"
    assert json.dumps(untrusted_json.decode(deepest.encode())).replace(" ", "") == deepest
    for more in (1, 5, 300, 700, 10_000):
        with pytest.raises(ValueError, match="nested"):
            untrusted_json.decode(f"{opening * (count + more)}1{closing * (count + more)}".encode())


def test_wide_values_are_not_deep():
    wide = [[[1]], {"a": [{}]}] * 1000
    assert untrusted_json.decode(json.dumps(wide).encode()) == wide
    brackets = {"a": "[{" * 1000}
    assert untrusted_json.decode(json.dumps(brackets).encode()) == brackets


@each_row(
    "unit, num_values",
    [
        ("[]", 1),
        ("{}", 1),
        ('""', 1),
        (r'"\"[{\\"', 1),
        ('{"a[": "b\'{"}', 3),
        ('[["[", 1]]', 3),
    ],
)
def test_the_number_of_values_is_limited(monkeypatch, unit, num_values):
    """Brackets and quotes in texts do not count."""
    monkeypatch.setattr(untrusted_json, "MAX_VALUES", 601)  # and the list around them
    units = [unit] * (600 // num_values)
    assert len(untrusted_json.decode(f"[{','.join(units)}]".encode())) == len(units)
    for more in ("[]", "{}", '""'):
        with pytest.raises(ValueError, match="more than 601 lists, objects and texts"):
            untrusted_json.decode(f"[{','.join([*units, more])}]".encode())


def test_numbers_and_long_texts_are_few_values(monkeypatch):
    monkeypatch.setattr(untrusted_json, "MAX_VALUES", 10)
    wide = [list(range(1000)), '[{,"' * 1000, None, True]
    assert untrusted_json.decode(json.dumps(wide).encode()) == wide


def test_invalid_json_is_a_value_error():
    texts = (b"", b"{", b"NaN", b"\xff", b'"\xed\xa0\x80"', b'"\\ud800"', b"1e999", b"9" * 5000)
    assert [data for data in texts if not is_refused_with_a_reason(data)] == []


def is_refused_with_a_reason(data):
    try:
        untrusted_json.decode(data)
    except ValueError as error:
        return str(error) != ""
    return False
