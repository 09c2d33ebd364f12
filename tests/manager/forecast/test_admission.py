"""The forecast between two refreshes against one computed anew, and what must not be left of anything."""

from __future__ import annotations

import numpy as np
import pytest
from simulation import Simulation, World, make_admission, make_config, make_request, prompt

from tokasaurus.protocol.messages import AbortRequest

KNOWN = make_admission(predict_lengths=False)


def curves(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Use of pages from now on: patched, and computed anew."""
    admission = world.manager._admission
    admission._apply_patches()
    patched = admission._coming().copy()
    admission._now -= 1  # a refresh is for the step whose decode rows were planned last
    admission.refresh((), 24)
    admission._now += 1
    return np.trim_zeros(patched, "b"), np.trim_zeros(admission._coming(), "b")


def crowded(**changes: object) -> World:
    """A world in which the forecast is asked from the beginning."""
    world = World(make_config(num_pages=24, admission=KNOWN, scheduling_steps_ahead=1, **changes))
    world.turn(*[make_request(i, prompt(7, i), 24) for i in range(10)])
    world.turn(num_results=1)
    return world


def test_who_is_admitted_is_in_the_forecast() -> None:
    patched, anew = curves(crowded())
    assert patched.size > 10
    assert patched.tolist() == anew.tolist()


def test_who_ends_is_not() -> None:
    world = crowded()
    world.turn(AbortRequest(0), AbortRequest(1))
    patched, anew = curves(world)
    assert patched.tolist() == anew.tolist()
    world.drain()


def test_forks_share_their_prompt_in_the_forecast() -> None:
    world = World(make_config(num_pages=24, admission=KNOWN, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(18), 14, n=8))
    world.turn(num_results=1)
    patched, anew = curves(world)
    assert patched.tolist() == anew.tolist()
    world.drain()


def test_pages_found_in_the_cache_count_once_while_the_rest_is_fed() -> None:
    world = World(
        make_config(
            num_pages=64, max_tokens_per_forward=8, admission=KNOWN, scheduling_steps_ahead=1
        )
    )
    world.finish(make_request(0, prompt(20), 4))
    world.turn(*[make_request(i, prompt(20) + prompt(18, i), 4) for i in (1, 2)])
    assert len(world.manager._running.prefilling) == 1
    world.turn(num_results=1)
    pages = world.manager._running.pages
    world.manager._admission.refresh((), 8)
    assert world.manager._admission._coming()[0] == pages.pool.num_pages - pages.num_available
    world.drain()


def test_nothing_is_learned_where_nothing_is_to_be_learned() -> None:
    world = World(make_config(admission=make_admission(learn_lengths=False)))
    for index in range(20):
        world.finish(make_request(index, prompt(5, index), 4, n=3))
    lengths = world.manager._admission._lengths
    assert lengths._num_handles == 0
    assert not lengths._closed


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left_when_all_have_ended(seed: int) -> None:
    world = Simulation.of_seed(7_000 + seed)
    world.run()
    running = world.manager._running
    assert not running.resting
    assert not running.in_progress.sequences()
    assert not running.prefixes.num_holders.any()
    assert (running.prefixes.leaf == -1).all()


def test_who_becomes_the_head_is_asked_about_at_once() -> None:
    world = crowded()
    for _ in range(3):
        world.turn(num_results=1)
    admission, backlog = world.manager._admission, world.manager._backlog
    assert not admission.may_ask(backlog.head())  # it was refused, and nothing happened since
    num_running = world.manager._running.num_running
    world.turn(make_request(99, prompt(2, 99), 2, priority=-1), num_results=1)
    assert world.manager._running.num_running == num_running + 1
    world.drain()
