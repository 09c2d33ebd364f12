"""Every route that reads a body answers any body in the right shape, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fake_engine import EOS_ID, RunningServer, random_ids, wait_for, with_config
from fuzzing import check_answer, fuzz
from load import resident_bytes
from request_bodies import BODIES, batch_files, bodies
from rows import each_row


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    data_dir = str(tmp_path_factory.mktemp("data"))
    config = with_config(data_dir=data_dir, max_body_bytes=64 << 20)
    with RunningServer(config).running() as server:
        # Short answers: this is about requests.
        server.engine.script = lambda request, index: [*random_ids(request, index)[:12], EOS_ID]
        server.engine.largest_step = 8
        yield server


FOUND = [
    ("/v1/completions", '{"prompt": [345], "echo": true}'),
    ("/v1/completions", '{"prompt": [[5], [-1000]], "echo": true}'),
    ("/generate", '{"text": "a", "sampling_params": {"(": 1}}'),
    ("/generate", '{"text": "a", "sampling_params": {"a\\\\1": 1}}'),
    ("/generate", '{"text": "a", "sampling_params": {"temperature": %s}}' % ("1" * 400)),
    ("/generate", '{"text": "a", "sampling_params": {"logit_bias": {"1": %s}}}' % ("1" * 400)),
    *(
        ("/generate", '{"text": "a", "sampling_params": {"n": %s}}' % ("[" * depth + "]" * depth))
        for depth in range(955, 980, 3)
    ),
    *(
        ("/v1/completions", '{"prompt": "a", "best_of": %s}' % ("[" * depth + "]" * depth))
        for depth in range(955, 980, 3)
    ),
    ("/v1/completions", '{"prompt": "a", "guided_regex": "%s"}' % ("(" * 50_000)),
    ("/v1/completions", '{"prompt": "a", "%s": 1}' % ("x" * 100_000)),
    ("/v1/completions", '{"prompt": "a", "guided_json": {"multipleOf": 7919133}}'),
    (
        "/v1/completions",
        '{"prompt": "a", "guided_grammar": "start: %%json {\\"multipleOf\\": 791913.3}"}',
    ),
]


@each_row("path, body", FOUND)
def test_bodies_that_fuzzing_has_found_are_refused(server, path, body):
    answer = server.post(path, body.encode())
    assert answer.status == 400
    assert len(answer.content) < 5_000
    assert answer.error["message"]


@pytest.mark.parametrize("num_cases", [15, pytest.param(400, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", BODIES)
def test_every_body_is_answered(server, path, num_cases):
    fuzz_route(server, path, num_cases)
    server.check_nothing_is_left()


def fuzz_route(server: RunningServer, path: str, num_cases: int) -> None:
    def check(body: bytes) -> None:
        answer = server.post(path, body)
        check_answer(answer.status, answer.headers["content-type"], answer.content)

    fuzz(bodies(path), num_cases, check)


@pytest.mark.long
def test_memory_does_not_grow(server):
    """Send the same bodies again and again: what is kept of them is kept once."""
    cases: list[tuple[str, bytes]] = []
    for path in BODIES:
        fuzz(bodies(path), 40, lambda body, path=path: cases.append((path, body)))
    resident = []
    for _ in range(12):
        for path, body in cases:
            server.post(path, body)
        server.check_nothing_is_left()
        server.engine.received.clear()  # the fake engine keeps what it was sent
        resident.append(resident_bytes())
    # Caches and the allocator need a few rounds to reach their size.
    assert min(resident[9:]) - max(resident[:4]) < 3e6, resident


@pytest.mark.parametrize("num_cases", [10, pytest.param(100, marks=pytest.mark.long)])
def test_every_line_of_a_batch_is_answered(server, num_cases):
    client = server.client()

    def check(data: bytes) -> None:
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        wait_for(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"))
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        assert counts.total == counts.completed + counts.failed
        results = [
            json.loads(line)
            for file_id in (batch.output_file_id, batch.error_file_id)
            if file_id is not None
            for line in client.files.content(file_id).text.splitlines()
        ]
        assert len(results) == counts.total
        for result in results:
            assert (result["response"] is None) != (result["error"] is None)
            if result["response"] is not None:
                assert result["response"]["status_code"] < 500, result

    fuzz(batch_files(), num_cases, check)
    server.check_nothing_is_left()
