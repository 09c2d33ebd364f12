"""Submitting and collecting: several batches in flight, late and wrong collects, failures."""

from __future__ import annotations

import re
import time

import msgspec
import pytest
import torch
from fake_vocabulary import VOCABULARY
from rows import named
from worker_driver import Enter, make_driver, worker_config
from worker_script import contents, ids, ints, load_vocabulary, run, script

from tokasaurus.errors import EngineError, ProtocolError
from tokasaurus.model.backend.base import NO_GROUPED_ROWS
from tokasaurus.model.download import Download
from tokasaurus.model.sampling.logprobs import Logprobs
from tokasaurus.model.worker.clock import EventClock, HostClock
from tokasaurus.model.worker.pending import InFlight, Outputs
from tokasaurus.model.worker.worker import Worker


@pytest.fixture
def config(checkpoint):
    return worker_config(checkpoint("llama", tied=True), num_slots=12, num_pages=200)


def test_batches_in_flight_give_what_batches_one_by_one_give(config):
    batches = script(config)
    expected = run(Worker(config, load_vocabulary), batches, 1)
    assert any(result.pooled is not None for result in expected)
    assert any(len(result.prompt_logprobs) for result in expected)
    for in_flight in (2, 3, len(batches) + 1):
        worker = Worker(config, load_vocabulary)
        results = run(worker, batches, in_flight)
        with named(f"{in_flight} batches in flight"):
            assert [contents(each) for each in results] == [contents(each) for each in expected]


def test_grammars_hold_while_batches_are_in_flight(config):
    """The script's masks come from tokens of batches that are not collected yet."""
    results = run(Worker(config, load_vocabulary), script(config), 3)
    letters = "".join(
        VOCABULARY.tokens[result.token_ids[row]].decode()
        for result, row in zip(results[:7], [1, 1, 1, 3, 3, 3, 3], strict=True)
    )
    assert re.fullmatch("a+(b[ab]*)?", letters)


def test_the_wait_for_grammars_is_counted(config):
    worker = Worker(config, load_vocabulary)
    worker.warm_up()
    assert worker.grammar_wait_s == 0
    run(worker, script(config), 2)
    assert worker.grammar_wait_s > 0


def test_without_grammars_submit_does_not_wait(checkpoint):
    driver = make_driver(checkpoint("llama", tied=True))
    driver.start(0)
    driver.step(prefill=[Enter(0, ids(5, 0))])
    driver.step(decode=[0])
    assert driver.worker.grammar_wait_s == 0


def test_the_time_of_a_batch_covers_its_pass(checkpoint, monkeypatch):
    driver = make_driver(checkpoint("llama", tied=True))
    driver.start(0)
    run_layers = driver.worker._runner.run

    def run_slowly(planned):
        time.sleep(0.05)
        return run_layers(planned)

    monkeypatch.setattr(driver.worker._runner, "run", run_slowly)
    started = time.perf_counter()
    result = driver.step(prefill=[Enter(0, ids(5, 0))])
    assert 0.05 <= result.device_s <= time.perf_counter() - started


def test_batches_are_collected_once_each_and_in_order(checkpoint):
    driver = make_driver(checkpoint("llama", tied=True))
    driver.start(0)
    pending = [driver.submit(prefill=[Enter(0, ids(5, 0))])]
    pending += [driver.submit(decode=[0]) for _ in range(2)]
    with pytest.raises(ProtocolError, match="batch 2 is collected before batch 0"):
        pending[2].collect()
    assert pending[0].collect().number == 0
    with pytest.raises(ProtocolError, match="batch 0 was collected before"):
        pending[0].collect()
    assert [each.collect().number for each in pending[1:]] == [1, 2]


def test_a_batch_that_is_refused_leaves_the_others_in_flight_alone(checkpoint):
    driver = make_driver(checkpoint("llama", tied=True))
    driver.start(0)
    first = driver.submit(prefill=[Enter(0, ids(5, 0))])
    bad = msgspec.structs.replace(driver.batch(), decode_slots=ints(3))
    with pytest.raises(ProtocolError, match="batch 1: it decodes a slot that has no tokens yet"):
        driver.worker.submit(bad)
    driver.number += 1
    last = driver.submit(decode=[0])
    assert [first.collect().number, last.collect().number] == [0, 2]


def test_a_pass_that_fails_as_it_is_submitted_is_named(checkpoint, monkeypatch):
    driver = make_driver(checkpoint("llama", tied=True))
    driver.start(0)
    first = driver.submit(prefill=[Enter(0, ids(5, 0))])

    def fail(planned):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(driver.worker._runner, "run", fail)
    with pytest.raises(EngineError, match="batch 1: RuntimeError: out of memory"):
        driver.submit(decode=[0])
    assert first.collect().number == 0


class FailingClock(HostClock):
    def wait(self):
        raise RuntimeError("an illegal address")


def test_a_pass_that_fails_on_the_device_is_named_as_it_is_collected():
    batches = InFlight()
    none = Logprobs.none(0, 1)
    first, second = (
        batches.add(
            number,
            f"batch {number}",
            Outputs(Download(torch.tensor([7])), none, none, None, None, NO_GROUPED_ROWS, 0, 0.0),
            clock,
        )
        for number, clock in enumerate((FailingClock(), HostClock()))
    )
    with pytest.raises(EngineError, match="batch 0: RuntimeError: an illegal address"):
        first.collect()
    assert second.collect().token_ids.tolist() == [7]


class FakeEvent:
    """An event of a device whose time goes on when it is waited for."""

    now_ms, done = 0.0, False

    def __init__(self, device, enable_timing):
        assert enable_timing

    def record(self):
        self.at_ms = FakeEvent.now_ms

    def query(self):
        return FakeEvent.done

    def synchronize(self):
        FakeEvent.done = True

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms


def test_a_device_is_timed_by_its_own_events(monkeypatch):
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "done", False)
    clock = EventClock(torch.device("cuda"))
    monkeypatch.setattr(FakeEvent, "now_ms", 250.0)
    clock.stop()
    assert not clock.is_done
    assert clock.wait() == 0.25
    assert clock.is_done
