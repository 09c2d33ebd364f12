"""The commands of all pages are read by their programs: flags and words exist, values are valid."""

from __future__ import annotations

import importlib
import re
import shlex
import sys

from documentation import ROOT
from rows import check_each

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^(toka(?:-\w+)?) +(\w.*)$", re.MULTILINE)
INLINE = re.compile(r"`(toka(?:-\w+)?) ([^`\n]+)`")
SCRIPT = re.compile(r'^(toka[\w-]*) = "([\w.]+):(\w+)"$', re.MULTILINE)
NOT_FLAGS = {
    "toka restart": "asks an engine that runs",
    "toka-verify": "reads the file that it is given",
}
REFUSED = ["toka --tensor-parallel-size 2"]
"""A page shows the error."""


def documented() -> list[str]:
    """Each command once, without those that are only named or have words left out."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text()
        lines = [LINE.findall(block.replace("\\\n", " ")) for block in BLOCK.findall(text)]
        for program, rest in [*INLINE.findall(text), *(each for block in lines for each in block)]:
            has_flags = "=" in rest or "--" in rest
            if has_flags and not re.search(r"\.\.\.|[A-Z]{4}|[|>&─]", rest):
                found[" ".join([program, *map(shlex.quote, shlex.split(rest, comments=True))])] = (
                    None
                )
    return [each for each in found if not each.startswith(tuple(NOT_FLAGS))]


def test_every_command_of_the_pages_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned.yaml").write_text("port: 1\n")
    scripts = {
        name: (module, main)
        for name, module, main in SCRIPT.findall((ROOT / "pyproject.toml").read_text())
    }

    def check(command: str) -> None:
        program, *words = shlex.split(command)
        module, main = scripts[program]
        monkeypatch.setattr(sys, "argv", [program, *words, "--show"])
        try:
            status = getattr(importlib.import_module(module), main)()
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        assert (status or 0) == (2 if command in REFUSED else 0), printed.err

    commands = documented()
    assert len(commands) > 30
    check_each(commands, check)
