"""What the rewriting of JSON schemas allows, judged by jsonschema, and what it refuses."""

from __future__ import annotations

import json

import jsonschema
import pytest
from json_schemas import SCHEMAS
from rows import each_row

from tokasaurus.grammars import accepts
from tokasaurus.text.json_schema import FORMATS, for_grammar

INTEGER = {"type": "integer"}
DEFS = {
    "Named": {"type": "object", "properties": {"name": INTEGER}, "required": ["name"]},
    "Node": {"type": "object", "properties": {"v": INTEGER, "next": {"$ref": "#/$defs/Node"}}},
    "Endless": {
        "type": "object",
        "properties": {"next": {"$ref": "#/$defs/Endless"}},
        "required": ["next"],
    },
}


def an_object(**fields):
    return {"type": "object", **fields}


def check(schema, allowed, refused):
    """Compares texts that the grammar should take, and texts that it should not take."""
    written = for_grammar(schema)
    wrong = [text for text in allowed if not accepts(written, text)]
    wrong += [text for text in refused if accepts(written, text)]
    assert wrong == [], written
    for text in allowed:
        jsonschema.validate(json.loads(text), schema)


def test_schemas_that_say_everything_are_not_changed():
    """Apart from bounds for whole numbers that have none."""
    bounds = ', "minimum": -9223372036854774784, "maximum": 9223372036854775808'
    written = [json.dumps(for_grammar(schema)).replace(bounds, "") for schema in SCHEMAS]
    assert written == [json.dumps(schema) for schema in SCHEMAS]


def test_a_whole_number_without_bounds_has_64_bits():
    """A model may go on with digits to the end of its tokens."""
    check({"type": "integer"}, ["0", "-5", str(2**63 - 1)], ["1" * 20, str(-(2**63) - 1), "1.5"])
    check({"type": "integer", "minimum": 5}, ["1" * 30], ["4"])


@each_row(
    "schema, allowed, refused",
    [
        (an_object(properties={"b": INTEGER}), ["{}", '{"b":1}'], ['{"c":1}', '{"b":1,"c":1}']),
        (an_object(properties={}), ["{}"], ['{"c":1}']),
        (an_object(), ["{}", '{"c":1}'], []),
        (an_object(properties={"b": INTEGER}, additionalProperties=True), ['{"c":[]}'], []),
        (an_object(properties={"b": {}}, additionalProperties=INTEGER), ['{"c":1}'], ['{"c":[]}']),
        (an_object(properties={"b": INTEGER}, required=["c"]), ['{"c":[]}'], ["{}", '{"d":1}']),
        (
            an_object(properties={"b": INTEGER}, required=["b"], minProperties=2),
            ['{"b":1,"c":1}'],
            ['{"b":1}'],
        ),
        (
            an_object(properties={"b": INTEGER}, patternProperties={"^x-": {}}),
            ['{"b":1,"x-a":1}'],
            ['{"c":1}'],
        ),
        (
            an_object(properties={"b": an_object(properties={"c": INTEGER})}),
            ['{"b":{"c":1}}'],
            ['{"b":{"d":1}}'],
        ),
        (
            {"type": "array", "items": {"$ref": "#/$defs/Named"}, "$defs": DEFS},
            ['[{"name":1}]'],
            ['[{"name":1,"c":1}]'],
        ),
        (
            {"$defs": DEFS, "allOf": [{"$ref": "#/$defs/Named"}, {"$ref": "#/$defs/Node"}]},
            ['{"name":1,"v":1,"next":{"v":1}}', '{"name":1}'],
            ['{"v":1}', '{"name":1,"c":1}', '{"name":1,"next":{"c":1}}'],
        ),
        (
            {"$defs": DEFS, "$ref": "#/$defs/Named", "properties": {"z": INTEGER}},
            ['{"z":1,"name":1}', '{"name":1}'],
            ['{"z":1}', '{"name":1,"c":1}'],
        ),
        (
            {"$defs": DEFS, "allOf": [{"$ref": "#/$defs/Named"}, {"additionalProperties": True}]},
            ['{"name":1,"c":1}'],
            ["{}"],
        ),
        (
            an_object(
                properties={"kind": {"enum": ["a", "b"]}},
                required=["kind"],
                anyOf=[
                    {"properties": {"kind": {"const": "a"}, "x": INTEGER}},
                    {"properties": {"kind": {"const": "b"}, "y": INTEGER}},
                ],
            ),
            ['{"kind":"a"}', '{"kind":"a","x":1}', '{"kind":"b","y":1}'],
            ['{"kind":"a","y":1}', '{"kind":"b","c":1}', '{"x":1}'],
        ),
        (
            {"anyOf": [an_object(properties={"a": INTEGER}), {"type": "null"}]},
            ["null", '{"a":1}'],
            ['{"b":1}'],
        ),
        ({"const": {"properties": {}, "format": "x"}}, ['{"properties":{},"format":"x"}'], []),
    ],
)
def test_an_object_that_lists_its_properties_is_closed_unless_it_says_otherwise(
    schema, allowed, refused
):
    check(schema, allowed, refused)


