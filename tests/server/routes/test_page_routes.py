"""The page's files, its policy, and what it reads: snapshots, their stream, and cancels."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import threading
import time
from importlib import resources

import numpy as np
import pytest
from fake_engine import PATIENCE_S, RunningServer, submit, wait_for, with_config
from load import Load

from tokasaurus.protocol.messages import Eta, Statistics
from tokasaurus.protocol.watching import Outlook, Watch
from tokasaurus.server.routes.page import PAGE_PATHS, POLICY
from tokasaurus.server.routes.watching import WatchingRoutes
from tokasaurus.text.params import SamplingParams

KEY, OTHER_KEY, ADMIN_KEY = "sk-first", "sk-second", "sk-admin"
BODY = {"prompt": "the cat", "max_tokens": 9, "ignore_eos": True}
NOTHING = Statistics(*[0] * 10, 0.0, 0.0, *[0] * 5, 0.0)
FILES = resources.files("tokasaurus.server") / "page"


def digests(*keys):
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


@pytest.fixture(scope="module")
def server():
    with RunningServer().running() as server:
        yield server


@pytest.fixture
def own_server():
    with RunningServer().running() as server:
        yield server


@pytest.fixture(scope="module")
def locked():
    config = with_config(
        api_key_digests=digests(KEY, OTHER_KEY), admin_key_digests=digests(ADMIN_KEY)
    )
    with RunningServer(config).running() as server:
        yield server


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


class Stream:
    """One reader of the stream of events."""

    def __init__(self, server, **headers) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        self._connection.request("GET", "/v1/engine/events", headers=headers)
        self.answer = self._connection.getresponse()

    def next(self):
        """The next event: its name and data; None at the end."""
        name = data = None
        while line := self.answer.readline():
            if line == b"\n" and data is not None:
                return name, json.loads(data)
            if line.startswith(b"event: "):
                name = line[7:-1].decode()
            elif line.startswith(b"data: "):
                data = line[6:]
        return None

    def close(self) -> None:
        self.answer.close()
        self._connection.close()


@pytest.fixture
def broadcasting(monkeypatch):
    """A server, and the broadcast of its stream."""
    made = []

    class Recorded(WatchingRoutes):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(self.broadcast)

    monkeypatch.setattr("tokasaurus.server.app.WatchingRoutes", Recorded)
    with RunningServer().running() as server:
        yield server, made[0]


# --- the files -----------------------------------------------------------------------------------


def test_every_file_of_the_page_is_served_with_the_policy_and_needs_no_key(locked):
    for path in PAGE_PATHS:
        answer = locked.get(path)
        assert answer.status == 200, path
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers
        again = locked.get(path, **{"If-None-Match": answer.headers["etag"]})
        assert (again.status, again.content) == (304, b"")
    names = {each.name for each in FILES.iterdir()}
    served = {path.removeprefix("/page/") for path in PAGE_PATHS if path.startswith("/page/")}
    assert served | {"index.html", "document.html"} == names
    assert locked.get("/").headers["content-type"].startswith("text/html")


def test_the_policy_allows_nothing_but_the_engine(server):
    parts = dict(part.split(" ", 1) for part in POLICY.split("; "))
    assert parts["default-src"] == "'none'"
    assert {value for name, value in parts.items() if name.endswith("-src")} == {"'none'", "'self'"}
    assert "unsafe" not in POLICY


def test_nothing_of_the_page_comes_from_elsewhere_or_is_inline():
    for file in FILES.iterdir():
        text = file.read_text()
        addresses = set(re.findall(r"https?://[^\s\"'`<>)]+", text)) - {
            "http://www.w3.org/2000/svg"
        }
        assert addresses == set(), file.name
        if file.name.endswith(".html"):
            assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\son\w+=|\sstyle=", text) == []


def test_scripts_never_make_markup_of_text():
    for file in FILES.iterdir():
        if file.name.endswith(".js"):
            text = file.read_text()
            for word in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "new Function",
                "srcdoc",
                "DOMParser",
                "localStorage",
                "document.cookie",
            ):
                assert word not in text, (file.name, word)


def test_every_control_of_the_page_has_a_label():
    text = (FILES / "index.html").read_text()
    for control in re.findall(r"<(?:input|select|textarea)\b[^>]*>", text):
        name = re.search(r'id="([^"]+)"', control)
        before = text[: text.index(control)]
        inside = before.rfind("<label") > before.rfind("</label>")
        assert inside or (name and f'for="{name[1]}"' in text), control


def test_the_api_document_is_a_page_of_the_engine_and_redoc_is_gone(server):
    assert b"document.js" in server.get("/docs").content
    assert server.get("/redoc").status == 404


# --- snapshots -----------------------------------------------------------------------------------


def test_a_snapshot_says_what_runs_and_nothing_of_its_text(own_server):
    own_server.engine.paused = True
    load = Load(own_server.port)
    load.begin("/v1/completions", {**BODY, "n": 3, "priority": 5, "prompt": "secret words"})
    wait_for(lambda: own_server.engine.requests)
    (message,) = own_server.engine.requests
    eta = Eta(np.array([message.request_id]), np.array([2.5]), 4.0)
    own_server.call(lambda: own_server.generations.absorb(eta))
    answer = own_server.get("/v1/engine")
    load.close()
    found = answer.json
    assert b"secret" not in answer.content
    (request,) = found["requests"]
    assert request["samples"] == 3
    assert request["prompt_tokens"] == len(message.prompt_ids)
    assert request["priority"] == 5
    assert request["eta_s"] == 2.5
    assert found["num_requests"] == 1
    assert found["backlog"] == {"seconds": 4.0, "low": None, "high": None}
    assert found["status"] == "ok"


def test_a_snapshot_asks_the_manager_for_its_forecast(own_server):
    own_server.get("/v1/engine")
    wait_for(lambda: any(isinstance(each, Watch) for each in own_server.engine.received))
    ones = np.ones(3, np.int32)
    outlook = Outlook(70, 0.5, 2, 9, 90, ones, 2 * ones, 3 * ones, 4 * ones, 5)
    own_server.call(lambda: own_server.generations.absorb(outlook))
    shown = own_server.get("/v1/engine").json["outlooks"]["0"]
    assert (shown["step"], shown["stride"], shown["used"]) == (70, 2, 9)
    assert shown["all_pages"] == [2, 2, 2]
    stream = Stream(own_server)
    name, history = stream.next()
    stream.close()
    assert (name, history["used"]) == ("history", {"0": [[70, 9]]})
    assert history["past"]["0"] == [] or history["past"]["0"][0]["step"] == 70


def test_the_band_is_made_of_predictions_that_came_true(own_server):
    own_server.engine.paused = True
    generations, metrics = own_server.generations, own_server.state.metrics
    now = [0.0]
    metrics._clock = lambda: now[0]
    for number in range(20):
        started = []
        own_server.call(
            lambda found=started: found.append(submit(generations, [1], SamplingParams()))
        )
        (generation,) = started
        eta = Eta(np.array([generation.request_id]), np.array([10.0]), 10.0)
        own_server.call(lambda eta=eta: generations.absorb(eta))
        now[0] += 5.0 + number  # half of the prediction, and up to two and a half times as long
        metrics.ended(generation, "finished")
    low, high = metrics.eta_band
    assert (low, high) == (pytest.approx(0.7), pytest.approx(2.2))


def test_requests_are_bounded_and_counted(own_server):
    own_server.engine.paused = True
    for _ in range(130):
        own_server.call(lambda: submit(own_server.generations, [1], SamplingParams()))
    found = own_server.get("/v1/engine").json
    assert len(found["requests"]) == 100
    assert found["num_requests"] == 130


def test_a_snapshot_looks_at_no_prompt_that_it_does_not_show(own_server, monkeypatch):
    """Hundreds of thousands may be in flight: predictions of all of them are for who asks."""

    def fail(_):
        raise AssertionError("predictions of all prompts were asked for")

    monkeypatch.setattr(own_server.state, "etas", lambda: fail(None))
    monkeypatch.setattr("tokasaurus.text.generations.Generations.etas", fail)
    assert own_server.get("/v1/engine").json["backlog"]["seconds"] == 0
    assert own_server.get("/metrics").status == 200


def test_samples_are_kept_for_ten_minutes(own_server):
    history, generations = own_server.state.history, own_server.generations
    own_server.call(lambda: generations.absorb(NOTHING))
    for _ in range(700):
        history.sample(generations)
    stream = Stream(own_server)
    _, found = stream.next()
    stream.close()
    assert len(found["samples"]) == 600
    assert found["columns"][0] == "time_s"
    assert len(found["samples"][0]) == len(found["columns"])


# --- the stream ----------------------------------------------------------------------------------


def test_a_stream_begins_with_the_history_and_goes_on(own_server):
    stream = Stream(own_server)
    assert stream.answer.headers["content-type"].startswith("text/event-stream")
    names = [stream.next()[0] for _ in range(3)]
    assert names == ["history", "now", "now"]
    stream.close()


def test_a_hundred_viewers_cost_one_event_each_second(broadcasting):
    server, broadcast = broadcasting
    streams = [Stream(server) for _ in range(100)]
    wait_for(lambda: broadcast.num_viewers == 100)
    for stream in streams:
        assert stream.next()[0] == "history"
        assert stream.next()[0] == "now"
    started, before = time.monotonic(), broadcast.num_made
    newest = streams[-1].next()  # the others come to it: some have older ones to read first
    for stream in streams[:-1]:
        while (event := stream.next()) != newest:
            assert event is not None
    assert broadcast.num_made - before <= time.monotonic() - started + 2
    for stream in streams:
        stream.close()
    wait_for(lambda: broadcast.num_viewers == 0)
    wait_for(lambda: broadcast._task is None)  # nothing is made without viewers


def test_viewers_beyond_the_limit_are_refused(broadcasting, monkeypatch):
    server, broadcast = broadcasting
    monkeypatch.setattr(broadcast, "_max_viewers", 2)
    streams = [Stream(server) for _ in range(2)]
    refused = Stream(server)
    assert refused.answer.status == 429
    for stream in [*streams, refused]:
        stream.close()


def test_the_streams_end_when_the_engine_drains(own_server):
    stream = Stream(own_server)
    assert stream.next()[0] == "history"
    own_server.call(own_server.state.drain)
    while stream.next() is not None:
        pass
    stream.close()


def test_the_stream_needs_a_key(locked):
    for headers, status in (({}, 401), (bearer("wrong"), 401), (bearer(KEY), 200)):
        stream = Stream(locked, **headers)
        assert stream.answer.status == status
        stream.close()


# --- cancels -------------------------------------------------------------------------------------


def begun(server, key=None):
    """The id of a request that waits, and where its answer will be."""
    server.engine.paused = True
    before = len(server.engine.requests)
    answers = []
    headers = {} if key is None else bearer(key)
    thread = threading.Thread(
        target=lambda: answers.append(server.post("/v1/completions", BODY, **headers))
    )
    thread.start()
    wait_for(lambda: len(server.engine.requests) > before)
    return server.engine.requests[-1].request_id, answers, thread


def cancel(server, request_id, **headers):
    return server.post(f"/v1/engine/requests/{request_id}/cancel", {}, **headers)


def test_a_cancelled_request_is_answered_with_what_it_has(own_server):
    request_id, answers, thread = begun(own_server)
    assert cancel(own_server, request_id).json == {"id": str(request_id), "cancelled": True}
    own_server.engine.paused = False
    thread.join(PATIENCE_S)
    assert answers[0].json["choices"][0]["finish_reason"] == "abort", answers[0].content
    assert cancel(own_server, request_id).status == 404


def test_no_request_has_a_name_that_is_no_number(own_server):
    for name in ("abc", "-1", "1e9", "%D9%A3", "9" * 40, "7"):
        assert cancel(own_server, name).status in (404, 400)


def test_a_client_ends_its_own_requests_and_an_admin_those_of_all(locked):
    request_id, _, first = begun(locked, KEY)
    assert cancel(locked, request_id).status == 401
    assert cancel(locked, request_id, **bearer(OTHER_KEY)).status == 403
    assert cancel(locked, request_id, **bearer(KEY)).status == 200
    request_id, _, second = begun(locked, KEY)
    assert cancel(locked, request_id, **bearer(ADMIN_KEY)).status == 200
    locked.engine.paused = False
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    shown = locked.get("/v1/engine", **bearer(KEY)).content.decode()
    assert digests(KEY)[0] not in shown


def test_a_page_elsewhere_cancels_nothing(own_server):
    request_id, _, thread = begun(own_server)
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert cancel(own_server, request_id, **headers).status == 403
    own = {"Origin": f"http://127.0.0.1:{own_server.port}", "Sec-Fetch-Site": "same-origin"}
    assert cancel(own_server, request_id, **own).status == 200
    own_server.engine.paused = False
    thread.join(PATIENCE_S)
