"""Certificates that the clients trust, and more connections than a process may have files."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys

import pytest
from certificates import make_certificate
from file_server import Answer, file_server

from tokasaurus.client import AsyncClient, Client, RetryPolicy
from tokasaurus.client.lm import TokasaurusClient
from tokasaurus.errors import ConfigError, TimedOut, Unreachable

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
SAID = {"id": "x", "model": "m", "choices": [{"index": 0, "text": "said", "finish_reason": "stop"}]}
ONCE = RetryPolicy(max_retries=0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def https(certificate):
    with file_server(certificate=certificate) as served:
        served.answers[TEXT] = served.answers[CHAT] = Answer.json(SAID)
        yield served


def test_a_client_trusts_the_certificates_of_ca_file(https, certificate, tmp_path):
    with Client(https.url, ca_file=certificate[0]) as client:
        assert client.complete("a").text == "said"
    with (
        Client(https.url, retry=ONCE) as client,
        pytest.raises(Unreachable, match=r"is not trusted: .*ca_file"),
    ):
        client.complete("a")
    assert len(https.questions) == 1
    for wrong in (tmp_path / "none.pem", certificate[1]):
        with pytest.raises(ConfigError, match=f"ca_file='{wrong}' cannot be read"):
            AsyncClient(https.url, ca_file=wrong)


def test_a_language_model_trusts_the_certificates_of_ca_file(https, certificate, tmp_path):
    config = {"model": "toka:m", "base_url": https.url, "on_failure": "raise", "max_retries": 0}
    with TokasaurusClient({**config, "ca_file": certificate[0]}) as lm:
        assert lm.call("", "a") == "said"
    with TokasaurusClient(config) as lm, pytest.raises(Unreachable, match="ca_file"):
        lm.call("", "a")
    assert len(https.questions) == 1
    with pytest.raises(ValueError, match=r"ca_file=.*none\.pem.* cannot be read"):
        TokasaurusClient({**config, "ca_file": tmp_path / "none.pem"})


def test_the_certificates_of_the_system_are_read_once_and_only_for_https(monkeypatch):
    """Not for each of the pools that a client has, which took a second."""
    read, made = [], ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: read.append(1) or made())
    Client("http://127.0.0.1:1").close()
    TokasaurusClient({"model": "toka:m", "base_url": "http://127.0.0.1:1"}).close()
    assert read == []
    Client("https://127.0.0.1:1").close()
    assert read == [1]


FULL = """
import os, resource, sys
from tokasaurus.client import Client, RetryPolicy
from tokasaurus.client.lm import TokasaurusClient
from tokasaurus.errors import Unreachable

resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))
url = sys.argv[1]
config = {"model": "toka:m", "base_url": url, "on_failure": "raise", "max_retries": 0}
lm = TokasaurusClient(config)
client = Client(url, retry=RetryPolicy(max_retries=0))
assert client.ping()  # loads what it needs; the connection closes
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
for ask in (lambda: client.complete("a"), lambda: lm.call("", "a")):
    try:
        ask()
    except Unreachable as error:
        print(error)
for each in held:
    os.close(each)
print(client.complete("a").text)
"""
FEW = """
import resource
from tokasaurus.client import Client

resource.setrlimit(resource.RLIMIT_NOFILE, (300, 600))
Client(max_connections=600).close()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
Client(max_connections=601)
"""


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )


def test_too_many_open_files_are_named_as_the_reason(server):
    server.answers[TEXT] = Answer.json(SAID)
    server.answers["/ping"] = Answer(headers={"Connection": "close"})
    done = run(FULL, server.url)
    assert done.returncode == 0, done.stderr
    one, other, said = done.stdout.splitlines()
    assert one == other
    assert "may have 2000 files open" in one
    assert "ulimit -n" in one
    assert said == "said"


def test_more_connections_than_files_are_refused_at_once():
    done = run(FEW)
    assert done.stdout == "600\n"
    assert "max_connections=601 needs a file for each" in done.stderr.splitlines()[-1]
    assert "600 open at most" in done.stderr.splitlines()[-1]


def test_many_connections_are_made_a_few_at_a_time(server, monkeypatch):
    """The time of each runs while others are made, so that thousands together would be too late."""
    server.answers[TEXT] = Answer.json(SAID)
    under_way, most, made = 0, 0, asyncio.BaseEventLoop.create_connection

    async def slowly(loop, *arguments, **options):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(0.05)
            return await made(loop, *arguments, **options)
        finally:
            under_way -= 1

    async def ask():
        async with AsyncClient(server.url, retry=ONCE) as client:
            return await asyncio.gather(*(client.complete("a") for _ in range(300)))

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", slowly)
    assert [answer.text for answer in asyncio.run(ask())] == ["said"] * 300
    assert 1 < most <= 64


def test_connections_that_fail_leave_room_for_others(server, monkeypatch):
    """More of them than are made at a time: some are refused, some are given up."""
    server.answers[TEXT] = Answer.json(SAID)
    made = asyncio.BaseEventLoop.create_connection

    async def refused(*_arguments, **_options):
        raise ConnectionRefusedError

    async def endless(*_arguments, **_options):
        await asyncio.sleep(60)

    async def ask():
        async with AsyncClient(server.url, retry=ONCE) as client:
            for connect, time_s, error in ((refused, 60, Unreachable), (endless, 0.1, TimedOut)):
                monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", connect)
                asked = (client.complete("a", timeout_s=time_s) for _ in range(100))
                failed = await asyncio.gather(*asked, return_exceptions=True)
                assert {type(each) for each in failed} == {error}
            monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", made)
            return await client.complete("a", timeout_s=60)

    assert asyncio.run(ask()).text == "said"
