"""Requests of which samples have generated tokens elsewhere go on as after a preemption."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from fake_device import Oracle, oracle
from simulation import Simulation, World, make_config, make_request, prompt

from tokasaurus.protocol.commands import Command, CommandDone, Pause, PauseMode
from tokasaurus.protocol.messages import (
    FinishReason,
    FromServer,
    GenerateRequest,
    Pooling,
    Progress,
)


def progress(generated: dict[int, list[int]], num_finished: int = 0) -> Progress:
    """The progress of samples with these ids."""
    return Progress(
        np.array(list(generated), np.int32),
        np.array([len(ids) for ids in generated.values()], np.int32),
        np.array([token for ids in generated.values() for token in ids], np.int32),
        num_finished,
    )


def ids_by_sample(given: Progress) -> dict[int, list[int]]:
    ends = np.cumsum(given.num_generated)
    parts = np.split(given.generated_ids, ends[:-1])
    return {
        index: part.tolist()
        for index, part in zip(given.sample_indices.tolist(), parts, strict=True)
    }


class ProgressWorld(World):
    """A world that knows what samples have generated elsewhere."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # By request id: the version of the weights that drew the tokens; 0 where it is not here.
        self.drawn_with: dict[int, int] = {}
        self.latest: set[tuple[int, int]] = set()  # names that began elsewhere and came this turn

    def turn(self, *events: FromServer, **options: Any) -> None:
        self.latest.clear()
        super().turn(*events, **options)

    def _check_drained(self, command_id: int) -> None:
        begun, self.begun = self.begun, self.begun - self.latest
        super()._check_drained(command_id)
        self.begun = begun

    def _note(self, event: FromServer) -> None:
        super()._note(event)
        if not isinstance(event, GenerateRequest) or event.progress is None:
            return
        begun = ids_by_sample(event.progress)
        self.num_finished[event.request_id] = event.progress.num_finished
        for index in range(event.n):
            name = (event.request_id, index)
            if index not in begun:
                del self.answers[name], self.living[name]
                continue
            answer, count = self.answers[name], len(begun[index])
            version = self.drawn_with.get(event.request_id, 0)
            answer.expected.generate(count, version)
            answer.ids = begun[index]
            answer.weights_versions = [version] * count
            answer.logprobs = answer.expected.logprobs.copy()
            answer.tops = answer.expected.tops.copy()
            answer.acked = count
            if count:
                self.begun.add(name)
                self.latest.add(name)
            self.device.num_drawn[event.seed, index] = count


class ProgressSimulation(ProgressWorld, Simulation):
    """Half of the requests go on with what samples have generated elsewhere."""

    def _request(self, request_id: int) -> GenerateRequest:
        request = super()._request(request_id)
        chance = self._random
        if request.pooling or chance.random() < 0.5:
            return request
        indices = sorted(chance.sample(range(request.n), chance.randint(1, request.n)))
        num_finished = request.n - len(indices)
        if 0 < request.first_k <= num_finished:
            return request
        generated = {}
        self._note_cartridge(request)
        version = self.drawn_with[request_id] = chance.choice(self.weights_versions)
        for index in indices:
            alone = Oracle(request, index, self.behind[request_id])
            while not alone.has_ended:
                alone.generate(1, version)
            ids = alone.ids
            generated[index] = ids[: chance.choice([0, chance.randrange(len(ids))])]
        if generated.get(0):
            request = msgspec.structs.replace(request, num_prompt_logprobs=-1)
        return msgspec.structs.replace(request, progress=progress(generated, num_finished))


def run_worlds(
    first_seed: int, num_events: int, make_world: Callable[[int], Simulation]
) -> Counter[str]:
    """Runs worlds like these until this much has happened; returns what happened in them."""
    counts: Counter[str] = Counter()
    seeds = itertools.count(first_seed)
    while num_events > 0:
        seed = next(seeds)
        like = make_world(seed)
        world = ProgressSimulation(seed, like.config, like.habits)
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {world.config} {world.habits}") from error
        counts["updates"] += len(world.weights_versions) - 1
        for name in world.begun:
            request = world.requests[name[0]]
            if request.progress is not None and name in world.answers:
                counts["with cartridges"] += bool(request.cartridge)
                versions = set(world.answers[name].weights_versions)
                counts["of several versions"] += len(versions) > 1
        num_events -= world.num_events
    return counts


def test_random_worlds_go_on_where_samples_stopped_elsewhere() -> None:
    run_worlds(500, 6_000, Simulation.of_seed)


