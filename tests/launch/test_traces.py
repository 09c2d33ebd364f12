"""Traces of real engines, by OpenTelemetry's own SDK, as a collector gets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest
from engine_process import EngineProcess, eventually, running
from otlp_collector import STATUS_ERROR, STATUS_UNSET, Collector, attributes_of

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

pytestmark = [pytest.mark.traces, pytest.mark.engine]

pytest.importorskip(
    "opentelemetry.exporter.otlp.proto.http", reason="make test-traces installs OpenTelemetry"
)

FLAGS = ("kv_cache_num_tokens=4096", "cpu_threads=1", "max_seqs_per_forward=16")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARTS = ("prepare", "queue", "prefill", "decode")


@pytest.fixture(scope="module", autouse=True)
def soon() -> Iterator[None]:
    """Spans are sent after 50 ms, by this process's engines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        yield


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector().running() as collector:
        yield collector


@pytest.fixture(scope="module")
def engine(collector: Collector, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("traced")
    with running(directory, f"otlp_endpoint={collector.url}", *FLAGS) as engine:
        yield engine


@pytest.fixture
def traced(engine: EngineProcess, collector: Collector):
    """An engine, and what it has sent since the test began."""
    before = len(collector.traces())

    def new(count: int) -> list[dict[str, Span]]:
        return collector.wait_for(before + count)[before:]

    return engine, new


def check_parts(trace: dict[str, Span], parts: tuple[str, ...] = PARTS) -> None:
    """They fill the time of the request, one after the other."""
    assert trace.keys() == {"request", *parts}
    root = trace["request"]
    at = root.start_time_unix_nano
    for name in parts:
        part = trace[name]
        assert part.trace_id == root.trace_id
        assert part.start_time_unix_nano == at
        at = part.end_time_unix_nano
        assert at >= part.start_time_unix_nano
    assert at == root.end_time_unix_nano


def test_a_chat_continues_the_trace_of_its_client(traced):
    engine, new = traced
    answer = engine.client().chat.completions.create(
        model="any-name",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        temperature=0.5,
        top_p=0.75,
        n=2,
        seed=3,
        extra_body={"ignore_eos": True},
        extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine/7"},
    )
    (trace,) = new(1)
    root = trace["request"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert root.name == "chat any-name"
    check_parts(trace)
    assert root.status.code == STATUS_UNSET
    found = attributes_of(root)
    assert found.pop("tokasaurus.time_to_first_token") > 0
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokasaurus",
        "gen_ai.request.model": "any-name",
        "gen_ai.response.model": "tokasaurus-demo",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": answer.id,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "tokasaurus.request_id": "mine/7",
    }


def test_a_stream_has_the_time_of_its_first_chunk(traced):
    engine, new = traced
    stream = engine.client().completions.create(
        model="m", prompt="Once upon", max_tokens=4, stream=True
    )
    ids = {chunk.id for chunk in stream}
    (trace,) = new(1)
    check_parts(trace)
    found = attributes_of(trace["request"])
    assert trace["request"].parent_span_id == b""
    assert found["gen_ai.operation.name"] == "text_completion"
    assert {found["gen_ai.response.id"]} == ids
    assert found["gen_ai.request.stream"] is True
    first_s = found["gen_ai.response.time_to_first_chunk"]
    ns = trace["decode"].start_time_unix_nano - trace["request"].start_time_unix_nano
    assert first_s == pytest.approx(ns / 1e9)


def test_several_prompts_are_one_trace(traced):
    engine, new = traced
    answer = engine.client().completions.create(model="m", prompt=["Once", "The cat"], max_tokens=3)
    engine.client().embeddings.create(model="m", input=["a cat", "a dog"])
    completion, embeddings = new(2)
    check_parts(completion)
    found = attributes_of(completion["request"])
    assert found["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens == 6
    check_parts(embeddings)
    assert attributes_of(embeddings["request"])["gen_ai.operation.name"] == "embeddings"


def test_a_request_that_is_refused_has_its_error(traced):
    engine, new = traced
    with pytest.raises(openai.BadRequestError):
        engine.client().completions.create(model="m", prompt="Once", max_tokens=-1)
    (trace,) = new(1)
    root = trace["request"]
    check_parts(trace, ("prepare",))
    assert root.status.code == STATUS_ERROR
    assert "max_tokens" in root.status.message
    assert attributes_of(root)["error.type"] == "RequestError"


def test_a_client_that_leaves_ends_its_trace(traced):
    engine, new = traced
    stream = engine.client().completions.create(
        model="m",
        prompt="Once upon",
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    (trace,) = new(1)
    check_parts(trace)
    assert attributes_of(trace["request"])["error.type"] == "ClientGone"


def test_a_trace_that_its_client_does_not_sample_is_not_sent(traced):
    engine, new = traced
    client = engine.client()
    header = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    client.completions.create(model="m", prompt="Once", max_tokens=1, extra_headers=header)
    client.completions.create(model="m", prompt="Once", max_tokens=1, user="sampled")
    (trace,) = new(1)
    assert trace["request"].trace_id.hex() != TRACE


def test_lines_of_batches_have_traces_of_their_own(traced):
    engine, new = traced
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "Once", "max_tokens": 2},
    }
    (answer,) = engine.answered_batch([line])
    (trace,) = new(1)
    check_parts(trace)
    name = answer["response"]["request_id"]
    assert attributes_of(trace["request"])["tokasaurus.request_id"] == name


def test_the_collector_gets_it_where_and_from_whom_it_expects(engine, collector):
    engine.client().completions.create(model="m", prompt="Once", max_tokens=1)
    collector.wait_for(1)
    assert set(collector.paths) == {"/v1/traces"}
    resource = collector.resources[0]
    assert resource["service.name"] == "tokasaurus"
    assert resource["service.instance.id"] == "server"
    assert resource["deployment.environment.name"] == "test"


def test_requests_do_not_wait_for_a_collector_that_hangs(tmp_path, monkeypatch):
    """The collector answers in a minute, and the queue has room for two spans."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    with Collector().running() as collector:
        collector.delay_s = 60.0
        with running(tmp_path, f"otlp_endpoint={collector.url}", *FLAGS) as engine:
            for _ in range(5):
                answer = engine.client().completions.create(model="m", prompt="Once", max_tokens=2)
                assert answer.usage.completion_tokens == 2
            assert collector.spans() == []
            engine.signal(15)
            assert engine.wait_exit(30) == 0


def test_requests_do_not_fail_with_the_collector(tmp_path):
    with running(tmp_path, "otlp_endpoint=http://127.0.0.1:1", *FLAGS) as engine:
        for _ in range(3):
            engine.client().completions.create(model="m", prompt="Once", max_tokens=2)
        eventually(lambda: "opentelemetry" in engine.log or "xport" in engine.log, "a line")
        assert engine.get("/health")[0] == 200
        engine.signal(15)
        assert engine.wait_exit(30) == 0


def test_each_http_process_sends_its_own(tmp_path, collector):
    before = len(collector.traces())
    flags = (f"otlp_endpoint={collector.url}", "server_processes=2", *FLAGS)
    with running(tmp_path, *flags) as engine:
        for _ in range(4):
            engine.client().completions.create(model="m", prompt="Once upon", max_tokens=3)
        traces = collector.wait_for(before + 4)[before:]
    for trace in traces:
        check_parts(trace)
    instances = {resource["service.instance.id"] for resource in collector.resources}
    assert instances & {"http-1", "http-2"}


def test_toka_batch_sends_traces_before_it_ends(tmp_path: Path, collector: Collector):
    before = len(collector.traces())
    lines = [{"prompt": "Once", "max_tokens": 2}, {"prompt": "The", "max_tokens": 2}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    subprocess.run(
        [
            *(sys.executable, "-m", "tokasaurus.launch.batch_run", "run"),
            *(tmp_path / "in.jsonl", tmp_path / "out.jsonl"),
            *(f"otlp_endpoint={collector.url}", *FLAGS),
        ],
        check=True,
        timeout=120,
        env={**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "60000"},
    )
    for trace in collector.wait_for(before + 2)[before:]:
        check_parts(trace)