def test_a_pattern_of_keys_that_are_all_listed_offers_no_further_key():
    """The library offers a comma after which no token is allowed."""
    schema = an_object(
        properties={"score": INTEGER, "a": INTEGER},
        patternProperties={"^score$": {"minimum": 5}, "^[ab]$": INTEGER},
        additionalProperties=False,
    )
    check(schema, ['{"score":5}', '{"score":5,"a":1,"b":2}'], ['{"score":4}', '{"c":1}'])
    schema["patternProperties"].pop("^[ab]$")
    check(schema, ['{"score":5,"a":1}'], ['{"score":4}'])
    written = for_grammar(schema)
    assert accepts(schema, '{"score":5,"a":1,', whole=False)
    assert not accepts(written, '{"score":5,"a":1,', whole=False)
    with pytest.raises(ValueError, match="at most 64"):
        for_grammar({**schema, "patternProperties": {f"^{i}$": {} for i in range(65)}})


def test_a_schema_that_requires_itself_is_refused_or_left_out():
    endless = {"$ref": "#/$defs/Endless"}
    for schema in (
        {"$ref": "#"},
        {"$defs": DEFS, **endless},
        an_object(**{"$defs": DEFS}, properties={"a": endless}, required=["a"]),
        {"$defs": DEFS, "type": "array", "items": endless, "minItems": 1},
        {"$defs": DEFS, "anyOf": [endless, {"allOf": [endless]}]},
    ):
        with pytest.raises(ValueError, match="no finite text"):
            for_grammar(schema)
    check(an_object(**{"$defs": DEFS}, properties={"a": endless, "b": {}}), ['{"b":1}'], [])
    written = for_grammar(an_object(**{"$defs": DEFS}, properties={"a": endless, "b": {}}))
    assert not accepts(written, '{"a', whole=False)
    check({"$defs": DEFS, "anyOf": [endless, INTEGER]}, ["5"], ["{}"])
    check({"$defs": DEFS, "$ref": "#/$defs/Node"}, ['{"next":{"next":{}}}'], [])


def test_an_unknown_format_is_an_annotation_and_the_known_ones_are_the_librarys():
    known = [*FORMATS, "binary", "byte", "file-path", "idn-email", "iri", "password", "path"]
    found = {name for name in known if _compiles({"type": "string", "format": name})}
    assert found == FORMATS
    for name in ("password", "path", "file-path", "directory-path", "json-string", "made-up"):
        check({"type": "string", "format": name}, ['"x"'], ["5"])
    check({"type": "string", "format": "duration"}, ['"P1D"'], ['"x"'])


def _compiles(schema) -> bool:
    return accepts(schema, "", whole=False)


EDGES = [2**53, 2**53 + 1, 2**53 + 2, 2**53 + 3, 10**18, 10**18 + 1, 2**63 - 1, 2**64 - 1, 10**25]
SIDES = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}


def test_bounds_that_a_double_does_not_hold_are_never_violated():
    wrong = []
    for name, holds in SIDES.items():
        for bound in [*EDGES, *(-edge for edge in EDGES)]:
            try:
                written = for_grammar({"type": "integer", name: bound})
            except ValueError:  # no whole number that the library knows
                assert abs(bound) >= 2**63 - 1, (name, bound)
                continue
            near = [bound + step for step in (-4096, -2, -1, 0, 1, 2, 4096)]
            taken = [value for value in near if accepts(written, str(value))]
            wrong += [(name, bound, value) for value in taken if not holds(value, bound)]
            inside = [v for v in (near[0], near[-1]) if holds(v, bound) and abs(v) < 2**63 - 1024]
            wrong += [(name, bound, value, "missing") for value in inside if value not in taken]
    assert wrong == []
    check({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, ["5", str(2**63 - 1)], [])
    check({"type": "number", "minimum": 2**53 + 1}, [str(2**53 + 2)], [str(2**53)])
    check({"type": ["integer", "null"], "maximum": 2**53 + 1}, ["null", "5"], [str(2**53 + 2)])
    check({"type": "integer", "minimum": 5, "maximum": 25}, ["5", "25"], ["4", "26"])


def test_a_constant_that_the_library_would_round_is_refused():
    for schema in (
        {"const": 2**53 + 1},
        {"enum": [1, -(2**53) - 1]},
        {"const": {"a": [2**64]}},
        an_object(properties={"a": {"const": 1e300}}),
    ):
        with pytest.raises(ValueError, match="cannot be enforced exactly"):
            for_grammar(schema)
    check({"enum": [2**53 + 2, 10**18, 1]}, [str(2**53 + 2), str(10**18)], [str(2**53)])


def test_schemas_that_refer_to_one_another_without_end_are_refused():
    """Each definition is composed of the next one twice."""
    pair = {
        f"a{i}": {"properties": {"x": {}}, "allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}
        for i in range(30)
    }
    with pytest.raises(ValueError, match="too many schemas"):
        for_grammar({"$ref": "#/$defs/a0", "$defs": {**pair, "a30": {}}})
