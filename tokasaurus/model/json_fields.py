"""Typed access to the fields of a model's JSON files. Every error names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokasaurus.errors import ModelError

__all__ = ["JsonFields"]


class JsonFields:
    """One JSON object. A field that is null counts as absent, as in transformers.

    Args:
        values: the object.
        source: the file of the object, for messages.
        prefix: goes before field names in messages about a nested object ("rope_scaling.").
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self._values = values
        self._source = source
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> JsonFields:
        """Reads a file. Raises ModelError if it is unreadable or not a JSON object."""
        try:
            text = path.read_text(encoding="utf-8-sig")  # Windows begins files with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> JsonFields:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{source} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{source} must hold a JSON object, not {type(values).__name__}")
        return cls(values, source)

    def error(self, name: str, complaint: str) -> ModelError:
        """An error about one field, for the caller to raise."""
        return ModelError(f"{self._source}: field {self._prefix + name!r} {complaint}")

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is there and says null."""
        return name in self._values and self._values[name] is None

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def names(self) -> list[str]:
        return [name for name in self._values if name in self]

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """Raises ModelError if it is not an integer, too small, or absent without a default."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None, minimum: float = -math.inf) -> float:
        """Raises ModelError if it is not finite, too small, or absent without a default."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, not {value!r}")
        # Python's JSON reads NaN and Infinity.
        if not math.isfinite(value) or value < minimum:
            raise self.error(name, f"must be finite and at least {minimum}, not {value!r}")
        return float(value)

    def positive(self, name: str, default: float | None = None, maximum: float = math.inf) -> float:
        value = self.number(name, default)
        if not 0 < value <= maximum:
            raise self.error(name, f"must be above 0 and at most {maximum}, not {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._present(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, not {value!r}")
        return value

    def strings(self, name: str) -> list[str]:
        """A list of strings; an absent one is empty."""
        value = self._present(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, f"must be a list of strings, not {value!r}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """One integer or a list of them; an absent field is ()."""
        value = self._present(name, [])
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.error(name, f"must be an integer or a list of integers, not {value!r}")
        return tuple(items)

    def nested(self, name: str) -> JsonFields:
        """The object in a field; an absent one is empty."""
        value = self._present(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {value!r}")
        return JsonFields(value, self._source, f"{self._prefix}{name}.")

    def _present(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        return value
