"""The stages of requests that ask for them, and the names that reach the log and the worker."""

from __future__ import annotations

import logging

from simulation import World, make_config, make_request, prompt

from tokasaurus.protocol.messages import AbortRequest, Stage


def test_a_request_that_asks_hears_of_its_admission_and_first_token_once():
    world = World(make_config())
    world.finish(make_request(1, prompt(9), 6, report_stages=True, n=3))
    world.finish(make_request(2, prompt(9), 6, n=3))
    assert dict(world.stages) == {1: [Stage.ADMITTED, Stage.FIRST_TOKEN]}


def test_a_request_that_waits_is_admitted_when_it_runs():
    world = World(make_config(num_pages=6))
    world.turn(make_request(1, prompt(10), 10, report_stages=True))
    world.turn(make_request(2, prompt(10, 3), 10, report_stages=True))
    assert list(world.stages) == [1]
    world.drain()
    assert world.stages[2] == [Stage.ADMITTED, Stage.FIRST_TOKEN]


def test_a_first_token_is_reported_when_the_batch_that_draws_it_has_run():
    world = World(make_config(max_tokens_per_forward=24))
    world.turn(make_request(1, prompt(40), 6, report_stages=True))  # a prompt of two batches
    for num_results in (0, 0, 1):
        world.turn(num_results=num_results)
        assert world.stages[1] == [Stage.ADMITTED]
    world.turn(num_results=1)
    assert world.stages[1] == [Stage.ADMITTED, Stage.FIRST_TOKEN]


def test_a_request_that_is_aborted_before_its_first_token_has_none():
    world = World(make_config())
    world.turn(make_request(1, prompt(9), 6, report_stages=True))
    world.turn(AbortRequest(1))
    world.drain()
    assert dict(world.stages) == {1: [Stage.ADMITTED]}


def test_a_preemption_is_a_stage():
    world = World(make_config(force_preemption=True))
    for number in range(4):
        world.turn(make_request(number, prompt(9, number), 30, report_stages=True))
    world.drain()
    num_reported = sum(stages.count(Stage.PREEMPTED) for stages in world.stages.values())
    assert num_reported == world.manager.counters.num_preemptions > 0


def test_the_worker_is_told_the_names_of_those_that_enter():
    world = World(make_config())
    world.turn(
        make_request(1, prompt(5), 3, name="mine/7", n=2),
        make_request(2, prompt(5, 1), 3),
        make_request(3, prompt(5, 2), 3, name="req_2"),
    )
    (parameters,) = [batch.parameters for batch in world.batches if batch.parameters is not None]
    names = [parameters.names[place] for place in parameters.name_index.tolist()]
    by_slot = dict(zip(parameters.slots.tolist(), names, strict=True))
    running = world.manager._running.slots
    assert {slot: world.requests[int(running.request_id[slot])].name for slot in by_slot} == by_slot
    assert sorted(names) == ["", "mine/7", "mine/7", "req_2"]


def test_without_names_none_are_sent():
    world = World(make_config())
    world.turn(make_request(1, prompt(5), 3))
    (parameters,) = [batch.parameters for batch in world.batches if batch.parameters is not None]
    assert (parameters.names, len(parameters.name_index)) == ((), 0)


def test_the_log_says_at_debug_what_becomes_of_a_request(caplog):
    caplog.set_level(logging.DEBUG, "tokasaurus.manager")
    world = World(make_config())
    world.finish(make_request(1, prompt(5), 3, name="mine/7"))
    assert {record.request for record in caplog.records} == {"mine/7"}
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith("sample 0 runs after ")
    assert texts[-1] == "sample 0 ends: length"
    caplog.clear()
    caplog.set_level(logging.INFO, "tokasaurus.manager")
    world.finish(make_request(2, prompt(5), 3, name="mine/8"))
    assert not caplog.records
