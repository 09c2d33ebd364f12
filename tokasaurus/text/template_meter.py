"""What a chat template may still make: characters, and processor time.

Each operation that can make a long text is charged before it runs, for the most that it may make.
The charges of all operations add up, so the limit is one of memory, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

__all__ = ["GROWING", "Meter", "TemplateLimit"]

GROWING = frozenset(
    {"center", "expandtabs", "join", "ljust", "replace", "rjust", "translate", "zfill"}
)
"""The methods of texts whose results may be longer than the text."""

_ITEM_CHARS = 8  # what an item of a list counts, beside its text
_SCALAR_CHARS = 24  # what a number or None counts
_MAX_BITS = 1 << 16  # of a whole number: the product of two that are longer may take long
_USUAL_INDENT = 8
_LISTS_OF_A_TURN = 64
_TURNS = 16  # from one look at the clock to the next
_DIGITS = re.compile("[0-9]+")  # of a format: perhaps a width
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")
_LISTS = (list, tuple, set, frozenset, dict)
_SEQUENCES = (str, bytes, list, tuple)


class TemplateLimit(TemplateError):
    """A template writes too much or takes too long."""


class Meter:
    """The limits of one template, for one run after the other.

    Args:
        max_chars: that a run may make.
        max_seconds: of processor time that it may take.

    Attributes:
        builds_lists: the template may make a list that has another one several times. Otherwise the
            text of a list is no longer than that of the conversation, and need not be measured.
    """

    def __init__(self, max_chars: int, max_seconds: float) -> None:
        self.builds_lists = False
        self._max_chars, self._max_seconds = max_chars, max_seconds
        self._chars_left = max_chars
        self._num_turns = 0
        self._deadline = 0.0

    def start(self) -> None:
        """A run begins, in this thread."""
        self._chars_left = self._max_chars
        self._deadline = time.thread_time() + self._max_seconds

    def spend(self, num_chars: int) -> None:
        """Charges characters."""
        self._chars_left -= num_chars
        if self._chars_left < 0:
            raise TemplateLimit(f"it writes more than {self._max_chars} characters")

    def turn(self, num_chars: int) -> bool:
        """Charges one turn of a loop, macro or block with this much literal text."""
        self.spend(num_chars)
        self._num_turns += 1
        if self._num_turns % _TURNS == 0 and time.thread_time() > self._deadline:
            raise TemplateLimit(f"it takes more than {self._max_seconds:g} seconds")
        return True

    def written(self, value: Any) -> Any:
        """Charges a value that is output, and returns it."""
        self.spend(len(value) if type(value) is str else self.size(value))
        return value

    def size(self, value: Any) -> int:
        """The characters of a value's text, about. A list that is in two others counts twice."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, _LISTS):
            return _SCALAR_CHARS + (value.bit_length() // 3 if isinstance(value, int) else 0)
        total, stack, num_lists = 0, [value], 0
        while stack:
            each = stack.pop()
            total += _ITEM_CHARS * len(each)
            items: Iterable[Any] = each
            if isinstance(each, dict):
                total += sum([len(key) if type(key) is str else _SCALAR_CHARS for key in each])
                items = each.values()
            for item in items:
                if type(item) is str:
                    total += len(item)
                elif isinstance(item, _LISTS):
                    stack.append(item)
                else:
                    total += len(item) if isinstance(item, (str, bytes)) else _SCALAR_CHARS
            num_lists += 1
            if num_lists % _LISTS_OF_A_TURN == 0:
                self.turn(0)
                if total > self._chars_left:
                    break
        return total

    # --- operators --------------------------------------------------------------------------------

    def sum(self, first: Any, *others: Any) -> Any:
        """``first + other + ...``"""
        values = (first, *others)
        if all(type(value) is str for value in values):
            self.spend(sum(map(len, values)))
            return "".join(values)
        for other in others:
            if isinstance(first, _SEQUENCES) and isinstance(other, _SEQUENCES):
                self.builds_lists = True
                self.spend(_length(first) + _length(other))
            first = first + other
        return first

    def joined(self, *values: Any) -> str:
        """``value ~ value ~ ...``"""
        texts = [value if isinstance(value, str) else self._text(value) for value in values]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def _text(self, value: Any) -> str:
        self.spend(self.size(value))
        return str(value)

    def charge_operator(self, operator: str, left: Any, right: Any) -> None:
        """Charges ``*``, ``**`` and ``%``."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            num_bits = {"*": sum(bits), "**": bits[0] * max(0, right)}.get(operator, 0)
            if num_bits > _MAX_BITS:
                raise TemplateLimit(f"it computes a number of more than {_MAX_BITS} bits")
        elif operator == "*":
            for sequence, number in ((left, right), (right, left)):
                if isinstance(sequence, _SEQUENCES) and isinstance(number, int):
                    self.builds_lists = True
                    self.spend(_length(sequence) * max(0, number))
        elif operator == "%" and isinstance(left, str):
            self.charge_format(left, "%", right)
        elif operator == "%" and isinstance(left, bytes):
            self.charge_format(left.decode("latin-1"), "%", right)

    # --- filters and methods ----------------------------------------------------------------------

    def charge_format(self, template: str, mark: str, arguments: Any) -> None:
        """Charges a format. Each field, which has this mark, may write all arguments."""
        if mark == "%" and "*" in template:
            raise TemplateLimit("it uses a format with *, whose result may have any size")
        if mark == "{" and _NESTED_FIELD.search(template):
            raise TemplateLimit("it uses a field in a field, whose result may have any size")
        widths = sum(int(digits[:18]) for digits in _DIGITS.findall(template))
        self.spend(len(template) + widths + template.count(mark) * self.size(arguments))

    def charge_filter(self, name: str, value: Any, arguments: Sequence[Any]) -> None:
        """Charges a filter.

        Args:
            name: of the filter.
            value: that it is applied to.
            arguments: beside the value.
        """
        if name == "replace":
            self._charge_replacement(str(value), arguments)
        elif name == "format":
            self.charge_format(str(value), "%", arguments)
        elif name == "indent":
            width = arguments[0] if arguments else 4
            width = width if isinstance(width, int) else len(str(width))
            self.spend(len(value) + width * (value.count("\n") + 1))
        elif name == "wordwrap":
            texts = (each for each in arguments if isinstance(each, str))
            self.spend(len(value) * (1 + sum(map(len, texts))))
        elif name == "join":
            separator = len(str(arguments[0])) if arguments else 0
            self.spend(self.size(value) + separator * len(value))
        elif name == "tojson":
            indent = _numbers(arguments)
            if self.builds_lists or indent > _USUAL_INDENT or not isinstance(value, _LISTS):
                self.spend(self.size(value) * (1 + indent))
        elif name in ("batch", "center", "filesizeformat", "round", "slice", "truncate"):
            self.spend(_numbers(arguments) * _ITEM_CHARS)
        else:
            self.spend(self.size(value))

    def charge_method(self, text: Any, name: str, arguments: Sequence[Any]) -> None:
        """Charges a method of a text, one of the growing.

        Args:
            text: or bytes.
            name: of the method.
            arguments: of the method.
        """
        if name == "replace":
            self._charge_replacement(text, arguments)
        elif name == "join":
            self.spend(sum(map(self.size, arguments)) + len(text) * sum(map(len, arguments)))
        elif name == "expandtabs":
            self.spend(len(text) * max(8, _numbers(arguments)))
        elif name == "translate":
            raise TemplateLimit("it uses translate, whose result may have any size")
        else:
            self.spend(_numbers(arguments))

    def _charge_replacement(self, text: Any, arguments: Sequence[Any]) -> None:
        growth = len(str(arguments[1])) - len(str(arguments[0])) if len(arguments) > 1 else 0
        self.spend(len(text) + (text.count(arguments[0]) * growth if growth > 0 else 0))


def _length(value: Any) -> int:
    """What a value takes by itself, without what its items refer to."""
    return len(value) * (1 if isinstance(value, (str, bytes)) else _ITEM_CHARS)


def _numbers(arguments: Iterable[Any]) -> int:
    return sum(abs(each) for each in arguments if isinstance(each, int))
