"""The examples of docs/api.md print what the page says, and every route has one."""

from __future__ import annotations

import json
import re
import shutil
from unittest import mock
from urllib.parse import urlsplit

import pytest
from documentation import examples, mismatch, run_bash, run_python
from engine_process import running
from openai import OpenAI

pytestmark = pytest.mark.engine

EXAMPLES = examples("docs/api.md")
CURL = "curl -s -w '\\n%{stderr}%{method} %{url_effective}\\n' "


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine of its own: the examples control it."""
    flags = ("uvicorn_log_level=warning", "trust_request_chat_template=T")
    with running(tmp_path_factory.mktemp("engine"), *flags) as ready:
        yield ready


@pytest.fixture(scope="module")
def runs(engine):
    """What each example prints, and the requests of all of them: (method, path)."""
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    namespace, printed, requests = {}, [], []

    def note(client, request):
        requests.append((request.method, request.url.path))

    with mock.patch.object(OpenAI, "_prepare_request", note):
        for example in EXAMPLES:
            program = example.at(engine.port)
            if example.language == "python":
                printed.append(run_python(program, namespace))
                continue
            output, urls = run_bash(re.sub("^curl ", lambda _: CURL, program, flags=re.MULTILINE))
            printed.append(output)
            for method, url in map(str.split, urls.splitlines()):
                requests.append((method, urlsplit(url).path))
    return printed, requests


def test_examples_print_what_the_page_says(runs):
    printed, _ = runs
    pairs = [
        (example.printed or "", actual) for example, actual in zip(EXAMPLES, printed, strict=True)
    ]
    wrong = [difference for pair in pairs if (difference := mismatch(*pair))]
    assert not wrong, "\n\n".join(wrong)


def test_every_route_has_an_example(runs, engine):
    _, requests = runs
    paths = json.loads(engine.get("/openapi.json")[1])["paths"]
    missing = [
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods
        if not any(
            method.upper() == asked and re.fullmatch(re.sub("{.*?}", "[^/]+", path), at)
            for asked, at in requests
        )
    ]
    assert not missing, f"no example in docs/api.md: {', '.join(missing)}"
