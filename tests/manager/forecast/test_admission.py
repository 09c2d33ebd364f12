"""Admission by forecast: the forecast against the real use of pages, and when it is asked."""

from __future__ import annotations

from collections.abc import Callable

from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.manager.forecast.admission import REFRESH_INTERVAL
from tokasaurus.protocol.messages import AbortRequest, FromServer

KNOWN = make_admission(predict_lengths=False)  # every sequence is as long as max_tokens


def crowded() -> World:
    """A world in which the forecast is asked from the beginning."""
    world = World(make_config(num_pages=24, admission=KNOWN, scheduling_steps_ahead=1))
    world.turn(*[make_request(i, prompt(7, i), 24) for i in range(10)])
    return world


def of_many_samples() -> World:
    world = World(make_config(num_pages=24, admission=KNOWN, scheduling_steps_ahead=1))
    world.turn(make_request(1, prompt(18), 14, n=8), make_request(2, prompt(18, 1), 14, n=8))
    return world


def forecast_error(make_world: Callable[[], World], delay: int, *events: FromServer) -> int:
    """Pages by which forecasts are wrong after these events, which come after ``delay`` turns."""
    world = make_world()
    counters = world.manager.counters
    for _ in range(delay):
        world.turn(num_results=1)
    world.turn(*events, num_results=1)
    before, num_before = counters.num_forecast_pages_off, counters.num_forecasts
    for _ in range(3 * REFRESH_INTERVAL):
        world.turn(num_results=1)
    assert counters.num_forecasts > num_before
    world.drain()
    return counters.num_forecast_pages_off - before


def test_the_forecast_comes_true_where_lengths_are_known() -> None:
    """It is patched with every sequence that is admitted between two refreshes."""
    for make_world in (crowded, of_many_samples):
        assert forecast_error(make_world, 0) == 0, make_world.__name__


def test_sequences_that_are_aborted_leave_the_forecast() -> None:
    """They may end in any step between two refreshes.

    Delay 0 is left out: a refresh would fall on the step in which sequences end, where the forecast
    may be a step off.
    """
    aborts = AbortRequest(0), AbortRequest(1)
    delays = range(1, REFRESH_INTERVAL)
    errors = {delay: forecast_error(crowded, delay, *aborts) for delay in delays}
    assert errors == dict.fromkeys(delays, 0)


def test_a_new_head_of_the_queue_is_asked_about_at_once() -> None:
    world = crowded()
    for _ in range(4):
        world.turn(num_results=1)
    admission, backlog = world.manager._admission, world.manager._backlog
    assert not admission.may_ask(backlog.head())  # it was refused, and nothing happened since
    num_running = world.manager.gauges().num_decoding
    world.turn(make_request(99, prompt(2, 99), 2, priority=-1), num_results=1)
    assert world.manager.gauges().num_decoding == num_running + 1
    world.drain()
