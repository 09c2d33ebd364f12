"""What monitoring sees: Prometheus, statsd, and the statistics line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket

import msgspec
import pytest
from fake_engine import (
    CONFIG,
    PATIENCE_S,
    TOKENIZER,
    FakeEngine,
    RunningServer,
    submit,
    wait_for,
    with_config,
)
from load import Load
from prometheus_client.parser import text_string_to_metric_families

from tokasaurus.protocol.messages import Statistics
from tokasaurus.server.history import History
from tokasaurus.server.metrics import Figure, Metrics, figures, limit_figures
from tokasaurus.server.reports import StatisticsLine, report, statsd_packets
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.replica_reports import Seats
from tokasaurus.text.replicas import Replicas

BODY = {"prompt": "the cat", "max_tokens": 9, "ignore_eos": True}
NOTHING = Statistics(*[0] * 10, 0.0, 0.0, *[0] * 5, 0.0)
SOMETHING = msgspec.structs.replace(
    NOTHING,
    num_batches=10,
    num_prefill_tokens=6000,
    num_cached_tokens=2000,
    num_decode_tokens=4000,
    num_grouped_tokens=1000,
    num_grouped_prefill_tokens=1500,
    num_generated_tokens=5000,
    num_preemptions=3,
    queue_s=1.5,
    num_waiting=1500,
    num_running=512,
    num_pages=100,
    num_free_pages=20,
    num_evictable_pages=30,
    step_s=0.25,
    weights_version=4,
    paused=True,
)


@pytest.fixture
def own_server():
    with RunningServer().running() as server:
        yield server


def read(server):
    """Every sample of /metrics: {(name, *label values): value}."""
    answer = server.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.content.decode())
    return {
        (sample.name.removeprefix("tokasaurus_"), *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


# --- Prometheus --------------------------------------------------------------------------------


def test_requests_are_counted_by_route_and_status(own_server):
    for _ in range(3):
        own_server.post("/v1/completions", BODY)
    own_server.post("/v1/completions", {"prompt": 7})
    own_server.post("/v1/completions", {**BODY, "stream": True})
    own_server.get("/v1/models/org/tiny-model")
    for number in range(20):
        own_server.get(f"/no/such/{number}")
    found = read(own_server)
    assert found["http_requests_total", "/v1/completions", "200"] == 4
    assert found["http_requests_total", "/v1/completions", "400"] == 1
    assert found["http_requests_total", "/v1/models/{model_id:path}", "200"] == 1
    assert found["http_requests_total", "404", "other"] == 20
    assert sum(key[0] == "http_requests_total" for key in found) == 4


def test_an_internal_error_counts_as_500(own_server, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(own_server.preparer, "prepare", broken)
    own_server.post("/v1/completions", BODY)
    assert read(own_server)["http_requests_total", "/v1/completions", "500"] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_counts_as_499_not_500(own_server, stream):
    own_server.engine.paused = True
    load = Load(own_server.port)
    load.begin("/v1/completions", {**BODY, "stream": stream})
    wait_for(lambda: own_server.engine.requests)
    load.close()
    own_server.wait_idle()
    found = read(own_server)
    assert found["http_requests_total", "/v1/completions", "499"] == 1
    assert ("http_requests_total", "/v1/completions", "500") not in found


def test_latencies_are_observed_for_each_prompt(own_server):
    own_server.engine.largest_step = 1
    own_server.post("/v1/completions", {**BODY, "prompt": ["a", "b"], "n": 3})
    own_server.wait_idle()
    found = read(own_server)
    assert found["prompt_seconds_count",] == 2
    assert found["time_to_first_token_seconds_count",] == 0  # all tokens came at the end
    own_server.post("/v1/completions", {**BODY, "stream": True})
    own_server.post("/v1/completions", {**BODY, "max_tokens": 1, "stream": True})
    own_server.post("/v1/completions", {**BODY, "stop": ["never"]})
    own_server.wait_idle()
    found = read(own_server)
    assert found["prompt_seconds_count",] == 5
    assert found["time_to_first_token_seconds_count",] == 3
    assert found["time_per_output_token_seconds_count",] == 2  # a single token has no successor
    first, whole = found["time_to_first_token_seconds_sum",], found["prompt_seconds_sum",]
    assert 0 < first < whole
    assert found["prompts_total", "finished"] == 5


def test_every_prompt_ends_once(own_server):
    own_server.engine.reject = "no"
    own_server.post("/v1/completions", {**BODY, "prompt": ["a", "b"]})
    own_server.engine.reject, own_server.engine.paused = None, True
    requests = own_server.engine.requests
    with contextlib.closing(socket.create_connection(("127.0.0.1", own_server.port))) as client:
        data = b'{"prompt": "x"}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        wait_for(lambda: len(own_server.engine.requests) > len(requests))
    own_server.wait_idle()
    found = read(own_server)
    assert found["prompts_total", "refused"] == 2
    assert found["prompts_total", "aborted"] == 1
    own_server.call(lambda: submit(own_server.generations, [1], SamplingParams(max_tokens=500)))
    own_server.call(lambda: own_server.state.die("over"))
    assert own_server.post("/v1/completions", BODY).status == 503
    assert read(own_server)["prompts_total", "failed"] == 1


def test_metrics_show_the_managers_figures(own_server):
    assert ("running_sequences",) not in read(own_server)  # there are no statistics yet
    own_server.call(lambda: own_server.generations.absorb(SOMETHING))
    found = read(own_server)
    assert found["running_sequences",] == 512
    assert found["waiting_sequences",] == 1500
    assert found["generated_tokens_total",] == 5000
    assert found["computed_prompt_tokens_total",] == 6000
    assert found["cached_prompt_tokens_total",] == 2000
    assert found["grouped_decode_tokens_total",] == 1000
    assert found["grouped_prompt_tokens_total",] == 1500
    assert found["preemptions_total",] == 3
    assert found["queue_seconds_total",] == 1.5
    assert found["step_seconds",] == 0.25
    assert found["kv_use",] == 0.5
    assert found["paused",] == 1
    assert found["weights_version",] == 4
    assert found["prompts_in_flight",] == 0


# --- the line ----------------------------------------------------------------------------------


@pytest.fixture
def line():
    """A statistics line, its text core, and its clock, which the test sets."""
    generations = Generations(CONFIG, TOKENIZER, FakeEngine().send)
    generations.absorb(NOTHING)
    time = [100.0]
    history = History(clock=lambda: time[0])
    return StatisticsLine(generations, history, clock=lambda: time[0]), generations, time, history


def test_the_statistics_line_covers_the_time_since_the_previous_one(line):
    line, generations, time, _ = line
    time[0] += 10
    assert line.next() is None
    generations.absorb(SOMETHING)
    time[0] += 5
    expected = "in 1.6k tokens/s, out 1k tokens/s, running 512, waiting 1.5k, KV 50%"
    assert line.next() == f"{expected}, prefix hits 25%, preemptions 3"
    time[0] += 5
    assert line.next() is None
    later = {"num_batches": 11, "num_generated_tokens": 5003, "num_running": 1, "num_waiting": 0}
    generations.absorb(msgspec.structs.replace(SOMETHING, **later))
    time[0] += 1
    assert line.next() == "in 0 tokens/s, out 3 tokens/s, running 1, waiting 0, KV 50%"


def test_the_line_and_the_metrics_say_the_same_of_what_limits_throughput(own_server):
    generations, history = own_server.generations, own_server.state.history
    line = StatisticsLine(generations, history)
    own_server.call(lambda: generations.absorb(NOTHING))
    history.sample(generations)
    line.next()
    full = msgspec.structs.replace(
        SOMETHING, paused=False, num_page_bound_batches=9, num_seats=2000, page_size=16
    )
    own_server.call(lambda: generations.absorb(full))
    history.sample(generations)
    assert history.limit.flag == "kv_cache_num_tokens"
    assert line.next().endswith(f". Limit: {history.limit.sentence}")
    text = own_server.get("/metrics").content.decode()
    help_text = f"1 for what limits throughput. {history.limit.sentence}"
    assert f"# HELP tokasaurus_limit {help_text}\n" in text
    found = read(own_server)
    assert found["limit", "kv_cache"] == 1
    assert sum(value for (name, *_), value in found.items() if name == "limit") == 1
    (packet,) = statsd_packets(limit_figures(history.limit))
    assert gauges_of(packet)["limit.kv_cache"] == 1


def test_the_statistics_line_comes_while_a_request_is_in_flight(line):
    line, generations, _, _ = line
    generation = submit(generations, [1], SamplingParams())
    assert line.next() == "in 0 tokens/s, out 0 tokens/s, running 0, waiting 0, KV 0%"
    generations.abort(generation)
    assert line.next() is None


def test_the_statistics_line_is_logged(caplog, line):
    _, generations, _, history = line

    async def run():
        config = dataclasses.replace(CONFIG, stats_report_s=0.01)
        task = asyncio.create_task(report(config, generations, history))
        number = 0
        while not caplog.records:
            number += 1
            generations.absorb(msgspec.structs.replace(SOMETHING, num_batches=number))
            await asyncio.sleep(0.01)
        task.cancel()

    with caplog.at_level("INFO", "tokasaurus"):
        asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
    assert "running 512" in caplog.text


# --- statsd ------------------------------------------------------------------------------------


def gauges_of(packet):
    lines = [row.split(":") for row in packet.decode().split("\n")]
    assert all(value.endswith("|g") for _, value in lines)
    return {name.removeprefix("tokasaurus."): float(value[:-2]) for name, value in lines}


def test_statsd_receives_gauges(line):
    _, generations, _, history = line
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.settimeout(PATIENCE_S)
        config = with_config(statsd_address=daemon.getsockname())
        generations.absorb(SOMETHING)

        async def run():
            task = asyncio.create_task(report(config, generations, history))
            packet = await asyncio.to_thread(daemon.recv, 1 << 16)
            task.cancel()
            return packet

        found = gauges_of(asyncio.run(run()))
    assert found["running_sequences"] == 512
    assert found["generated_tokens"] == 5000
    assert found["kv_use"] == 0.5


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "x..invalid"])
def test_a_missing_statsd_daemon_does_no_harm(line, host, caplog, monkeypatch):
    _, generations, _, history = line
    monkeypatch.setattr("tokasaurus.server.reports._GAUGES_EVERY_S", 0.001)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]

    config = with_config(statsd_address=(host, port))

    async def run():
        task = asyncio.create_task(report(config, generations, history))
        if host != "127.0.0.1":  # the name has no address, which ends the gauges
            while not caplog.records:
                await asyncio.sleep(0.005)
            task.cancel()
            return
        for _ in range(20):
            generations.absorb(msgspec.structs.replace(SOMETHING))
            await asyncio.sleep(0.005)
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert ("no statsd gauges" in caplog.text) == (host != "127.0.0.1")


def test_statsd_packets_fit_an_ethernet_frame():
    many = [Figure(f"figure_{number}", "", number) for number in range(500)]
    packets = list(statsd_packets(many))
    assert len(packets) > 1
    assert all(len(packet) <= 1400 for packet in packets)
    found = {name: value for packet in packets for name, value in gauges_of(packet).items()}
    assert found == {f"figure_{number}": number for number in range(500)}


# --- several replicas ----------------------------------------------------------------------------


def of_two_replicas() -> tuple[Generations, Replicas]:
    """A text core over two replicas, of which the second runs 7 sequences."""
    router = Replicas([lambda message: None] * 2, [Seats(8, 4096)] * 2)
    generations = Generations(CONFIG, TOKENIZER, router.send, replicas=router)
    router.attach(generations.find, lambda: None)
    submit(generations, [9, 10, 11], SamplingParams(n=2, max_tokens=20))
    running = msgspec.structs.replace(SOMETHING, num_running=7)
    for replica, statistics in enumerate((NOTHING, running)):
        for message in router.absorb(replica, statistics):
            generations.absorb(message)
    return generations, router


def test_each_replica_has_figures_of_its_own_and_ends_are_counted():
    generations, router = of_two_replicas()
    text = Metrics(lambda: figures(generations)).text().decode()
    for line in (
        'tokasaurus_replica_up{replica="0"} 1.0',
        'tokasaurus_replica_samples{replica="0"} 2.0',
        'tokasaurus_replica_expected_tokens{replica="0"} 43.0',
        'tokasaurus_replica_expected_tokens{replica="1"} 0.0',
        'tokasaurus_replica_running_sequences{replica="1"} 7.0',
        'tokasaurus_replica_generated_tokens{replica="1"} 5000.0',
        "tokasaurus_lost_replicas_total 0.0",
    ):
        assert line in text.splitlines(), line
    assert text.count("# TYPE tokasaurus_replica_up gauge") == 1
    router.lost(0, "killed")
    after = Metrics(lambda: figures(generations)).text().decode().splitlines()
    for line in (
        'tokasaurus_replica_up{replica="0"} 0.0',
        'tokasaurus_replica_samples{replica="1"} 2.0',
        "tokasaurus_lost_replicas_total 1.0",
        "tokasaurus_moved_samples_total 2.0",
        "tokasaurus_begun_again_samples_total 2.0",
    ):
        assert line in after, line


def test_the_line_says_what_each_replica_runs():
    generations, router = of_two_replicas()
    line = StatisticsLine(generations, History())
    assert ", replicas 0 7" in line.next()
    router.lost(0, "killed", starts_again=True)
    assert ", replicas - 7" in line.next()


def test_gauges_of_replicas_have_their_numbers():
    packets = b"".join(
        statsd_packets(
            [Figure("replica_up", "", 1, replica=0), Figure("replica_up", "", 0, replica=1)]
        )
    )
    assert packets == b"tokasaurus.replica_up.0:1|g\ntokasaurus.replica_up.1:0|g"
