"""A headless Chromium, and pages of it that may not have a problem."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_process import EngineProcess, running

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "no Chromium: apt-get install chromium-headless-shell, or set CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine whose KV cache is full soon."""
    flags = ("kv_cache_num_tokens=4096", "max_seqs_per_forward=64", "uvicorn_log_level=warning")
    with running(tmp_path_factory.mktemp("small"), *flags) as ready:
        yield ready


class Tab:
    """A tab, and everything that went wrong in it."""

    def __init__(self, browser, address: str, **options) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.addresses: set[str] = set()
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.addresses.add(request.url))
        self.address = address
        self.page.goto(address)

    def _note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def close(self) -> None:
        cookies = self.context.cookies()
        self.context.close()
        assert self.problems == []
        assert cookies == []
        elsewhere = [
            each for each in self.addresses if not each.startswith((self.address, "blob:"))
        ]
        assert elsewhere == []


@pytest.fixture
def tab(browser, small) -> Iterator[Tab]:
    tab = Tab(browser, f"{small.url}/", viewport={"width": 1100, "height": 900})
    yield tab
    tab.close()


@pytest.fixture
def page(tab):
    return tab.page


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go: `make test-browser` says docs/images."""
    named = os.environ.get("PICTURES")
    return Path(named) if named else tmp_path_factory.mktemp("pictures")
