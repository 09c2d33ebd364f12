"""MkDocs' hooks: what the site has besides the pages in docs/.

- The README is the first page; CONTRIBUTING and CHANGELOG are pages, too.
- The navigation has all decisions.
- A file of the repository that a page links to, such as a module, becomes a page that shows it.
- Headings have the anchors that GitHub gives them, so that a link works in both places.

``make docs`` runs MkDocs, which knows these functions by their names.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent
BESIDE_DOCS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages outside of docs/, and where the site has them."""

_LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?=(?:#[^)\s]*)?\))")
_LANGUAGES = {".py": "python", ".cpp": "cpp", ".toml": "toml", ".yaml": "yaml", ".sh": "bash"}


def on_config(config: MkDocsConfig) -> None:
    """Gives headings GitHub's anchors, and the navigation the decisions."""
    config.mdx_configs["toc"] = {"slugify": anchor}
    assert config.nav is not None
    for entry in config.nav:
        if "Decisions" in entry:
            pages = sorted(path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
            entry["Decisions"] += [f"decisions/{page}" for page in pages]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are not in docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for outside, place in BESIDE_DOCS.items():
        text = (ROOT / outside).read_text()
        files.append(File.generated(config, place, content=text))
    for path in linked_files():
        hidden = InclusionLevel.NOT_IN_NAV
        files.append(
            File.generated(config, site_path(path), content=_shown(path), inclusion=hidden)
        )


def on_page_markdown(markdown: str, page: Page, **_others: Any) -> str:
    """Leads links to where the site has their targets."""
    places = {place: outside for outside, place in BESIDE_DOCS.items()}
    source = places.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return with_site_links(markdown, source)


def anchor(heading: str, separator: str) -> str:
    """What GitHub calls a heading in a link. MkDocs wants the argument ``separator``."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in BESIDE_DOCS:
        return BESIDE_DOCS[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def with_site_links(markdown: str, source: str) -> str:
    """The text of a page, with links to where the site has their targets.

    A link to what does not exist stays as it is, and MkDocs reports it.

    Args:
        markdown: its text.
        source: its path in the repository.
    """
    here = os.path.dirname(site_path(source))

    def led(link: re.Match[str]) -> str:
        target = _target(link["target"], source)
        if not (ROOT / target).is_file():
            return link["target"]
        return os.path.relpath(site_path(target), here or ".")

    return _LINK.sub(led, markdown)


def linked_files() -> list[str]:
    """The files outside of docs/ that pages link to, by their paths in the repository."""
    found = set()
    for page in _pages():
        for link in _LINK.finditer((ROOT / page).read_text()):
            target = _target(link["target"], page)
            if (ROOT / target).is_file() and site_path(target).startswith("source/"):
                found.add(target)
    return sorted(found)


def _pages() -> Iterator[str]:
    yield from BESIDE_DOCS
    for path in sorted((ROOT / "docs").rglob("*.md")):
        yield str(path.relative_to(ROOT))


def _target(target: str, source: str) -> str:
    """The path in the repository that a link of a page leads to."""
    return os.path.normpath(os.path.join(os.path.dirname(source), target))


def _shown(path: str) -> str:
    """A page that shows a file."""
    language = _LANGUAGES.get(os.path.splitext(path)[1], "text")
    # More backticks than any file has.
    fence = "`" * 8
    return f"# {path}\n\n{fence}{language}\n{(ROOT / path).read_text()}\n{fence}\n"
