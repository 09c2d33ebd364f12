"""Request bodies of all kinds, sent to a whole engine, several at a time.

Some clients hang up early. No request may hang, and in the end no page may be in use.
"""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_process import EngineProcess
from fuzzing import check_answer, fuzz
from hypothesis import strategies as st
from request_bodies import bodies

pytestmark = pytest.mark.engine

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/generate",
    "/custom/synchronous-batch-completions",
)
REQUESTS = st.sampled_from(PATHS).flatmap(
    lambda path: st.tuples(st.just(path), bodies(path), st.sampled_from([None, None, 0.0, 0.05]))
)
TIME_LIMIT_S = 60


def send(engine: EngineProcess, path: str, body: bytes, patience_s: float | None) -> None:
    """Sends a body and checks the answer, or hangs up after ``patience_s``."""
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=TIME_LIMIT_S)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        if patience_s is not None:
            time.sleep(patience_s)
            return
        answer = connection.getresponse()
        check_answer(answer.status, answer.headers["content-type"], answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("num_cases", [12, pytest.param(150, marks=pytest.mark.long)])
def test_fuzzed_bodies_leave_no_request_and_no_page_behind(engine, num_cases):
    with ThreadPoolExecutor(6) as threads:

        def check(requests: list[tuple[str, bytes, float | None]]) -> None:
            list(threads.map(lambda request: send(engine, *request), requests))

        fuzz(st.lists(REQUESTS, min_size=1, max_size=6), num_cases, check)
    deadline = time.monotonic() + 60
    while left := what_is_left(engine):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def what_is_left(engine: EngineProcess) -> dict[str, int]:
    """The counts of requests and of pages in use that are not zero; cached pages are not in use."""
    (state,) = json.loads(engine.get("/server_info")[1])["internal_states"]
    counts = {name: state[name] for name in ("num_running_prompts", "num_waiting", "num_running")}
    unused = state["num_free_pages"] + state["num_evictable_pages"]
    counts["pages in use"] = state["num_pages"] - unused
    return {name: count for name, count in counts.items() if count}
