"""The words of docs/glossary.md are those of the code; what docs/architecture.md names exists."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

from documentation import ROOT

PACKAGE = ROOT / "tokasaurus"
PEOPLE = PACKAGE / "demo"  # its texts are about people, and a person is a who
ROW = re.compile(r"^\| \*\*(?P<word>.*?) \| .* \| (?P<code>.*?) ?\|$", re.MULTILINE)
QUOTED = re.compile(r"`([^`\n]+)`")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@functools.cache
def names() -> dict[str, list[str]]:
    """Every name that the package defines, and where."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in (*defined(ast.parse(path.read_text())), path.stem, path.parent.name):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr


def words(name: str) -> set[str]:
    """``HTTPAnswer`` and ``http_answer`` are the words http and answer."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def test_the_code_has_the_words():
    rows = [row for row in ROW.finditer(page("glossary.md")) if row["code"]]
    assert len(rows) > 20
    missing = [
        f"{row['word']}: {name}"
        for row in rows
        for name in QUOTED.findall(row["code"])
        if name not in names()
    ]
    assert not missing, f"docs/glossary.md names what the code does not have: {missing}"


def test_no_name_has_a_word_that_the_glossary_rejects():
    _, rejected_part = page("glossary.md").split("## Words that names do not have")
    rejected = {
        word
        for row in re.findall(r"^\| (`.*?) \|", rejected_part, re.MULTILINE)
        for word in QUOTED.findall(row)
    }
    assert {"nobody", "utils"} <= rejected
    people = str(PEOPLE.relative_to(ROOT))
    found = {
        name: places
        for name, paths in names().items()
        if words(name) & rejected
        and (places := [path for path in paths if not path.startswith(people)])
    }
    assert not found, f"docs/glossary.md says which word to take instead: {found}"


def test_what_the_architecture_names_exists():
    missing = [
        name
        for name in QUOTED.findall(page("architecture.md"))
        if (re.fullmatch(r"[\w/]+(?:/|\.py)", name) and not (PACKAGE / name).exists())
        or (re.fullmatch(r"(?:[A-Z]\w*[a-z]\w*\.?)+", name) and name not in names())
    ]
    assert not missing, f"docs/architecture.md names what the code does not have: {missing}"
