"""The grammar of the command line.

::

    key=value   key=(arithmetic)   a.b.key=value   --key=value   --key value   --switch
    .shortcut   .shortcut(1, key=value)
    --in scope key=value ... in--
    --list key item item ... list--
    --show   --show-memory

Words are read from left to right, and later ones win. Owns how words become keys and values. Knows
no flags, and leaves the meaning of a value to the builder.
"""

from __future__ import annotations

import ast
import re
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any, Generic, TypeVar

from tokasaurus.config.builder import Builder, Texts
from tokasaurus.config.schema import Schema, UnknownFlag
from tokasaurus.config.suggestions import nearest
from tokasaurus.config.values import BadValue, read_text

__all__ = ["Reader"]

C = TypeVar("C")

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")
_SHORTCUT = re.compile(r"\.([A-Za-z_]\w*)(\(.*\))?", re.DOTALL)
_SWITCH_WORDS = frozenset(["t", "f", "true", "false", "yes", "no", "on", "off", "1", "0"])


class Reader(Generic[C]):
    """Reads the words of a command line into a builder.

    Args:
        schema: the flags.
        builder: gets keys and values.
        questions: words that ask for something instead of setting a flag.

    Attributes:
        asked: the questions that were among the words.
    """

    def __init__(
        self, schema: Schema[C], builder: Builder[C], questions: Collection[str] = ()
    ) -> None:
        self.asked: set[str] = set()
        self._questions = questions
        self._schema = schema
        self._builder = builder
        self._scopes: list[str] = []
        self._tokens: deque[str] = deque()

    def read(self, tokens: Iterable[str]) -> None:
        """Reads all words; whatever is wrong with them becomes a problem of the builder."""
        self._tokens.extend(tokens)
        while self._tokens:
            self._read_one(self._tokens.popleft())
        if self._scopes:
            self._builder.problem(f"--in {self._scopes.pop()} has no in-- to end it")
            self._scopes.clear()

    def _read_one(self, token: str) -> None:
        if token in self._questions:
            self.asked.add(token)
        elif token == "--in":
            self._open_scope()
        elif token == "in--":
            self._close_scope()
        elif token == "--list":
            self._read_list()
        elif token.startswith("-") and token.strip("-"):
            self._read_dashed(token)
        elif match := _SHORTCUT.fullmatch(token):
            self._call(match[1], match[2] or "()")
        elif "=" in token:
            key, _, value = token.partition("=")
            self._assign(token, key, value)
        else:
            self._stray(token)

    def _assign(self, token: str, key: str, value: str) -> None:
        if _KEY.fullmatch(key):
            self._builder.assign(".".join((*self._scopes, key)), Texts((value,)))
        else:
            self._builder.problem(f"{token!r}: {key!r} is not a key; expected key=value")

    def _stray(self, token: str) -> None:
        if self._is_switch(token):
            guess = f"{token}=T"
        elif "." not in token and not self._scopes and self._is_known(token):
            guess = f"{token}=..."
        elif (command := nearest(token, self._schema.commands)) is not None:
            guess = f"the command {self._schema.program} {command}"
        else:
            first = min(self._schema, key=lambda flag: not flag.required).name
            guess = f"{first}={token}"
        self._builder.problem(f"{token!r}: expected key=value, perhaps {guess}")

    # --- --key=value, --key value, --switch -------------------------------------------------------

    def _read_dashed(self, token: str) -> None:
        key, equals, value = token.lstrip("-").partition("=")
        if equals:
            self._assign(token, key, value)
        elif not _KEY.fullmatch(key):
            self._stray(token)
        elif self._is_switch(key):
            following = self._tokens[0].lower() if self._tokens else ""
            self._assign(token, key, self._tokens.popleft() if following in _SWITCH_WORDS else "T")
        elif self._is_known(key) and not self._tokens:
            self._builder.problem(f"{token}: a value is missing")
        else:
            unknown_switch = not self._is_known(key) and not self._value_follows()
            self._assign(token, key, "" if unknown_switch else self._tokens.popleft())

    def _is_switch(self, key: str) -> bool:
        if self._scopes or "." in key:
            return False
        retired = self._schema.retired.get(key.replace("-", "_"))
        if retired is not None:
            return retired.form is bool
        try:
            return self._schema.find(key).inner_form is bool
        except UnknownFlag:
            return False

    def _is_known(self, key: str) -> bool:
        name = key.replace("-", "_")
        if self._scopes or "." in key or name in self._schema.retired or name == "config":
            return True
        try:
            self._schema.find(key)
        except UnknownFlag:
            return False
        return True

    def _value_follows(self) -> bool:
        """Whether the next word looks like the value of an unknown flag, and not like a flag."""
        return bool(self._tokens) and not (
            self._tokens[0].startswith("--")
            or _SHORTCUT.fullmatch(self._tokens[0])
            or "=" in self._tokens[0]
        )

    # --- scopes and lists -------------------------------------------------------------------------

    def _open_scope(self) -> None:
        scope = self._tokens.popleft() if self._tokens else ""
        if not _KEY.fullmatch(scope):
            self._builder.problem(f"--in {scope}: expected the name of a scope")
        else:
            self._scopes.append(scope)

    def _close_scope(self) -> None:
        if self._scopes:
            self._scopes.pop()
        else:
            self._builder.problem("in-- without --in")

    def _read_list(self) -> None:
        if "list--" not in self._tokens:
            self._builder.problem("--list has no list-- to end it")
            self._tokens.clear()
            return
        words = []
        while (word := self._tokens.popleft()) != "list--":
            words.append(word)
        if not words or not _KEY.fullmatch(words[0]):
            self._builder.problem("--list: expected a key and its items")
            return
        key = ".".join((*self._scopes, words[0]))
        self._builder.assign(key, Texts(tuple(words[1:]), is_list=True))

    # --- shortcuts --------------------------------------------------------------------------------

    def _call(self, name: str, arguments: str) -> None:
        if self._scopes:
            scope = ".".join(self._scopes)
            self._builder.problem(f".{name}: there are no shortcuts in {scope!r}")
            return
        try:
            args, kwargs = _read_arguments(arguments)
        except BadValue as error:
            self._builder.problem(f".{name}{arguments}: {error}")
        else:
            self._builder.call(name, args, kwargs)


def _read_arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in ``(1, key=value)``; each is a literal, an expression or a bare word."""
    source = f"f{text}"
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise BadValue("broken arguments; expected for example (1, key=2)") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise BadValue("broken arguments; expected for example (1, key=2)")
    args = [_read_argument(source, node) for node in call.args]
    kwargs = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise BadValue("** is not allowed")
        kwargs[keyword.arg] = _read_argument(source, keyword.value)
    return args, kwargs


def _read_argument(source: str, node: ast.expr) -> Any:
    text = ast.get_source_segment(source, node) or ""
    if isinstance(node, ast.Name | ast.Constant | ast.List | ast.Dict):
        return read_text(text, Any)
    return read_text(f"({text})", Any)
