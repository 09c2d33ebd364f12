"""How much a request may outrank others: everybody's limit, and that of keys."""

from __future__ import annotations

import hashlib
import json

from fake_engine import RunningServer, with_config

from tokasaurus.protocol.messages import MAX_PRIORITY
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.protocols.table import OPERATIONS

COMPLETIONS = "/v1/completions"
BODIES = {
    COMPLETIONS: {"prompt": "the cat", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "the cat"},
}


def serving(**changes):
    return RunningServer(with_config(**changes)).running()


def test_no_request_outranks_the_default_unless_that_is_allowed():
    with serving(max_request_priority=0) as server:
        for path, body in BODIES.items():
            for priority, status in ((-1, 400), (-MAX_PRIORITY, 400), (0, 200), (7, 200)):
                answer = server.post(path, {**body, "priority": priority})
                assert answer.status == status, (path, priority)
                if status == 400:
                    assert answer.error["param"] == "priority"
                    assert "max_request_priority" in answer.error["message"]
        assert {request.priority for request in server.engine.requests} == {0, 7}


def test_requests_may_outrank_others_as_far_as_the_engine_says():
    with serving(max_request_priority=10) as server:
        for priority, status in ((-10, 200), (-11, 400)):
            assert server.post(COMPLETIONS, {"prompt": "a", "priority": priority}).status == status


def test_a_tier_that_a_client_may_not_have_is_served_as_the_default():
    with serving(max_request_priority=999) as server:
        answer = server.post(COMPLETIONS, {"prompt": "a", "service_tier": "priority"})
        assert answer.json["service_tier"] == "default"
        assert server.engine.requests[-1].priority == 0
        assert server.post(COMPLETIONS, {"prompt": "a", "service_tier": "flex"}).status == 200
        assert server.engine.requests[-1].priority == 1000


def test_a_key_may_have_a_limit_of_its_own():
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in ("plain", "urgent", "admin")]
    with serving(
        api_key_digests=tuple(digests[:2]),
        admin_key_digests=(digests[2],),
        max_request_priority=1,
        key_priorities={digests[1]: 50, digests[2]: MAX_PRIORITY},
    ) as server:
        for key, limit in (("plain", 1), ("urgent", 50), ("admin", MAX_PRIORITY)):
            headers = {"authorization": f"Bearer {key}"}
            for priority in (-limit, -limit - 1):
                body = {"prompt": "a", "max_tokens": 1, "priority": priority}
                status = 200 if priority == -limit else 400
                assert server.post(COMPLETIONS, body, **headers).status == status, (key, priority)


def test_every_request_of_a_synchronous_batch_is_held_to_the_limit():
    with serving(max_request_priority=0) as server:
        chat = BODIES["/v1/chat/completions"]
        body = {"requests": [chat, {**chat, "priority": -1}]}
        answer = server.post("/custom/synchronous-batch-completions", body)
        assert answer.status == 400
        assert "priority" in answer.error["param"]
        assert not server.engine.requests


def test_a_line_of_a_batch_is_held_to_the_limit_and_stays_below():
    with serving(max_request_priority=0) as server:
        executor = Executor(server.state, OPERATIONS)
        for own, expected in ((-1, 400), (0, 200)):
            body = {"prompt": "a", "priority": own}
            status, content = server.on_loop(executor.answer(COMPLETIONS, body, priority=1000))
            assert status == expected
            assert (status == 200) == ("choices" in json.loads(content))
        assert [request.priority for request in server.engine.requests] == [1000]