def test_worlds_with_commands_and_cartridges_go_on_where_samples_stopped_elsewhere() -> None:
    counts = run_worlds(700, 10_000, Simulation.commanded_with_cartridges_of_seed)
    assert min(counts[name] for name in ("updates", "with cartridges", "of several versions")) > 20


def test_only_the_new_tokens_of_the_named_samples_are_sent() -> None:
    for streams in ({}, {"stream": True}, {"hold_for_acks": True}):
        world = ProgressWorld(make_config())
        request = make_request(1, prompt(6), 9, n=4, num_logprobs=1, **streams)
        expected = [oracle(request, index).ids for index in range(4)]
        given = progress({1: expected[1][:5], 3: []}, num_finished=2)
        request = msgspec.structs.replace(request, progress=given)
        world.finish(request)
        assert world.answers.keys() == {(1, 1), (1, 3)}, streams
        for index in (1, 3):
            answer = world.answers[1, index]
            assert (answer.ids, answer.reason) == (expected[index], FinishReason.LENGTH), streams
        assert world.manager.counters.num_generated_tokens == 4 + 9, streams


def test_samples_that_finished_elsewhere_count_for_first_k() -> None:
    world = ProgressWorld(make_config())
    request = make_request(1, prompt(6), 9, n=4, first_k=3)
    ids = oracle(request, 1).ids
    # Sample 1 has one token to come, and is the third.
    given = progress({1: ids[:8], 2: []}, num_finished=2)
    world.finish(msgspec.structs.replace(request, progress=given))
    assert world.answers[1, 1].reason is FinishReason.LENGTH
    assert world.answers[1, 2].reason is FinishReason.ABORT


def test_cached_tokens_are_those_of_the_prompt() -> None:
    world = ProgressWorld(make_config(page_size=4))
    first = make_request(1, prompt(8), 9)
    world.finish(first)
    second = msgspec.structs.replace(first, request_id=2, seed=first.seed + 1)
    second = msgspec.structs.replace(second, progress=progress({0: oracle(first, 0).ids[:6]}))
    world.turn(second)
    # The prompt has two pages, and its last token never counts as cached.
    assert world.manager._backlog.find(2, 0).num_cached_tokens == 4


def test_a_drain_lets_sequences_run_that_have_begun_elsewhere() -> None:
    world = ProgressWorld(make_config())
    world.turn(make_request(1, prompt(6), 9))
    world.turn(Command(1, Pause(PauseMode.DRAIN)))
    begun = make_request(2, prompt(6, 1), 9)
    begun = msgspec.structs.replace(begun, progress=progress({0: oracle(begun, 0).ids[:3]}))
    world.turn(begun, make_request(3, prompt(6, 2), 9))
    while world.results:
        world.turn(num_results=1)
    assert [world.answers[number, 0].reason for number in (1, 2, 3)] == [
        FinishReason.LENGTH,
        FinishReason.LENGTH,
        FinishReason.RUNNING,
    ]
    assert isinstance(world.command_answers[1], CommandDone)


def test_nonsense_is_refused_with_a_reason() -> None:
    valid = make_request(1, prompt(6), 9, n=4, first_k=3, num_prompt_logprobs=0)
    cases = {
        "progress names no sample": progress({}),
        "ascending order, from 0 to 3": progress({2: [], 1: []}),
        "ascending order": progress({1: [], 4: []}),
        "in ascending order, from": progress({-1: []}),
        "fewer than max_tokens=9": progress({1: list(range(9))}),
        "1 numbers of tokens for 2 samples": Progress(
            np.array([1, 2], np.int32), np.array([0], np.int32), np.array([], np.int32)
        ),
        "progress has 2 ids for 1 tokens": Progress(
            np.array([1], np.int32), np.array([1], np.int32), np.array([5, 6], np.int32)
        ),
        "progress has 3 samples and 2 that have finished": progress({0: [], 1: [], 2: []}, 2),
        "3 samples have finished, and first_k is 3": progress({1: []}, 3),
        "come before the first token of sample 0": progress({0: [1]}),
    }
    for reason, given in cases.items():
        world = World(make_config())
        actions = world.manager.take_turn([msgspec.structs.replace(valid, progress=given)], 0.0)
        (rejected,) = actions.messages
        assert reason in rejected.reason
        assert rejected.field == "progress"
        assert world.manager.idle
    pooled = make_request(2, prompt(6), 1, pooling=Pooling.LAST, progress=progress({0: []}))
    world = World(make_config())
    world.finish(pooled)
    assert world.answers[2, 0].reason is FinishReason.LENGTH
