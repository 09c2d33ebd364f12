"""The line of each request: what it says, and which requests have none at INFO."""

from __future__ import annotations

import logging

import pytest
from fake_engine import RunningServer, wait_for, with_config

from tokasaurus.server.http.access_log import ACCESS_LOGGER

BODY = {"prompt": "the cat", "max_tokens": 3}


@pytest.fixture(scope="module")
def talkative():
    with RunningServer(with_config(uvicorn_log_level="info")).running() as server:
        yield server


def lines_of(caplog):
    return [record for record in caplog.records if record.name == ACCESS_LOGGER]


def test_a_request_has_a_line_with_its_name_status_and_time(talkative, caplog):
    for more, status in ({}, 200), ({"stream": True}, 200), ({"n": 0}, 400):
        caplog.clear()
        answer = talkative.post("/v1/completions", {**BODY, **more}, **{"X-Request-Id": "mine/7"})
        assert answer.status == status
        wait_for(lambda: lines_of(caplog))
        (line,) = lines_of(caplog)
        fields = line.fields
        assert line.levelno == logging.INFO
        assert (fields["method"], fields["path"]) == ("POST", "/v1/completions")
        assert fields["status"] == status
        assert f'"POST /v1/completions HTTP/1.1" {status} in ' in line.getMessage()
        assert fields["client"].startswith("127.0.0.1:")
        assert fields["seconds"] > 0


def test_a_query_stays_on_one_line(talkative, caplog):
    talkative.get("/v1/models?a=%0Ab")
    wait_for(lambda: lines_of(caplog))
    (line,) = lines_of(caplog)
    assert line.fields["path"] == "/v1/models?a=%0Ab"
    assert "\n" not in line.getMessage()


def test_what_watches_the_engine_has_no_line_unless_it_is_refused(talkative, caplog):
    for path in ("/health", "/ping", "/metrics"):
        assert talkative.get(path).status == 200
    assert talkative.post("/health", {}).status == 405
    wait_for(lambda: lines_of(caplog))
    (line,) = lines_of(caplog)
    assert line.fields["status"] == 405
    logging.getLogger(ACCESS_LOGGER).setLevel("DEBUG")
    try:
        talkative.get("/health")
        wait_for(lambda: len(lines_of(caplog)) == 2)
        assert lines_of(caplog)[1].levelno == logging.DEBUG
    finally:
        logging.getLogger(ACCESS_LOGGER).setLevel("INFO")
