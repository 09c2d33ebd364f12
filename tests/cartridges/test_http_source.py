"""Cartridges from web servers: only from hosts that are allowed, and only whole."""

from __future__ import annotations

import logging
import re

import pytest
from fetching import failure, fetch, refusal, with_http
from file_server import Answer, file_server
from rows import check_each

from tokasaurus.cartridges.sources import transfer
from tokasaurus.cartridges.sources.http import HttpSource
from tokasaurus.errors import RequestError, SourceUnavailable

DATA = b"the file" * 100


@pytest.fixture(scope="module")
def server():
    with file_server() as running:
        yield running


@pytest.fixture(scope="module")
def elsewhere():
    with file_server("127.0.0.2") as running:
        yield running


@pytest.fixture(autouse=True)
def _empty(server, elsewhere):
    for each in (server, elsewhere):
        each.answers.clear()
        each.questions.clear()


@pytest.fixture
def asking(tmp_path):
    def ask(call, cartridge_id, hosts=("127.0.0.1",), max_bytes=10_000):
        return with_http(
            lambda http: call(HttpSource(http, hosts, max_bytes), cartridge_id, tmp_path)
        )

    return ask


def test_a_file_and_its_companion_are_fetched(server, asking):
    server.answers["/run/c.pt"] = Answer(DATA, headers={"ETag": '"1"'})
    server.answers["/run/config.yaml"] = Answer(b"model: {}")
    got = asking(fetch, f"{server.url}/run/c.pt")
    assert got == (DATA, b"model: {}", '"1"', '"1"', len(DATA))


def test_a_signed_url_has_no_companion_and_its_query_is_never_shown(server, asking, caplog):
    caplog.set_level(logging.INFO)
    server.answers["/c.pt"] = lambda question: Answer(
        DATA if question.query == "key=secret" else b"", 200 if question.query else 403
    )
    assert asking(fetch, f"{server.url}/c.pt?key=secret").companion is None
    assert server.count("GET", "/config.yaml") == 0
    for path in ("/missing.pt", "/broken.pt"):
        server.answers["/broken.pt"] = Answer(status=403)
        assert "secret" not in asking(refusal, f"{server.url}{path}?key=secret")
    assert "/c.pt" in caplog.text  # the client logs what it asks for
    assert "secret" not in caplog.text


def test_a_server_without_head_is_asked_with_get(server, asking):
    server.answers["/c.pt"] = lambda question: (
        Answer(DATA, headers={"ETag": '"x"'}) if question.method == "GET" else Answer(status=405)
    )
    got = asking(fetch, f"{server.url}/c.pt")
    assert (got.data, got.found_version) == (DATA, '"x"')


def test_versions_are_strong_tags_or_dates_with_lengths(server, asking):
    def check(row):
        headers, version = row
        server.answers["/c.pt"] = Answer(DATA, headers=headers)
        assert asking(fetch, f"{server.url}/c.pt").version == version

    rows = [
        ({"ETag": '"a"'}, '"a"'),
        ({"ETag": 'W/"a"'}, ""),
        ({}, ""),
        ({"Last-Modified": "Mon"}, f"Mon {len(DATA)}"),
        ({"ETag": 'W/"a"', "Last-Modified": "Mon"}, f"Mon {len(DATA)}"),
    ]
    check_each(rows, check)


def test_only_allowed_hosts_are_asked(server, elsewhere, asking):
    server.answers["/c.pt"] = elsewhere.answers["/c.pt"] = Answer(DATA)

    def check(cartridge_id):
        message = asking(refusal, cartridge_id)
        assert "is not a host that cartridges may come from" in message
        assert "cartridge_hosts" in message

    check_each(
        [
            f"{elsewhere.url}/c.pt",
            "http://169.254.169.254/latest/meta-data",
            "http://localhost/c.pt",
            "http://[::1]/c.pt",
            "http://127.0.0.1.example.org/c.pt",
            "http://2130706433/c.pt",
        ],
        check,
    )
    assert not elsewhere.questions
    assert asking(fetch, f"{elsewhere.url}/c.pt", hosts=("127.0.0.2",)).data == DATA


def test_names_below_a_name_are_allowed_by_a_star():
    def is_allowed(host, allowed):
        async def ask(http):
            source = HttpSource(http, (allowed,), 1)
            errors = transfer.SourceErrors("http", "x")
            source._check(errors)(transfer.httpx2.URL(f"http://{host}/"))

        try:
            with_http(ask)
        except ValueError:
            return False
        return True

    assert is_allowed("a.example.org", "*.example.org")
    assert is_allowed("A.b.Example.org", "*.example.org")
    assert not is_allowed("example.org", "*.example.org")
    assert not is_allowed("badexample.org", "*.example.org")
    assert not is_allowed("example.org.evil.net", "*.example.org")
    assert is_allowed("[::1]", "[::1]")


