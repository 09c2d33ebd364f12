"""Runs of W&B, by a server that speaks as much GraphQL as the source asks."""

from __future__ import annotations

import base64
import re

import pytest
from cartridge_hosts import Wandb
from fetching import failure, fetch, refusal, with_http
from file_server import Answer, file_server
from rows import check_each

from tokasaurus.cartridges.sources.wandb import WandbSource


@pytest.fixture(scope="module")
def server():
    with file_server() as running:
        yield running


@pytest.fixture
def wandb(server, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return Wandb(server)


@pytest.fixture
def asking(tmp_path):
    targets = tmp_path / "targets"
    targets.mkdir()

    def ask(call, cartridge_id):
        return with_http(lambda http: call(WandbSource(http, 1000), cartridge_id, targets))

    return ask


def test_a_run_has_one_to_three_names(wandb, asking):
    for run in ("hazy-research/cartridges/wauoq23f", "me/cartridges/r1", "me/other/r1"):
        wandb.put(run, "cache-step1.pt", run.encode())

    def check(row):
        cartridge_id, run = row
        assert asking(fetch, cartridge_id).data == run.encode()

    rows = [
        ("wauoq23f", "hazy-research/cartridges/wauoq23f"),
        ("me/r1", "me/cartridges/r1"),
        ("me/other/r1", "me/other/r1"),
    ]
    check_each(rows, check)


def test_the_highest_step_of_all_pages_is_fetched(wandb, asking):
    run = "me/cartridges/r1"
    for step in (4, 8, 16, 12, 2):
        wandb.put(run, f"cache-step{step}.pt", b"%d" % step)
    wandb.put(run, "config.yaml", b"model: {}")
    wandb.put(run, "output.log", b"log")
    got = asking(fetch, "me/r1")
    assert (got.data, got.companion, got.num_bytes) == (b"16", b"model: {}", 2)
    assert asking(fetch, "me/r1:cache-step4.pt").data == b"4"


def test_the_companion_may_be_at_the_top(wandb, asking):
    wandb.put("me/cartridges/r1", "checkpoints/cache-step4.pt", b"4")
    wandb.put("me/cartridges/r1", "config.yaml", b"model: {}")
    assert asking(fetch, "me/r1").companion == b"model: {}"


def test_a_newer_file_is_another_version(wandb, asking):
    wandb.put("me/cartridges/r1", "cache_last.pt", b"1")
    first = asking(fetch, "me/r1")
    assert first.version == first.found_version == asking(fetch, "me/r1").version
    wandb.put("me/cartridges/r1", "cache_last.pt", b"2", updated="2025-08-02T00:00:00")
    assert asking(fetch, "me/r1").version != first.version


def test_what_is_not_there_is_refused_by_name(wandb, asking, monkeypatch):
    wandb.put("me/cartridges/r1", "a.pt", b"1")
    wandb.put("me/cartridges/r2", "output.log", b"1")
    wandb.put("me/cartridges/r3", "a.pt", bytes(1001))

    def check(row):
        cartridge_id, message = row
        assert re.search(message, asking(refusal, cartridge_id))

    rows = [
        # The example of the user's guide, which is an entity and a run.
        (
            "hazyresearch/cartridge-wauoq23f",
            "there is no run hazyresearch/cartridges/cartridge-wauoq23f at .*WANDB_API_KEY",
        ),
        ("r9", "there is no run hazy-research/cartridges/r9"),
        ("me/r1:b.pt", "the run me/cartridges/r1 has no file 'b.pt'"),
        ("me/r2", "no file there ends in .pt or .safetensors; it has output.log"),
        ("me/r3", "1001 bytes, and max_cartridge_bytes=1000"),
        ("a/b/c/d", "the id must be RUN, ENTITY/RUN or ENTITY/PROJECT/RUN"),
        ("a b", "the id must be"),
        ("", "the id must be"),
    ]
    check_each(rows, check)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert "WANDB_API_KEY" not in asking(refusal, "r9")


def test_the_key_goes_to_wandb_only(wandb, asking, monkeypatch, tmp_path):
    def sent(questions):
        return {each.headers.get("authorization") for each in questions}

    def basic(key):
        return "Basic " + base64.b64encode(f"api:{key}".encode()).decode()

    run = "me/cartridges/r1"
    wandb.put(run, "a.pt", b"1")
    asking(fetch, "me/r1")
    assert sent(wandb.server.questions) == {None}
    wandb.server.questions.clear()
    (tmp_path / ".netrc").write_text("machine 127.0.0.1\n  login user\n  password from-file\n")
    (tmp_path / ".netrc").chmod(0o600)
    asking(fetch, "me/r1")
    assert sent(wandb.server.questions) == {basic("from-file")}
    wandb.server.questions.clear()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with file_server("127.0.0.2") as bucket:
        bucket.answers["/a.pt"] = Answer(b"2")
        wandb.runs[run]["a.pt"]["url"] = f"{bucket.url}/a.pt"
        assert asking(fetch, "me/r1").data == b"2"
        assert sent(bucket.questions) == {None}
    assert sent(wandb.server.questions) == {basic("secret")}


def test_answers_that_make_no_sense_are_failures(wandb, asking):
    def check(row):
        answer, message = row
        wandb.server.answers["/graphql"] = answer
        assert message in asking(failure, "me/r1")

    rows = [
        (Answer(b"<html>"), "its answer is not JSON"),
        (Answer(b"[" * 100_000), "its answer is not JSON"),
        (Answer.json({"data": {"project": {"run": {"files": 3}}}}), "another form than known"),
        (Answer.json({"data": {"project": {"run": {"files": {"edges": [{}]}}}}}), "another form"),
        (Answer(status=502), "fails (status 502)"),
    ]
    check_each(rows, check)
    wandb.server.answers["/graphql"] = Answer.json([1])
    assert "there is no run" in asking(refusal, "me/r1")
