"""The reference of flags, as data and as the Markdown page ``docs/configuration.md``.

To write the page::

    python -m tokasaurus.config.reference > docs/configuration.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokasaurus.config.engine import ENGINE
from tokasaurus.config.schema import Flag, Schema, flags_of
from tokasaurus.config.values import describe

__all__ = ["Row", "Section", "markdown", "sections"]

_LATER = "Not available yet"
_RETIRED = "Accepted without effect"

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m tokasaurus.config.reference`; a test compares the two. -->

Configure an engine with `key=value` arguments of `toka`, with the same keys in a YAML file, or with
keyword arguments in Python. `toka --help` prints this reference, and `toka ... --show` prints the
resulting configuration.

```bash
toka model=meta-llama/Llama-3.2-1B-Instruct port=8080 kv_cache_num_tokens='(128 * 1024)'
```

## Syntax

| syntax | meaning |
|---|---|
| `key=value` | split at the first `=`, so `key=a=b` sets the text `a=b` |
| `--key=value`, `--key value` | the same |
| `--key` | sets a true-or-false flag to true |
| `a.b=value` | a nested key, such as `rope_scaling.factor=2.0` |
| `T`, `F` | true and false, also `true`/`false`, `yes`/`no`, `on`/`off`, `1`/`0`, in any case |
| `None` | the default of a flag that adapts |
| `1024`, `1e6`, `2.5` | numbers; a whole number may be written with an exponent |
| `'(128 * 1024)'` | arithmetic: `+ - * / // % **`, parentheses, `min`, `max`, `int`, `round` |
| `a,b` or `['a', 'b']` | a list |
| `{...}` | a mapping, as a Python literal or as JSON |
| anything else | text; with quotes inside the value, as in `"'(text)'"`, always text |
| `--list key a b list--` | a list |
| `--in a b=1 c=2 in--` | the keys `a.b` and `a.c` |
| `config=file.yaml` | the keys of a file, in the place of this argument |
| `.uvsh` | `uvicorn_log_level=warning` |
| `.dmanager`, `.dmodel` | `local_proc_name=manager` or `model`, which runs in the foreground |
| `.par(dp=2, pp=2, tp=1)` | `dp_size`, `pp_size` and `tp_size` |
| `--show` | print the configuration as YAML, which `config=` reads back, and exit |
| `--show-memory` | print what takes how much memory, as a table, and exit (`toka` only) |
| `--version` | print the version and exit |
| `--help`, `-h` or just `help` | print the help and exit |

Arguments are read from left to right, and later ones win. The environment variable `OVERRIDES`
holds more arguments, written as in a shell, which are read after all others. All errors are
reported at once, and `--show` ends with them and status 2 where an engine would not start with the
flags. The error about an unknown name says which flag has its words, or which of ours does what
another engine's flag of that name does.

In Python, `EngineConfig.from_flags(model=..., page_size=32)` and `LLM(model, page_size=32)` take
the same keys with Python values.

## Limits adapt

A limit that is not set adapts to those that are set, to the model and to the memory. For example,
`max_tokens_per_forward=128` alone also lowers `max_seqs_per_forward` to 128. Two flags conflict
only if both are set.
"""


@dataclass(frozen=True)
class Row:
    """One flag in words."""

    name: str
    default: str
    meaning: str
    form: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def takes_list(self) -> bool:
        return self.form.startswith("a list")


@dataclass(frozen=True)
class Section:
    """Flags under one heading."""

    title: str
    rows: tuple[Row, ...]


def sections(schema: Schema[Any]) -> list[Section]:
    """Every flag of a schema: by group, then features still to come, then retired flags."""
    groups: dict[str, list[Row]] = {}
    later = []
    for prefix, flag in _leaves(schema.target):
        if flag.notes.later is None:
            groups.setdefault(flag.notes.group or "Flags", []).append(_row(prefix, flag))
        else:
            later.append(_row(prefix, flag))
    if schema.reads_files:
        meaning = "A YAML file with the same keys, read in the place of this argument."
        groups.setdefault("Configuration file", []).append(Row("config", "FILE", meaning, "text"))
    retired = [
        Row(
            name, str(flag.default), f"{flag.reason[0].upper()}{flag.reason[1:]}.", _kind(flag.form)
        )
        for name, flag in schema.retired.items()
    ]
    all_groups = {**groups, _LATER: later, _RETIRED: retired}
    return [Section(title, tuple(rows)) for title, rows in all_groups.items() if rows]


def _leaves(target: type[Any], prefix: str = "") -> Iterator[tuple[str, Flag]]:
    """Every flag with a value of its own, after the path to it."""
    for flag in flags_of(target).values():
        if flag.is_nested:
            yield from _leaves(flag.inner_form, f"{prefix}{flag.name}.")
        else:
            yield prefix, flag


def _row(prefix: str, flag: Flag) -> Row:
    notes = flag.notes
    if flag.required:
        default = "REQUIRED"
    elif isinstance(flag.default, tuple):
        default = ",".join(flag.default)
    else:
        default = notes.usually or str(flag.default)
    unset = "Adapts" if notes.usually else "None"
    adapts = f" {unset}: {notes.adapts}." if notes.adapts else ""
    also = ", ".join(notes.synonyms)
    if also:
        adapts += f" Also accepted: {also}."
    return Row(
        name=f"{prefix}{flag.name}",
        default=default,
        meaning=f"{notes.help}{adapts}",
        form=_kind(flag.form),
        aliases=notes.aliases,
        choices=notes.choices,
    )


def _kind(form: Any) -> str:
    return describe(form).removesuffix(" or None")


def markdown(schema: Schema[Any] = ENGINE) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for section in sections(schema):
        parts.append(f"## {section.title}\n")
        if section.title == _LATER:
            parts.append(
                "These names are settled, but their features are not available yet: a value\n"
                "other than the default is refused.\n"
            )
        if section.title == _RETIRED:
            parts.append("These flags of earlier versions are accepted with a warning.\n")
        lines = ["| flag | value | default | meaning |", "|---|---|---|---|"]
        lines += [_markdown_row(row) for row in section.rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _markdown_row(row: Row) -> str:
    names = ", ".join(f"`{name}`" for name in (row.name, *row.aliases))
    value = ", ".join(f"`{choice}`" for choice in row.choices) or row.form
    if row.choices and row.takes_list:
        value = f"a list of {value}"
    return f"| {names} | {value} | `{row.default}` | {row.meaning} |"


if __name__ == "__main__":
    sys.stdout.write(markdown())
