"""Structured output in the server: what each spelling means, and what is refused and why."""

from __future__ import annotations

import pytest
from fake_engine import CONFIG, TOKENIZER, with_config
from json_schemas import SCHEMAS
from rows import each_row

from tokasaurus import SamplingParams
from tokasaurus.errors import RequestError
from tokasaurus.grammars import MAX_GRAMMAR_BYTES, GrammarCompiler
from tokasaurus.text.preparation import Preparer

PATH = "/v1/completions"
BASE = {"prompt": "the cat", "max_tokens": 12, "seed": 1}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def grammar_of(server, **fields) -> str:
    server.engine.received.clear()
    answer = server.post(PATH, {**BASE, **fields})
    assert answer.status == 200, answer.error
    (sent,) = server.engine.requests
    return sent.grammar


def accepts(grammar: str, text: str) -> bool:
    """Whether a text is complete under a grammar."""
    compiler = GrammarCompiler(TOKENIZER.vocabulary(CONFIG.eos_token_ids))
    matcher = compiler.compile(grammar)
    ids = TOKENIZER._encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_all_spellings_of_a_constraint_give_the_same_grammar(server):
    schema = {"json_schema": {"name": "x", "schema": SCHEMA, "strict": True}, "type": "json_schema"}
    spellings = [
        {"response_format": schema},
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA, "regex": None, "json_object": False}},
        {"structured_outputs": {"json": SCHEMA}, "response_format": {"type": "text"}},
    ]
    (text,) = {grammar_of(server, **fields) for fields in spellings}
    assert accepts(text, '{"a": 1}')
    assert not accepts(text, '{"a": "1"}')
    assert not accepts(text, '{"a": 1, "b": 1}')
    assert not accepts(text, '{"a": 1}  ')
    for one, other in (
        ({"guided_regex": "[ab]+"}, {"structured_outputs": {"regex": "[ab]+"}}),
        ({"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ({"guided_grammar": 'root ::= "a"'}, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"json_object": True}},
        ),
    ):
        assert grammar_of(server, **one) == grammar_of(server, **other) != ""
    assert grammar_of(server) == grammar_of(server, response_format={"type": "text"}) == ""


def test_each_kind_of_constraint_accepts_what_it_describes(server):
    choice = grammar_of(server, guided_choice=["yes", '"no"', "new\nline", "日本"])
    for text in ("yes", '"no"', "new\nline", "日本"):
        assert accepts(choice, text)
    for text in ("", "ye", "yes!", "no"):
        assert not accepts(choice, text)
    regex = grammar_of(server, guided_regex=r"^\d{2}-[a-z]*$")
    assert accepts(regex, "12-abc")
    assert not accepts(regex, "1-abc")
    for grammar in ('root ::= "a" b\nb ::= [0-9]+', 'start: "a" B\nB: /[0-9]+/'):
        text = grammar_of(server, guided_grammar=grammar)
        assert accepts(text, "a12")
        assert not accepts(text, "a")
    any_object = grammar_of(server, response_format={"type": "json_object"})
    assert accepts(any_object, '{"x": [1, {"y": null}]}')
    assert not accepts(any_object, "[1]")


def test_whitespace_between_the_tokens_of_json(server):
    """By default it is as Python writes it; vLLM's fields, or the library's, change that."""
    schema = {**SCHEMA, "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    default, dense = '{"a": 1, "b": 2}', '{"a":1,"b":2}'
    indented = '{\n  "a": 1,\n  "b": 2\n}'
    endless = '{"a":' + "\n" + " " * 41 + "1}"
    marked = '{__"a":_1,"b":2}'

    def taken(own=None, **options):
        form = {"json": schema if own is None else {**schema, "x-guidance": own}, **options}
        grammar = grammar_of(server, structured_outputs=form)
        texts = (default, dense, indented, endless, marked)
        return [text for text in texts if accepts(grammar, text)]

    assert taken() == [default]
    assert taken(disable_any_whitespace=True) == [dense]
    assert taken(disable_any_whitespace=False) == [default, dense, indented]
    assert taken(whitespace_pattern="_{1,2}") == [dense, marked]
    assert taken(own={"whitespace_flexible": False}) == [dense]
    assert taken(own={"whitespace_flexible": True}) == [default, dense, indented, endless]
    assert taken(own={"whitespace_flexible": True}, disable_any_whitespace=True) == [dense]
    assert taken(own={"coerce_one_of": True}) == [default]


def test_a_schema_that_lists_no_keys_allows_a_space_before_a_bracket(server):
    """A weak model then ends arrays and objects whose size it decides."""
    texts = ("{ }", "{}", '{"a": [1, 2 ] }', '{"a": [1, 2]}', "{  }", "{\n}", '{"a": [1,2]}')
    for form in ({"json_object": True}, {"json": {"type": "object"}}, {"json": {}}):
        grammar = grammar_of(server, structured_outputs=form)
        assert [text for text in texts if accepts(grammar, text)] == list(texts[:4]), form
    nested = {"type": "array", "items": {"type": "object", "properties": {"a": {}}}}
    grammar = grammar_of(server, guided_json=nested)
    assert accepts(grammar, '[{"a": {"b": 1}}]')
    assert not accepts(grammar, '[{"a": 1} ]')


def test_branches_of_one_of_may_overlap(server):
    grammar = grammar_of(server, guided_json={"oneOf": [{"type": "integer"}, {"type": "number"}]})
    assert accepts(grammar, "5")
    assert accepts(grammar, "5.5")
    assert not accepts(grammar, '"5"')


def test_a_grammar_does_not_allow_special_tokens_as_text(server):
    """The spelling of an end-of-sequence token inside a string would end the sample."""
    grammar = grammar_of(server, guided_json={"type": "string"})
    compiler = GrammarCompiler(TOKENIZER.vocabulary(CONFIG.eos_token_ids))
    for token_id in TOKENIZER.special_token_ids:
        matcher = compiler.compile(grammar)
        matcher.consume_tokens(TOKENIZER._encode('"a', add_special_tokens=False))
        assert matcher.validate_tokens([token_id]) == 0


def test_all_schemas_compile(server):
    for schema in SCHEMAS:
        assert grammar_of(server, guided_json=schema)


DEEP = {
    "$ref": "#/$defs/a0",
    "$defs": {
        f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(5000)
    },
}


@each_row(
    "fields, param, said",
    [
        ({"guided_json": {"type": "foo"}}, "guided_json", "Invalid type: foo"),
        ({"guided_json": {"not": {"type": "string"}}}, "guided_json", "Unimplemented keys"),
        ({"guided_json": "{"}, "guided_json", "cannot be compiled"),
        ({"guided_json": False}, "guided_json", "json"),
        *(
            ({"guided_json": {"type": kind, keyword: value}}, "guided_json", keyword)
            for kind, keyword, value in (
                ("array", "contains", {"type": "integer"}),
                ("object", "dependentRequired", {"a": ["b"]}),
                ("object", "if", {"required": ["a"]}),
                ("object", "propertyNames", {"pattern": "a"}),
                ("object", "unevaluatedProperties", False),
            )
        ),
        ({"guided_json": "false"}, "guided_json", "no text"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no finite text"),
        ({"guided_json": {"const": 2**53 + 1}}, "guided_json", "cannot be enforced exactly"),
        ({"guided_json": {"$ref": "http://x/y"}}, "guided_json", "http://x/y"),
        ({"guided_regex": "[0-9"}, "guided_regex", "unclosed character class"),
        ({"guided_regex": 5}, "guided_regex", "string"),
        ({"guided_regex": "a(?=b)"}, "guided_regex", "look-around"),
        ({"guided_choice": []}, "guided_choice", "one or more strings"),
        ({"guided_choice": [1]}, "guided_choice", "one or more strings"),
        ({"guided_choice": "yes"}, "guided_choice", "a list of strings"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "unknown name"),
        ({"guided_grammar": "start: start"}, "guided_grammar", "no text can match"),
        ({"guided_grammar": "nonsense"}, "guided_grammar", "neither Lark nor GBNF"),
        ({"guided_grammar": "start: " + "(" * 9000}, "guided_grammar", "nested"),
        ({"guided_grammar": "root ::= " + "(" * 9000}, "guided_grammar", "cannot be compiled"),
        ({"guided_regex": "a" * MAX_GRAMMAR_BYTES}, "guided_regex", "at most 65536"),
        ({"guided_json": DEEP}, "guided_json", "at most 65536"),
        ({"structured_outputs": {}}, "structured_outputs", "it had none"),
        (
            {"structured_outputs": {"json": {}, "regex": "a"}},
            "structured_outputs",
            "it had json and regex",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs",
            "whitespace",
        ),
        (
            {"structured_outputs": {"choice": ["a"]}, "guided_regex": "a"},
            "guided_regex",
            "combined",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "response_format",
            "combined",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": "json"}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "foo"}},
                }
            },
            "response_format",
            "response_format cannot be compiled: Invalid type",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "structured output"),
    ],
)
def test_a_constraint_that_cannot_be_compiled_is_refused_with_the_reason(
    server, fields, param, said
):
    server.engine.received.clear()
    for path, base in (
        (PATH, BASE),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the cat"}]}),
    ):
        for stream in (False, True):
            answer = server.post(path, {**base, **fields, "stream": stream})
            assert answer.status == 400
            assert answer.error["param"] == param
            assert said in answer.error["message"]
    assert server.engine.requests == []


def test_guided_choices_may_hold_any_characters(server):
    choices = ["a\x7fb", "é😀", "\u2028\x00", 'a"\\/\n']
    grammar = grammar_of(server, guided_choice=choices)
    assert all(accepts(grammar, choice) for choice in choices)
    assert not accepts(grammar, "ab")


def test_chains_of_rules_do_not_overflow_a_stack(server):
    """The library recurses along them, which would end the process on a small stack."""
    chain = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(1200)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**chain, "a1200": {"type": "null"}}}
    assert grammar_of(server, guided_json=schema)
    rules = "\n".join(f"a{i}: a{i + 1}" for i in range(5000))
    assert grammar_of(server, guided_grammar=f'start: a0\n{rules}\na5000: "x"')
    terminals = "\n".join(f'T{i}: T{i + 1} "x"' for i in range(3000))
    assert grammar_of(server, guided_grammar=f'start: T0\n{terminals}\nT3000: "x"')


def test_structured_output_needs_a_model_with_an_end_of_sequence_token():
    preparer = Preparer(with_config(eos_token_ids=()), TOKENIZER)
    with pytest.raises(RequestError, match="end-of-sequence") as caught:
        preparer.prepare([8], SamplingParams(structured_outputs={"regex": "a"}))
    assert caught.value.field == "structured_outputs"


def test_the_grammar_tables_are_built_at_most_once():
    """``prepare_grammars`` builds the library's table of tokens early."""
    asked = []

    class Counting:
        def vocabulary(self, eos_token_ids):
            asked.append(eos_token_ids)
            return TOKENIZER.vocabulary(eos_token_ids)

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

    preparer = Preparer(CONFIG, Counting())
    assert asked == []
    preparer.prepare_grammars()
    preparer.prepare_grammars()
    preparer.prepare([8], SamplingParams(structured_outputs={"regex": "a"}))
    assert asked == [CONFIG.eos_token_ids]
