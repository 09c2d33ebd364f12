"""Structured output: the form that a client asks of an answer, as the text of a grammar.

There are many spellings and one meaning. Every spelling of the HTTP API becomes
``structured_outputs`` of ``SamplingParams``, and that becomes the text of a grammar. A grammar is
compiled here, so that an impossible one is refused at once, and in the worker, which follows it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from tokasaurus.errors import RequestError
from tokasaurus.grammars import MAX_GRAMMAR_BYTES, GrammarCompiler, Vocabulary
from tokasaurus.text.json_schema import for_grammar, lists_keys
from tokasaurus.untrusted_json import shown

__all__ = [
    "FIELD",
    "Grammars",
    "check_structured_outputs",
    "from_response_format",
    "json_for_grammar",
]

FIELD = "structured_outputs"

# The fields of OpenAI's ``response_format``; name and description are for people.
RESPONSE_FORMAT = ("type", "json_schema")
RESPONSE_SCHEMA = ("schema", "name", "description", "strict")

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace")
# The library's options for JSON. White space is as Python writes it, one space after a colon or a
# comma: a model that may choose goes on with white space where it does not know what to say.
_SEPARATORS = {"item_separator": ", ", "key_separator": ": "}
_ON_ONE_LINE = {**_SEPARATORS, "whitespace_flexible": False}
# Where the model itself decides when an array or an object ends, a space may stand before the
# bracket: after a value, a model that knows little JSON writes a space sooner than a bracket.
_SPACED = {**_SEPARATORS, "whitespace_pattern": " "}
_DENSE = {"whitespace_flexible": False}
# On one line, or on lines with indentation; bounded for the same reason.
_FREE = {"whitespace_pattern": r" |\r?\n[ \t]{0,40}"}
_LIBRARY = "x-guidance"  # where a schema has options of the library
_MAX_KNOWN = 1024  # texts that are remembered to compile


def check_structured_outputs(value: Any) -> Mapping[str, Any]:
    """Checked structured outputs, ``{"json": ...}`` or another kind, without null and false values.

    A false ``disable_any_whitespace`` stays, because it allows more white space than the default.

    Raises:
        RequestError: the value is something else, or has several kinds.
    """
    if not isinstance(value, Mapping):
        raise RequestError(f"{FIELD} must be an object, not {shown(value)}", FIELD)
    options = {
        name: each
        for name, each in value.items()
        if each is not None and (each is not False or name == "disable_any_whitespace")
    }
    unknown = [str(name) for name in options if name not in _KINDS + _OPTIONS]
    if unknown:
        known = ", ".join(_KINDS + _OPTIONS)
        raise RequestError(f"{FIELD} has no {unknown[0]!r}; it may have {known}", FIELD)
    kinds = [kind for kind in _KINDS if kind in options]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise RequestError(f"{FIELD} must have one of {', '.join(_KINDS)}; it had {found}", FIELD)
    for name, types, what in (
        ("json", (str, Mapping, bool), "a JSON schema"),
        ("regex", (str,), "a string"),
        ("grammar", (str,), "a string"),
        ("whitespace_pattern", (str,), "a string"),
        ("json_object", (bool,), "true or false"),
        ("disable_any_whitespace", (bool,), "true or false"),
        ("choice", (list, tuple), "a list of strings"),
    ):
        if name in options and not isinstance(options[name], types):
            raise RequestError(f"{FIELD}: {name} must be {what}, not {shown(options[name])}", FIELD)
    choice = options.get("choice", ("",))
    if not choice or not all(isinstance(each, str) for each in choice):
        raise RequestError(f"{FIELD}: choice must be a list of one or more strings", FIELD)
    if any(options.get(option) for option in _OPTIONS) and kinds[0] not in ("json", "json_object"):
        raise RequestError(f"{FIELD}: {kinds[0]} leaves no room for whitespace options", FIELD)
    return options


def from_response_format(value: Any) -> Mapping[str, Any] | None:
    """OpenAI's ``response_format`` as structured outputs; None for plain text.

    A schema always holds, whether or not it is ``strict``.

    Raises:
        RequestError: the value is not one of OpenAI's formats.
    """
    field = "response_format"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(
            f"{field} must be an object of type text, json_object or json_schema, not"
            f" {shown(value)}",
            field,
        )
    _check_known(value, RESPONSE_FORMAT if kind == "json_schema" else ("type",), field, kind)
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    form = value.get("json_schema")
    schema = form.get("schema") if isinstance(form, Mapping) else None
    if not isinstance(schema, Mapping):
        raise RequestError(
            f'{field} must be {{"type": "json_schema", "json_schema": {{"schema": ...}}}}', field
        )
    _check_known(form, RESPONSE_SCHEMA, field, "json_schema")
    return {"json": schema}


def _check_known(value: Mapping[str, Any], known: Sequence[str], field: str, kind: str) -> None:
    """Raises RequestError if an object has other fields than these, unless they are null."""
    for name, each in value.items():
        if name not in known and each is not None:
            raise RequestError(
                f"{field} of type {kind} has no {name!r}; it may have {', '.join(known)}", field
            )


class Grammars:
    """Turns structured outputs into texts that compile. Several threads may use it.

    Args:
        vocabulary: of the model; called when the first grammar comes, or before.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._vocabulary = vocabulary
        self._compiler: GrammarCompiler | None = None
        self._known: OrderedDict[str, None] = OrderedDict()  # texts that compile, the newest last
        self._lock = threading.Lock()

    def compiler(self) -> GrammarCompiler:
        """The compiler. The first call makes it, and holds up all threads for a second or so."""
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self._vocabulary())
            return self._compiler

    def text(self, options: Mapping[str, Any]) -> str:
        """The text of a grammar. Usually takes milliseconds.

        Args:
            options: checked.

        Raises:
            RequestError: the grammar does not compile; gives the library's reason.
        """
        try:
            text = _text(options)
        except (ValueError, RecursionError, TypeError) as error:
            raise RequestError(f"{FIELD} cannot be compiled: {error}", FIELD) from None
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return text
        compiler = self.compiler()
        try:
            matcher = compiler.compile(text)
            matcher.compute_bitmask()
            if matcher.is_error():
                raise RequestError("no text can match it")
        except RequestError as error:
            raise RequestError(f"{FIELD} cannot be compiled: {error.message}", FIELD) from None
        with self._lock:
            self._known[text] = None
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return text


