"""Converts one value from what was written to what a flag's type requires.

Owns the literals of the command line and the conversions between types. Knows no flags. A *form* is
the annotation of a dataclass field: ``str``, ``int``, ``float``, ``bool``, ``tuple[str, ...]``,
``Mapping[str, Any]`` or ``Any``, each possibly ``| None``, or ``int | Literal["auto"] | None``.
"""

from __future__ import annotations

import ast
import copy
import json
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tokasaurus.config.expressions import ExpressionError, evaluate

__all__ = ["BadValue", "convert", "describe", "is_mapping", "read_text", "split_optional"]

_TRUE = frozenset({"t", "true", "yes", "on", "1"})
_FALSE = frozenset({"f", "false", "no", "off", "0"})
_CONSTANTS = {"T": True, "F": False, "True": True, "False": False, "None": None}
_MAX_INT = 2**63


class _IntOrAuto:
    """The form ``int | Literal["auto"]``."""


class BadValue(ValueError):
    """A value that does not fit its form; the message says what was expected."""


def split_optional(form: Any) -> tuple[Any, bool]:
    """The form without ``| None``, and whether it was optional."""
    if typing.get_origin(form) not in (typing.Union, types.UnionType):
        return form, False
    inner = [part for part in typing.get_args(form) if part is not type(None)]
    if inner == [int, Literal["auto"]]:
        return _IntOrAuto, len(inner) < len(typing.get_args(form))
    if len(inner) != 1:
        raise TypeError(f"a flag has one type, not {form}")
    return inner[0], True


def describe(form: Any) -> str:
    """The form in words, as in "expected an integer"."""
    inner, optional = split_optional(form)
    name = _KINDS[_kind(inner)][0]
    return f"{name} or None" if optional else name


def is_mapping(form: Any) -> bool:
    """Whether a value of the form has keys, which can be set one by one."""
    return _kind(split_optional(form)[0]) is Mapping


def _kind(inner: Any) -> Any:
    return typing.get_origin(inner) or inner


# --- from text ------------------------------------------------------------------------------------


def read_text(text: str, form: Any) -> Any:
    """Reads the text after the ``=`` of a flag of this form.

    Raises:
        BadValue: the text cannot be read, or is not a value of the form.
    """
    inner, optional = split_optional(form)
    if text == "None" and (optional or inner is not str):
        return convert(None, form)
    kind = _kind(inner)
    if kind is str:
        return _read_str(text)
    if kind is bool and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    if kind is tuple:
        return _read_texts(text)
    value = _read_any(text)
    if kind in (int, float, _IntOrAuto) and isinstance(value, str) and value != "auto":
        hint = "; put arithmetic in parentheses" if any(c in "()*+/" for c in text) else ""
        raise BadValue(f"expected {describe(form)}{hint}")
    return convert(value, form)


def _read_str(text: str) -> str:
    if _is_parenthesised(text):
        value = _read_parenthesised(text, "; to mean the text itself, put quotes around it")
        return value if isinstance(value, str) else str(value)
    if text[:1] in ("[", "{"):
        value = _read_brackets(text)
        raise BadValue(f"expected text, got {_describe_value(value)}; quotes make it text")
    return _unquoted(text)


def _read_texts(text: str) -> tuple[str, ...]:
    if _is_parenthesised(text) or text[:1] == "[":
        value = _literal(text)
        if value is None:
            raise BadValue("broken list: expected for example ['a', 'b'] or a,b")
        return tuple(convert(value, tuple[str, ...]))
    return tuple(_unquoted(item.strip()) for item in text.split(",")) if text else ()


def _read_any(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _is_parenthesised(text):
        return _read_parenthesised(text)
    if text[:1] in ("[", "{"):
        return _read_brackets(text)
    value = _literal(text)
    return text if value is None else value


def _is_parenthesised(text: str) -> bool:
    return text.startswith("(") and text.endswith(")")


def _read_parenthesised(text: str, hint: str = "") -> Any:
    try:
        return evaluate(text)
    except ExpressionError as error:
        value = _literal(text)  # such as a tuple of texts
        if isinstance(value, str | tuple):
            return value
        raise BadValue(f"{error}{hint}") from None


def _read_brackets(text: str) -> Any:
    value = _literal(text)
    if value is not None:
        return value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        kind = "list" if text[0] == "[" else "mapping"
        raise BadValue(f"broken {kind}: neither a Python literal nor JSON") from None


def _unquoted(text: str) -> str:
    value = _literal(text) if text[:1] in ("'", '"') else None
    return value if isinstance(value, str) else text


def _literal(text: str) -> Any:
    """The Python literal in the text, or None; bytes, sets and complex numbers do not count."""
    if "#" in text and text[:1] not in ("'", '"', "[", "{", "("):  # a comment to Python
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # for "\\d" in a quoted text
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    allowed = (str, int, float, list, tuple, dict)
    return value if isinstance(value, allowed) else None


# --- from objects ---------------------------------------------------------------------------------


def convert(value: Any, form: Any) -> Any:
    """The value in its form: an integral float becomes an int, and a list a tuple.

    Raises:
        BadValue: the value has another type.
    """
    inner, optional = split_optional(form)
    if value is None and optional:
        return None
    if value == "auto" and optional and inner is bool:
        return None
    name, accept = _KINDS[_kind(inner)]
    result = accept(value)
    if result is _NO:
        other = f"{name} or None" if optional else name
        raise BadValue(f"expected {other}, got {_describe_value(value)}")
    return result


_NO = object()


def _to_bool(value: Any) -> Any:
    return bool(value) if isinstance(value, int) and value in (0, 1) else _NO


def _to_int(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _NO
    if not abs(value) < _MAX_INT or int(value) != value:
        return _NO
    return int(value)


def _to_int_or_auto(value: Any) -> Any:
    return value if value == "auto" else _to_int(value)


def _to_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _NO
    return float(value) if abs(value) < float("inf") else _NO


def _to_str(value: Any) -> Any:
    return value if isinstance(value, str) else _NO


def _to_texts(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return _NO
    return tuple(value) if all(isinstance(item, str) for item in value) else _NO


def _to_dict(value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return _NO
    return copy.deepcopy(dict(value))


def _describe_value(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return "text"
    kind = type(value).__name__
    return {"list": "a list", "tuple": "a tuple", "dict": "a mapping"}.get(kind, kind)


_KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    bool: ("true or false", _to_bool),
    int: ("an integer", _to_int),
    _IntOrAuto: ("an integer or auto", _to_int_or_auto),
    float: ("a number", _to_float),
    str: ("text", _to_str),
    tuple: ("a list of texts", _to_texts),
    Mapping: ("a mapping", _to_dict),
    Any: ("anything", lambda value: value),
}
