"""What docs/troubleshooting.md quotes is said by the code, and what it names exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from documentation import ROOT

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import flags_of

TEXT = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = re.compile(r"`([^`]+)`")
VARIES = "\0"
"""Stands in a text of the code for what is put in."""


def messages() -> list[str]:
    """The quoted messages: in the columns of that name, or with three dots and a space."""
    found = []
    column = None
    for line in TEXT.splitlines():
        if not line.startswith("|"):
            column = None
            found += [each for each in QUOTED.findall(line) if "..." in each and " " in each]
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if column is None:
            column = cells.index("message") if "message" in cells else -1
        elif column >= 0:
            found += QUOTED.findall(cells[column])
    return [each for each in found if not each.startswith(("toka", "py-spy", "curl"))]


def texts() -> Iterator[str]:
    """Every text in the code, with a mark for each value that is put in."""
    for path in sorted((ROOT / "tokasaurus").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[\d.]*[a-z]", VARIES, node.value)
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    part.value if isinstance(part, ast.Constant) else VARIES for part in node.values
                )


def says(text: str, message: str) -> bool:
    """Whether a text of the code has a message: three dots stand for anything, and for no less."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return re.search(pattern, text, re.DOTALL) is not None


def test_the_messages_are_those_of_the_code():
    quoted = messages()
    assert len(quoted) > 35
    known = list(texts())
    missing = [each for each in quoted if not any(says(text, each) for text in known)]
    assert not missing, f"the code says none of these: {missing}"


def test_what_counts_as_said():
    assert says(f"port {VARIES} is in use", "port ... is in use")
    assert not says(f"port {VARIES} is taken", "port ... is in use")
    assert not says(f"port {VARIES} is in use", "port 80 is in use")


def test_the_flags_exist():
    flags = {flag.name for flag in flags_of(EngineConfig).values()}
    named = {name for name in re.findall(r"`(\w+)=[\w.]*`", TEXT) if name.islower()}
    assert len(named) > 5
    assert sorted(named - flags) == []
