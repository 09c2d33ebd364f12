"""Links between pages lead somewhere; what the examples print is compared correctly."""

from __future__ import annotations

import re
from pathlib import Path

from documentation import ROOT, mismatch

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
INSTALL = re.compile(r"pip install (?:-\S+ )*'?(\.|tokasaurus)(?:\[([\w,-]+)\])?(?=['\s`])")
SAME = [
    ('{"a": [\n  1,\n  2\n]}', '{"a":[1,2]}'),
    ('{"a": 0.5}', '{"a":0.504}'),
    ('{"a": "...c"}', '{"a":"b c"}'),
    ("cmpl-" + "a0" * 16, "cmpl-" + "17" * 16),
    ("at 1795920866", "at 1795920867"),
]
DIFFERENT = [
    ('{"a": 1}', '{"a":2}'),
    ('{"a": 0.5}', '{"a":0.52}'),
    ('{"a": 0.5}', '{"a":null}'),
    ('{"a": "...c"}', '{"a":"b d"}'),
    ("cmpl-" + "a0" * 16, "cmpl-"),
    ("one\ntwo", "one two"),
    ("one", "one two"),
]


def anchors(page: Path) -> set[str]:
    """What a link into the page may name, by GitHub's rule for headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    wrong = []
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        other = (page.parent / target).resolve() if target else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            wrong.append(f"{page.relative_to(ROOT)}: {target}#{anchor}".removesuffix("#"))
    return wrong


def test_links_lead_somewhere():
    wrong = [link for page in PAGES for link in broken(page)]
    assert not wrong, f"links to what is not there: {wrong}"


def test_pip_installs_this_engine_and_extras_that_exist():
    """The name alone would install the engine that has it on PyPI."""
    listed = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1]
    extras = re.findall(r"^(\w+) = \[", listed.split("\n[")[0], re.MULTILINE)
    assert "cuda" in extras
    wrong = []
    for page in PAGES:
        for name, named in INSTALL.findall(page.read_text()):
            known = set(named.split(",")) <= {*extras} if named else name == "."
            if not known:
                wrong.append(f"{page.relative_to(ROOT)}: {name}[{named}]")
    assert not wrong, f"installs something else, or nothing: {wrong}"


def test_what_counts_as_the_printed_answer():
    wrong = [pair for pair in SAME if mismatch(*pair)]
    assert not wrong, f"said to differ: {wrong}"
    wrong = [pair for pair in DIFFERENT if not mismatch(*pair)]
    assert not wrong, f"said to be the same: {wrong}"
