"""Repositories of the Hub, by a server that speaks its HTTP; the Hub's own client asks it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from cartridge_hosts import COMMIT, Hub
from fetching import failure, fetch, refusal, with_http
from file_server import Answer, file_server
from huggingface_hub import constants
from rows import check_each

from tokasaurus.cartridges.sources.huggingface import HuggingFaceSource


@pytest.fixture(scope="module")
def server():
    with file_server() as running:
        yield running


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Hub(server)


@pytest.fixture
def asking(server, tmp_path):
    def ask(call, cartridge_id, endpoint=server.url):
        return with_http(
            lambda http: call(HuggingFaceSource(http, 1000, endpoint), cartridge_id, tmp_path)
        )

    return ask


def test_one_file_and_its_companion_are_fetched(hub, asking):
    """The example of the user's guide: a repository with the name of a run."""
    hub.put("cache-step4092.pt", b"4092")
    hub.put("cache-step12.pt", b"12")
    hub.put("config.yaml", b"model: {}", is_large=False)
    hub.put("README.md", b"text", is_large=False)
    got = asking(fetch, "hazyresearch/cartridge-wauoq23f")
    assert (got.data, got.companion, got.num_bytes) == (b"4092", b"model: {}", 4)
    assert got.version == got.found_version
    asked = [each.path for each in hub.server.questions]
    assert not [path for path in asked if "step12" in path or "README" in path]


def test_a_file_and_a_revision_can_be_named(hub, asking):
    hub.put("a.pt", b"a")
    hub.put("x/b.pt", b"b")
    assert asking(fetch, f"{hub.name}:a.pt").data == b"a"
    assert asking(fetch, f"{hub.name}@main:x/b.pt").data == b"b"
    message = asking(refusal, hub.name)
    assert f"several files, a.pt, x/b.pt; name one of them: {hub.name}:FILE" in message


def test_the_version_is_that_of_the_two_files(hub, asking):
    hub.put("c.pt", b"1")
    versions = [asking(fetch, hub.name).version]
    hub.put("README.md", b"text", is_large=False)
    assert asking(fetch, hub.name).version == versions[0]
    hub.put("config.yaml", b"a: 1", is_large=False)
    versions.append(asking(fetch, hub.name).version)
    hub.put("c.pt", b"2")
    versions.append(asking(fetch, hub.name).version)
    assert len(set(versions)) == 3


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, asking, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.put("c.pt", b"1")
    with file_server("127.0.0.2") as bucket:
        bucket.answers["/c.pt"] = Answer(b"1")
        hub.server.answers[f"/{hub.name}/resolve/{COMMIT}/c.pt"] = Answer(
            status=302, headers={"Location": f"{bucket.url}/c.pt"}
        )
        assert asking(fetch, hub.name).data == b"1"
        assert not [each for each in bucket.questions if "authorization" in each.headers]
    sent = [each.headers.get("authorization") for each in hub.server.questions]
    assert sent == ["Bearer hf_secret"] * len(sent)


def test_what_is_not_there_is_refused_by_name(hub, asking):
    hub.put("c.pt", b"1")
    hub.put("large.pt", bytes(1001))
    hub.server.answers["/api/models/owner/gated"] = Answer.json(
        {"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"}
    )
    hub.server.answers["/api/models/owner/gone"] = Answer.json(
        {"error": "gone"}, 404, {"X-Error-Code": "RepoNotFound"}
    )
    hub.server.answers[f"/api/models/{hub.name}/revision/v9"] = Answer.json(
        {"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"}
    )

    def check(row):
        cartridge_id, message = row
        assert re.search(message, asking(refusal, cartridge_id))

    rows = [
        ("owner/gone", "there is no repository owner/gone at .*; check the id, .*HF_TOKEN"),
        ("owner/plain", "there is no repository owner/plain at .*; check the id, .*HF_TOKEN"),
        ("owner/gated", "owner/gated is gated: ask for access"),
        (f"{hub.name}@v9", "no branch, tag or commit 'v9'"),
        (f"{hub.name}:d.pt", "has no file 'd.pt'"),
        (f"{hub.name}:large.pt", "1001 bytes, and max_cartridge_bytes=1000"),
        ("name", "the id must be a repository such as owner/name"),
        ("a/b/c", "the id must be a repository"),
        ("../..", "the id must be a repository"),
        ("owner/-name", "the id must be a repository"),
        ("owner/na--me", "must be a repository such as owner/name"),
    ]
    check_each(rows, check)


def test_a_hub_that_fails_is_unavailable(hub, asking):
    hub.server.answers["/api/models/owner/broken"] = Answer(status=500)
    assert "fails (status 500)" in asking(failure, "owner/broken")
    message = asking(failure, "owner/name", endpoint="http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in message


_ASK_OFFLINE = """
import sys
from pathlib import Path

from fetching import failure, with_http

from tokasaurus.cartridges.sources.huggingface import HuggingFaceSource

endpoint, name, directory = sys.argv[1:]
print(with_http(lambda http: failure(HuggingFaceSource(http, 9, endpoint), name, Path(directory))))
"""


def test_an_engine_that_is_told_to_stay_offline_asks_no_hub(hub, tmp_path):
    """A process of its own, since releases of the client read the variable at different moments."""
    hub.put("c.pt", b"1")
    hub.server.questions.clear()
    arguments = ("-c", _ASK_OFFLINE, hub.server.url, hub.name, str(tmp_path))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=offline)
    assert "HF_HUB_OFFLINE is set for the engine" in done.stdout, done.stderr
    assert not hub.server.questions
