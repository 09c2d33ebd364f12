"""``make docs``: builds the site, and checks it.

    python tests/docs_check.py DIRECTORY

1. MkDocs builds the site in the directory, and reports no broken link, no broken anchor and no
   page that the navigation lacks.
2. Each page has the headings, lists, tables, code and images that CommonMark's rules give it, which
   GitHub and editors follow: MkDocs' own rules differ where a list follows a line without a gap.
3. No page loads anything from another server.

The exit status is 0 if all of this holds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

from docs_site import BESIDE_DOCS, ROOT

_COUNTED = re.compile(r"h[1-5]|ul|ol|li|table|t[rhd]|pre|img|strong|em")
_LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src"}
_FOREIGN = ("http:", "https:", "//")


class _Counts(HTMLParser):
    """Counts the elements of an article, and collects what its page loads from elsewhere."""

    def __init__(self, in_page: bool) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.foreign: list[str] = []
        # How many <div> are open since the one of the article; None outside of it.
        self._depth = None if in_page else 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        address = attributes.get(_LOADED.get(tag, "")) or ""
        if address.startswith(_FOREIGN) and attributes.get("rel") != "canonical":
            self.foreign.append(address)
        if self._depth is None:
            if attributes.get("itemprop") == "articleBody":
                self._depth = 0
            return
        if tag == "div":
            self._depth += 1
        if _COUNTED.fullmatch(tag):
            self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._depth is not None:
            self._depth = None if self._depth == 0 else self._depth - 1


def main(directory: str) -> int:
    site = Path(directory)
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        check=True,
    )
    wrong = list(differences(site))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


def differences(site: Path) -> Iterator[str]:
    """What is wrong with the pages of a site, in words."""
    for source, page in _pages(site):
        expected, found = _Counts(in_page=False), _Counts(in_page=True)
        commonmark = MarkdownIt("commonmark").enable("table")
        expected.feed(commonmark.render(source.read_text()))
        found.feed(page.read_text())
        name = source.relative_to(ROOT)
        for tag in sorted({*expected.counts, *found.counts}):
            if expected.counts[tag] != found.counts[tag]:
                counts = f"{found.counts[tag]} <{tag}>, and CommonMark has {expected.counts[tag]}"
                yield f"{name}: the site has {counts}"
        for address in found.foreign:
            yield f"{name}: the site loads {address}"


def _pages(site: Path) -> Iterator[tuple[Path, Path]]:
    """The text of each page, and where the site has it."""
    for source in sorted((ROOT / "docs").rglob("*.md")):
        place = source.relative_to(ROOT / "docs")
        yield source, _built(site, place)
    for source_name, place_name in BESIDE_DOCS.items():
        yield ROOT / source_name, _built(site, Path(place_name))


def _built(site: Path, place: Path) -> Path:
    if place.name in ("index.md", "README.md"):
        return site / place.parent / "index.html"
    return site / place.with_suffix("") / "index.html"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
