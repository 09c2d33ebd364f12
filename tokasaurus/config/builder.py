"""Builds one instance of a dataclass from keys and values, in the order in which they come.

Owns assignment (later values win, nested keys, aliases, retired flags, config files), and collects
everything that is wrong, so that the user sees it all at once. Knows nothing of command-line words:
the command line, a config file and keyword arguments all end here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from tokasaurus.config.schema import HIDDEN, Flag, Schema, UnknownFlag, find_flag, flags_of
from tokasaurus.config.suggestions import nearest
from tokasaurus.config.values import BadValue, convert, is_mapping, read_text
from tokasaurus.errors import ConfigError

__all__ = ["Builder", "Parsed", "Texts"]

C = TypeVar("C")

FILE_KEY = "config"


@dataclass(frozen=True)
class Texts:
    """A flag's value as written, still to be read: one text, or the items of a list."""

    items: tuple[str, ...]
    is_list: bool = False

    def __str__(self) -> str:
        return repr(list(self.items) if self.is_list else self.items[0])


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """An instance, and warnings for the user."""

    value: C
    warnings: tuple[str, ...]


class Builder(Generic[C]):
    """Collects assignments, then makes the instance."""

    def __init__(self, schema: Schema[C]) -> None:
        self._schema = schema
        self._values: dict[str, Any] = {}
        self._problems: list[str] = []
        self._warnings: dict[str, None] = {}
        self._source = ""  # precedes each problem, such as the name of a config file
        self._in_file = False

    def assign(self, key: str, value: Any) -> None:
        """Sets a key, dotted if it is nested. ``Texts`` are read according to the flag's form."""
        if key == FILE_KEY and self._schema.reads_files:
            self._read_file(value)
        elif key.replace("-", "_") in self._schema.retired:
            self._retire(key.replace("-", "_"), value)
        else:
            with self._noting(key):
                self._store(self._schema.target, self._values, key, value)

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Runs the shortcut ``.name(*args, **kwargs)``."""
        shortcuts = self._schema.shortcuts
        if name not in shortcuts:
            near = nearest(name, shortcuts)
            others = ", ".join(f".{name}" for name in shortcuts)
            remedy = f"the nearest is .{near}" if near else f"there are {others or 'none'}"
            self.problem(f"unknown shortcut .{name}; {remedy}")
            return
        try:
            call = inspect.signature(shortcuts[name]).bind(*args, **kwargs)
        except TypeError as error:
            self.problem(f".{name}: {error}")
            return
        for key, value in shortcuts[name](*call.args, **call.kwargs).items():
            self.assign(key, value)

    def problem(self, line: str) -> None:
        self._problems.append(f"{self._source}{line}")

    @contextmanager
    def reading(self, source: str) -> Iterator[None]:
        """Names the source of the assignments made inside the block."""
        before, self._source = self._source, f"{source}: "
        try:
            yield
        finally:
            self._source = before

    def value_of(self, name: str) -> Any:
        """The value of a flag so far, or its default."""
        return self._values.get(name, self._schema.find(name).default)

    def finish(self) -> Parsed[C]:
        """Makes the instance.

        Raises:
            ConfigError: one line for each thing that is wrong.
        """
        if self._problems:
            raise ConfigError("\n".join(self._problems))
        missing = [flag for flag in self._schema if flag.required and flag.name not in self._values]
        if missing:
            raise ConfigError(
                "\n".join(f"{flag.name} is required: {flag.notes.help}" for flag in missing)
            )
        value = _instance(self._schema.target, self._values)
        return Parsed(value, tuple(self._warnings))

    @contextmanager
    def _noting(self, key: str) -> Iterator[None]:
        try:
            yield
        except UnknownFlag as error:
            self.problem(str(error))
        except BadValue as error:
            self.problem(f"{key}={error}")

    def _store(
        self, target: type[Any], values: dict[str, Any], key: str, value: Any, scope: str = ""
    ) -> None:
        name, _, rest = key.partition(".")
        flag = self._find(target, name, scope)
        value = self._written(value)
        if flag.is_nested:
            nested = values.setdefault(flag.name, {})
            for below, item in _items(flag, rest, value):
                self._store(flag.inner_form, nested, below, item, f"{scope}{flag.name}.")
        elif rest:
            values[flag.name] = _with_entry(flag, values, rest, value)
        else:
            values[flag.name] = _read_form(
                flag.form, value, flag.notes.verbatim, secret=flag.notes.secret
            )

    def _written(self, value: Any) -> Any:
        """A value; a text from a file will be read like one from the command line."""
        return Texts((value,)) if self._in_file and isinstance(value, str) else value

    def _find(self, target: type[Any], name: str, scope: str) -> Flag:
        if not scope:
            return self._schema.find(name)
        try:
            return find_flag(target, name)
        except UnknownFlag as error:
            raise UnknownFlag(f"in {scope.rstrip('.')!r}: {error}") from None

    def _retire(self, name: str, value: Any) -> None:
        retired = self._schema.retired[name]
        with self._noting(name):
            _read_form(retired.form, self._written(value), verbatim=False)
            self._warnings[f"{name} has no effect: {retired.reason}"] = None

    def _read_file(self, value: Any) -> None:
        path = value.items[0] if isinstance(value, Texts) else str(value)
        if self._in_file:
            self.problem(f"{FILE_KEY}={path}: config files do not include others")
            return
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            self.problem(f"{FILE_KEY}={path}: {error.strerror}")
            return
        except UnicodeDecodeError as error:
            self.problem(f"{FILE_KEY}={path}: not UTF-8 text: {error}")
            return
        except yaml.YAMLError as error:
            self.problem(f"{FILE_KEY}={path}: not YAML: {' '.join(str(error).split())}")
            return
        if content is None:
            return
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            self.problem(f"{FILE_KEY}={path}: expected a mapping of flags to values")
            return
        self._in_file = True
        with self.reading(path):
            for key, item in content.items():
                self.assign(key, item)
        self._in_file = False


def _items(flag: Flag, rest: str, value: Any) -> list[tuple[str, Any]]:
    if rest:
        return [(rest, value)]
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    keys = ", ".join(f"{flag.name}.{name}" for name in flags_of(flag.inner_form))
    raise BadValue(f"{value}: set its keys: {keys}")


def _with_entry(flag: Flag, values: dict[str, Any], rest: str, value: Any) -> dict[str, Any]:
    """The flag's mapping with one more entry, at the dotted path ``rest``."""
    if not is_mapping(flag.form):
        raise UnknownFlag(f"unknown key '{flag.name}.{rest}': {flag.name} has no keys")
    top: dict[str, Any] = convert(values.get(flag.name, flag.default) or {}, flag.form)
    *path, last = rest.split(".")
    level = top
    for part in path:
        below = level.setdefault(part, {})
        if not isinstance(below, dict):
            raise BadValue(f"{value}: {part!r} has no keys")
        level = below
    level[last] = _read_form(Any, value, verbatim=False)
    return top


def _read_form(form: Any, value: Any, verbatim: bool, *, secret: bool = False) -> Any:
    """Reads a value; a BadValue starts with what was written."""
    try:
        if not isinstance(value, Texts):
            return convert(value, form)
        if value.is_list:
            item_form = Any if form is Any else str
            return convert([read_text(item, item_form) for item in value.items], form)
        return value.items[0] if verbatim else read_text(value.items[0], form)
    except BadValue as error:
        shown = HIDDEN if secret else value if isinstance(value, Texts) else repr(value)
        raise BadValue(f"{shown}: {error}") from None


def _instance(target: type[C], values: Mapping[str, Any]) -> C:
    made = dict(values)
    for flag in flags_of(target).values():
        if flag.name in made and flag.is_nested:
            made[flag.name] = _instance(flag.inner_form, made[flag.name])
    return target(**made)
