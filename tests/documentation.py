"""The examples of a Markdown page: a program, and what the page says that it prints.

A block in a language is a program.
A block without a language right after it is what the program prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Example", "examples", "mismatch", "run_bash", "run_python"]

ROOT = Path(__file__).parent.parent
ADDRESS = "127.0.0.1:10210"
"""Where the pages' examples expect an engine."""

_EXAMPLE = re.compile(
    r"^```(?P<language>\w+)\n(?P<program>.*?)^```\n(?:\n```\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_LINE_BREAK = re.compile(r"(?<=[\[{])\s*\n\s*|\s*\n\s*(?=[\]}])|(?<=,)\s*\n\s*")
_VARIES = re.compile(
    r"(?P<anything>\.\.\.)"
    r"|(?P<id>[0-9a-f]{24,32})"
    r"|(?P<time>\b1[789]\d{8}\b)"
    r"|(?P<float>-?\d+\.\d+(?:e-?\d+)?)"
)
_PATTERNS = {
    "anything": ".*?",
    "id": "[0-9a-f]{24,32}",
    "time": r"\d{10}",
    "float": r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)",
}
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Example:
    language: str
    program: str
    printed: str | None

    def at(self, port: int) -> str:
        """The program, for an engine on another port."""
        return self.program.replace(ADDRESS, f"127.0.0.1:{port}")


def examples(page: str) -> list[Example]:
    """In the order of the page, whose path is relative to the repository."""
    text = (ROOT / page).read_text()
    return [Example(**match.groupdict()) for match in _EXAMPLE.finditer(text)]


def run_bash(program: str, directory: Path | None = None) -> tuple[str, str]:
    """What it prints and writes to standard error; fails if it fails."""
    done = subprocess.run(
        ["bash", "-e", "-c", program], capture_output=True, text=True, cwd=directory
    )
    assert done.returncode == 0, f"{program}\nfailed with {done.returncode}:\n{done.stderr}"
    return done.stdout, done.stderr


def run_python(program: str, namespace: dict[str, Any]) -> str:
    """What it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "<example>", "exec", dont_inherit=True), namespace)
    return printed.getvalue()


def mismatch(printed: str, actual: str) -> str:
    """Where a program prints something else than its page says; empty if it does not.

    Any id matches any other, and so do times. Numbers with a fraction may differ by a hundredth.
    ``...`` stands for any text. JSON may be broken into lines.
    """
    printed, actual = _flat(printed), _flat(actual)
    found = re.fullmatch(_pattern(printed), actual, re.DOTALL)
    both = f"the page says\n{printed}\nand the program prints\n{actual}"
    if found is None:
        return both
    expected = [float(each["float"]) for each in _VARIES.finditer(printed) if each["float"]]
    for one, other in zip(expected, map(float, found.groups()), strict=True):
        if abs(one - other) > _TOLERANCE:
            return f"{one} is {other}:\n{both}"
    return ""


def _pattern(printed: str) -> str:
    pieces, end = [], 0
    for varies in _VARIES.finditer(printed):
        pieces += re.escape(printed[end : varies.start()]), _PATTERNS[varies.lastgroup]
        end = varies.end()
    return "".join([*pieces, re.escape(printed[end:])])


def _flat(text: str) -> str:
    """JSON on one line each, with a space after each comma and colon."""
    return _LINE_BREAK.sub(_space_after_comma, "\n".join(map(_spaced, text.strip().splitlines())))


def _space_after_comma(line_break: re.Match[str]) -> str:
    return " " if line_break.string[line_break.start() - 1] == "," else ""


def _spaced(line: str) -> str:
    with contextlib.suppress(ValueError):
        return json.dumps(json.loads(line), ensure_ascii=False)
    return line
