"""The site's navigation has every page, and links lead where the site has their targets.

``make docs`` builds the site, which needs MkDocs.
"""

from __future__ import annotations

import re
import sys

import yaml
from documentation import ROOT
from test_documentation import anchors

sys.path.insert(0, str(ROOT))

from docs_site import BESIDE_DOCS, anchor, linked_files, site_path, with_site_links

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages_of(navigation):
    for entry in navigation:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_navigation_has_every_page_once():
    named = sorted(pages_of(CONFIG["nav"]))
    there = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    # The hook adds the decisions.
    pages = [str(path) for path in there if not re.match(r"decisions/\d", str(path))]
    assert named == sorted([*pages, *BESIDE_DOCS.values()])


def test_links_lead_to_where_the_site_has_their_targets():
    for text, source, expected in (
        ("[a](docs/api.md#x)", "README.md", "[a](api.md#x)"),
        ("[a](../README.md#x)", "docs/client.md", "[a](index.md#x)"),
        ("[a](../../README.md)", "docs/decisions/0001-x.md", "[a](../index.md)"),
        ("[a](../page.md)", "docs/decisions/0001-x.md", "[a](../page.md)"),
        ("[a](images/page-now.png)", "docs/page.md", "[a](images/page-now.png)"),
        ("[a](#here)", "docs/page.md", "[a](#here)"),
        ("[a](https://example.org/x)", "docs/page.md", "[a](https://example.org/x)"),
        ("[a](missing.md)", "docs/page.md", "[a](missing.md)"),
        (
            "[a](../../tokasaurus/errors.py)",
            "docs/decisions/0001-x.md",
            "[a](../source/tokasaurus/errors.py.md)",
        ),
    ):
        assert with_site_links(text, source) == expected


def test_files_that_pages_link_to_are_pages_of_the_site():
    linked = linked_files()
    assert "tokasaurus/errors.py" in linked
    assert {site_path(path) for path in linked} == {f"source/{path}.md" for path in linked}


def test_headings_have_the_anchors_of_github():
    for page in (ROOT / "docs").glob("*.md"):
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        assert {anchor(heading, "-") for heading in headings} == anchors(page)
