"""Flags as data: what a field of a dataclass means on a command line.

Owns a flag's metadata and checks, and the table of a dataclass's flags. Knows no particular flag,
and nothing of command-line words, files or processes.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tokasaurus.config.suggestions import Foreign, explain_unknown, nearest
from tokasaurus.config.values import BadValue, convert, split_optional
from tokasaurus.errors import ConfigError

__all__ = [
    "HIDDEN",
    "REQUIRED",
    "Flag",
    "Retired",
    "Schema",
    "UnknownFlag",
    "check_fields",
    "flag",
]

C = TypeVar("C")

REQUIRED: Any = dataclasses.MISSING
HIDDEN = "(hidden)"  # shown in place of a secret


class UnknownFlag(ValueError):
    """A key that is not the name of a flag; the message names the nearest flag."""


@dataclass(frozen=True)
class _Notes:
    """A field's metadata; see :func:`flag`."""

    help: str
    group: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    adapts: str | None = None
    usually: str | None = None
    later: str | None = None
    verbatim: bool = False
    may_be_empty: bool = False
    secret: bool = False


def flag(default: Any = REQUIRED, **notes: Any) -> Any:
    """Makes a dataclass field that is a flag.

    Args:
        default: the default value; without one, the flag is required.
        help: what the flag does, in a sentence or two.
        group: the heading under which the help lists it.
        aliases: other names of the flag.
        choices: the allowed texts, read in any case and stored as spelled here.
        synonyms: other programs' words for choices, in lower case; read as the choices they mean.
        minimum, maximum: inclusive bounds of a number.
        adapts: what None becomes, if that depends on other flags or on the model.
        usually: what None becomes as a rule; documentation shows it as the default.
        later: the feature that this version lacks. Only the default is accepted.
        verbatim: whether the text is taken unchanged, not read as a literal or an expression.
        may_be_empty: whether an empty text is a value.
        secret: whether the value is never shown, in errors or anywhere else.
    """
    made = _Notes(**notes)
    return field(default=default, repr=not made.secret, metadata={"flag": made})


@dataclass(frozen=True)
class Flag:
    """One flag: a name, a form (see ``values``), a default and metadata."""

    name: str
    form: Any
    default: Any
    notes: _Notes

    @property
    def inner_form(self) -> Any:
        return split_optional(self.form)[0]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.notes.aliases)

    @property
    def is_nested(self) -> bool:
        """Whether the value is a dataclass with flags of its own."""
        return dataclasses.is_dataclass(self.inner_form)

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def check(self, value: Any) -> Any:
        """Returns the value, converted to the flag's form.

        Raises:
            BadValue: the value has another type, is out of range, is not one of the choices, or
                asks for a feature that is not available yet.
        """
        value = convert(value, self.form)
        if value is not None and value != "auto":
            self._check_range(value)
        if value is not None and self.notes.choices:
            value = self._choice(value)
        notes = self.notes
        if notes.later is not None and value != self.default:
            raise BadValue(
                f"{notes.later} is not available yet; leave {self.name} at its default"
                f" ({self.default})"
            )
        return value

    def _check_range(self, value: Any) -> None:
        low, high = self.notes.minimum, self.notes.maximum
        if low is not None and value < low:
            raise BadValue(f"must be at least {low}")
        if high is not None and value > high:
            raise BadValue(f"must be at most {high}")
        if value == "" and not self.notes.may_be_empty:
            raise BadValue("must not be empty")

    def _choice(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._choice(item) for item in value)
        by_lower = {choice.lower(): choice for choice in self.notes.choices}
        by_lower.update(self.notes.synonyms)
        if value.lower() not in by_lower:
            near = nearest(value.lower(), by_lower)
            guess = "" if near is None else f"; the nearest is {by_lower[near]}"
            raise BadValue(f"must be one of {', '.join(self.notes.choices)}{guess}")
        return by_lower[value.lower()]


@dataclass(frozen=True)
class Retired:
    """A flag of other versions that has no effect here: accepted with a warning."""

    form: Any
    default: Any
    reason: str


@dataclass(frozen=True)
class Schema(Generic[C]):
    """The command line of a dataclass.

    Args:
        target: the dataclass; every field is made by :func:`flag`, or holds such a dataclass.
        program: the command's name.
        summary: what the command does, for its help.
        shortcuts: what ``.name(...)`` sets: documented functions that return keys and values.
        retired: flags that are accepted and do nothing.
        foreign: other programs' flags, for errors about them.
        reads_files: whether ``config=FILE`` reads the keys of a YAML file.
        examples: command lines for the help.
        commands: what the program does instead if the first word is one of these, for its help.
    """

    target: type[C]
    program: str
    summary: str
    shortcuts: Mapping[str, Callable[..., Mapping[str, Any]]] = field(default_factory=dict)
    retired: Mapping[str, Retired] = field(default_factory=dict)
    foreign: Mapping[str, Foreign] = field(default_factory=dict)
    reads_files: bool = False
    examples: tuple[str, ...] = ()
    commands: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Flag]:
        return iter(flags_of(self.target).values())

    def find(self, key: str) -> Flag:
        """The flag with this name or alias; dashes count as underscores.

        Raises:
            UnknownFlag: there is none.
        """
        reasons = {name: retired.reason for name, retired in self.retired.items()}
        return find_flag(self.target, key, reasons, self.foreign)


_FLAGS: dict[type[Any], Mapping[str, Flag]] = {}  # type hints are slow to evaluate


def flags_of(target: type[Any]) -> Mapping[str, Flag]:
    """The flags of a dataclass by name, in order."""
    if target not in _FLAGS:
        _FLAGS[target] = _read_flags(target)
    return _FLAGS[target]


def _read_flags(target: type[Any]) -> Mapping[str, Flag]:
    forms = typing.get_type_hints(target)
    flags = {}
    for item in dataclasses.fields(target):
        notes = item.metadata.get("flag") or _Notes(help="")
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        flags[item.name] = Flag(item.name, forms[item.name], default, notes)
    return flags


def find_flag(
    target: type[Any],
    key: str,
    more_helps: Mapping[str, str] | None = None,
    foreign: Mapping[str, Foreign] | None = None,
) -> Flag:
    """The flag of a dataclass with this name or alias; see :meth:`Schema.find`."""
    flags = {name: item for item in flags_of(target).values() for name in item.names}
    found = flags.get(key.replace("-", "_"))
    if found is None:
        helps = {name: item.notes.help for name, item in flags.items()}
        raise UnknownFlag(explain_unknown(key, {**helps, **(more_helps or {})}, foreign or {}))
    return found


def check_fields(instance: Any) -> None:
    """Checks and converts every field of a frozen dataclass; its ``__post_init__`` calls this.

    Raises:
        ConfigError: one line for every field at fault.
    """
    problems = []
    for item in flags_of(type(instance)).values():
        if item.is_nested:
            continue  # it has checked itself
        value = getattr(instance, item.name)
        try:
            object.__setattr__(instance, item.name, item.check(value))
        except BadValue as error:
            shown = HIDDEN if item.notes.secret else repr(value)
            problems.append(f"{item.name}={shown}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
