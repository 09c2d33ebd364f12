"""Submitting and collecting: several batches in flight, late and wrong collects, failures."""

from __future__ import annotations

import dataclasses
import random
import re
import time
from collections import deque

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE
from fake_vocabulary import VOCABULARY
from rows import named
from worker_driver import Driver, Enter, make_driver, worker_config

from tokasaurus.errors import EngineError, ProtocolError
from tokasaurus.model.download import Download
from tokasaurus.model.sampling.sampler import Logprobs
from tokasaurus.model.worker.clock import EventClock, HostClock
from tokasaurus.model.worker.pending import InFlight, Outputs
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    Adjustments,
    ForwardBatch,
    ForwardResult,
    LogprobsMode,
    Pooling,
    Sampling,
    SlotGrammar,
)

PENALTIES = Adjustments(
    repetition_penalty=1.3, frequency_penalty=0.5, bad_words=((7,), (1, 2)), bias=((9, 2.0),)
)


def load_vocabulary():
    padding = [b""] * (VOCAB_SIZE - len(VOCABULARY.tokens))
    return dataclasses.replace(VOCABULARY, tokens=[*VOCABULARY.tokens, *padding])


@pytest.fixture
def config(checkpoint):
    return worker_config(checkpoint("llama", tied=True), num_slots=12, num_pages=200)


def ids(count, seed):
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(count)]


def ints(*values):
    return np.array(values, np.int32)


def script(config) -> list[ForwardBatch]:
    """Chunks, forks, penalties, grammars, prompt logprobs and pooling, with changes of slots.

    Slots 0 and 1 have grammars, 2 and 3 penalties, 4 forks into 5 and 6, 7 gets prompt logprobs
    chunk by chunk, 8 is pooled, 9 has none of these. Half-way slots 0, 2 and 9 change sequences.
    """
    driver = Driver(None, config)
    batches = []

    def add(decode=(), prefill=(), grammars=(), adjusted=(), **changes):
        batch = driver.batch(list(decode), list(prefill))
        driver.number += 1
        if batch.parameters is not None:
            parameters = msgspec.structs.replace(
                batch.parameters, grammars=grammars, adjusted=adjusted
            )
            batch = msgspec.structs.replace(batch, parameters=parameters)
        batches.append(msgspec.structs.replace(batch, **changes))

    for slot in range(10):
        mode = list(LogprobsMode)[slot % len(LogprobsMode)]
        sampling = Sampling(
            temperature=0.9,
            top_p=0.95,
            logprobs_mode=mode,
            adjustments=PENALTIES if slot in (2, 3) else None,
        )
        driver.start(slot, sampling, seed=slot, num_logprobs=slot % 3 - 1)
    entering = [Enter(slot, ids(9, slot)) for slot in (0, 1, 2, 3, 9)]
    entering.append(Enter(4, ids(19, 4), forks=(5, 6)))
    scored = driver.chunks(7, ids(30, 7), 11, num_prompt_logprobs=2)
    pooled = driver.chunks(8, ids(30, 8), 11)
    add(
        prefill=[*entering, scored[0], pooled[0]],
        grammars=(
            SlotGrammar("start: /[a-z]{3,40}/", ints(0), ints(0), ints()),
            SlotGrammar("start: /a+b[ab]{30}/", ints(1), ints(0), ints()),
        ),
        adjusted=(AdjustedSlots(ints(2, 3), 2, ints(*ids(9, 2))),),
        prefill_pooling=ints(*[0] * len(entering), 0, Pooling.MEAN),
    )
    for part in (1, 2):
        add(
            range(7),
            [scored[part], pooled[part]],
            prefill_pooling=ints(Pooling.NONE, Pooling.MEAN),
        )
    for _ in range(4):
        add([6, 3, 0, 1, 2, 5, 4, 9, 7])
    add([1, 3, 4], left_slots=ints(2))
    for slot in (0, 2, 9):
        sampling = Sampling(temperature=0.7, adjustments=PENALTIES if slot == 0 else None)
        driver.start(slot, sampling, seed=slot + 20, num_logprobs=1)
    add(
        [1, 3, 4, 7],
        [Enter(slot, ids(12, slot + 20)) for slot in (0, 2, 9)],
        grammars=(SlotGrammar("start: /b[cd]+/", ints(9), ints(0), ints()),),
        adjusted=(AdjustedSlots(ints(0), 0, ints(*ids(12, 20))),),
    )
    for _ in range(4):
        add([9, 0, 2, 1, 3])
    return batches


def run(worker: Worker, batches: list[ForwardBatch], in_flight: int) -> list[ForwardResult]:
    """Collects a batch once this number of batches is in flight."""
    results, pending = [], deque()
    for batch in batches:
        pending.append(worker.submit(batch))
        if len(pending) == in_flight:
            results.append(pending.popleft().collect())
    return results + [each.collect() for each in pending]


def contents(result: ForwardResult) -> dict[str, object]:
    """Everything but the time."""
    values = {name: getattr(result, name) for name in ForwardResult.__struct_fields__}
    del values["device_s"]
    return {
        name: (str(value.dtype), value.shape, value.tobytes())
        if isinstance(value, np.ndarray)
        else value
        for name, value in values.items()
    }


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
        batches.add(number, Outputs(Download(torch.tensor([7])), none, none, None, None), clock)
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