def _text(options: Mapping[str, Any]) -> str:
    matcher = llguidance.LLMatcher
    if "regex" in options:
        return matcher.grammar_from_regex(options["regex"])
    if "choice" in options:
        choices = " | ".join(json.dumps(each) for each in options["choice"])
        return matcher.grammar_from_lark(f"start: {choices}")
    if "grammar" in options:
        return matcher.grammar_from_lark(_lark(options["grammar"]))
    return matcher.grammar_from_json_schema(json.dumps(json_for_grammar(options)))


def json_for_grammar(options: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema as the library reads it, with its options for white space.

    Args:
        options: of the kind ``json`` or ``json_object``.

    Raises:
        ValueError: no text can match the schema, or it cannot be enforced.
        RecursionError: the schema is nested too deeply.
    """
    schema = options.get("json", {"type": "object"})
    if isinstance(schema, str):
        schema = json.loads(schema)
    default = _ON_ONE_LINE if lists_keys(schema) else _SPACED
    if len(json.dumps(schema)) <= MAX_GRAMMAR_BYTES:  # or the compiler refuses it
        schema = for_grammar(schema)
    if schema is False:
        raise ValueError("no text can match a schema that is false")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object, true or false")
    own = schema.get(_LIBRARY, {})
    if not isinstance(own, dict):
        raise ValueError(f"{_LIBRARY} must be an object")
    return {**schema, _LIBRARY: {"coerce_one_of": True, **_whitespace(own, options, default)}}


def _whitespace(
    own: Mapping[str, Any], options: Mapping[str, Any], default: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The library's options: the request's before the schema's own before the default."""
    spaces = ("item_separator", "key_separator", "whitespace_pattern", "whitespace_flexible")
    rest = {name: each for name, each in own.items() if name not in spaces}
    if options.get("disable_any_whitespace"):
        return {**rest, **_DENSE}
    if "whitespace_pattern" in options:
        return {**rest, "whitespace_pattern": options["whitespace_pattern"]}
    if "disable_any_whitespace" in options:
        return {**rest, **_FREE}
    return own if any(name in own for name in spaces) else {**rest, **default}


def _lark(grammar: str) -> str:
    """A grammar in Lark's notation, from that or from GBNF."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        return grammar  # the compiler refuses it
    try:
        return any_to_lark(grammar)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"it is neither Lark nor GBNF: {error}") from None
