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


def test_invalid_json_is_a_value_error():
    texts = (b"", b"{", b"NaN", b"\xff", b'"\xed\xa0\x80"', b'"\\ud800"', b"1e999", b"9" * 5000)
    assert [data for data in texts if not is_refused_with_a_reason(data)] == []


def is_refused_with_a_reason(data):
    try:
        untrusted_json.decode(data)
    except ValueError as error:
        return str(error) != ""
    return False