def test_redirects_are_followed_to_allowed_hosts_only(server, elsewhere, asking):
    def to(url, status=302):
        return Answer(status=status, headers={"Location": url})

    server.answers["/c.pt"] = Answer(DATA)
    elsewhere.answers["/c.pt"] = Answer(b"elsewhere")
    server.answers.update(
        {
            "/near": to("/c.pt", 307),
            "/far": to(f"{elsewhere.url}/c.pt"),
            "/metadata": to("http://169.254.169.254/latest"),
            "/loop": to("/loop"),
            "/file": to("file:///etc/passwd"),
            "/broken": to("http://[::"),
        }
    )
    assert asking(fetch, f"{server.url}/near").data == DATA
    both = ("127.0.0.1", "127.0.0.2")
    assert asking(fetch, f"{server.url}/far", hosts=both).data == b"elsewhere"
    elsewhere.questions.clear()
    for path in ("/far", "/metadata"):
        assert "is not a host" in asking(refusal, f"{server.url}{path}")
    assert not elsewhere.questions
    assert "redirects more than 5 times" in asking(failure, f"{server.url}/loop")
    assert "redirects from http to file" in asking(failure, f"{server.url}/file")
    assert "redirects to no valid URL" in asking(failure, f"{server.url}/broken")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://[::", "http://127.0.0.2/c.pt"])
def test_refused_redirects_hold_no_connection(server, tmp_path, location):
    """The client opens 100 at most."""
    server.answers["/file"] = Answer(status=302, headers={"Location": location})
    server.answers["/c.pt"] = Answer(DATA)

    async def ask(http):
        source = HttpSource(http, ("127.0.0.1",), 10_000)
        for _ in range(101):
            with pytest.raises((RequestError, SourceUnavailable), match=r"redirects|not a host"):
                await fetch(source, f"{server.url}/file", tmp_path)
        return await fetch(source, f"{server.url}/c.pt", tmp_path)

    assert with_http(ask).data == DATA


def test_ids_that_are_no_urls_are_refused(asking):
    def check(row):
        cartridge_id, message = row
        assert re.search(message, asking(refusal, cartridge_id))

    rows = [
        ("c.pt", "must be a URL such as https"),
        ("ftp://127.0.0.1/c.pt", "must be a URL"),
        ("file:///etc/passwd", "must be a URL"),
        ("http:///c.pt", "must be a URL"),
        ("http://[::", "malformed"),
        ("http://user:password@127.0.0.1/c.pt", "user name or password is refused"),
    ]
    check_each(rows, check)


def test_a_file_that_is_too_large_is_refused_before_or_while_it_comes(server, asking):
    server.answers["/c.pt"] = Answer(bytes(2000))
    asked = f"{server.url}/c.pt"
    assert "2000 bytes, and max_cartridge_bytes=1000" in asking(refusal, asked, max_bytes=1000)


def test_compressed_bodies_are_refused(server, asking):
    server.answers["/c.pt"] = Answer(DATA, headers={"Content-Encoding": "gzip"})
    assert "compressed, as gzip" in asking(failure, f"{server.url}/c.pt")
    assert server.questions[0].headers["accept-encoding"] == "identity"


def test_what_a_server_answers_decides_whose_fault_it_is(server, asking):
    def check(row):
        status, kind, message = row
        server.answers["/c.pt"] = Answer(status=status)
        assert message in asking(kind, f"{server.url}/c.pt")

    rows = [
        (404, refusal, "127.0.0.1 has no such file"),
        (410, refusal, "has no such file"),
        (401, refusal, "does not show it to this engine (status 401)"),
        (403, refusal, "does not show it to this engine (status 403)"),
        (429, failure, "is overloaded (status 429)"),
        (500, failure, "fails (status 500)"),
        (503, failure, "fails (status 503)"),
        (206, failure, "fails (status 206)"),
    ]
    check_each(rows, check)


def test_a_connection_that_breaks_is_no_file(server, asking):
    server.answers["/c.pt"] = Answer(DATA, length=len(DATA) + 1)
    assert "ends the connection" in asking(failure, f"{server.url}/c.pt")
    assert "cannot be reached" in asking(failure, "http://127.0.0.1:1/c.pt")


def test_a_long_download_is_reported(server, asking, caplog, monkeypatch):
    monkeypatch.setattr(transfer, "_REPORT_S", 0.0)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 200)
    caplog.set_level(logging.INFO, "tokasaurus")
    server.answers["/c.pt"] = Answer(bytes(1_000_000))
    asking(fetch, f"{server.url}/c.pt", max_bytes=1_000_000)
    assert re.search(r"of 1\.0 MB have come from source http, .* MB/s", caplog.text)
