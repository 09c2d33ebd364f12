"""How many batches are kept in flight, by measured times."""

from __future__ import annotations

from simulation import World, make_config, make_request, prompt

from tokasaurus.manager.look_ahead import LookAhead


def test_queued_batches_last_for_a_turn() -> None:
    depths = {  # by the seconds of a turn and of a batch
        (0.0005, 0.003): 2,  # one runs, one waits
        (0.0015, 0.003): 2,
        (0.0035, 0.003): 3,
        (0.0100, 0.003): 5,
        (0.1000, 0.003): 8,  # never more than allowed
        (0.0005, 0.000): 8,  # a device that takes no time always waits
        (0.0005, 1.000): 2,
    }
    found = {}
    for turn_s, batch_s in depths:
        look_ahead = LookAhead(8)
        look_ahead.batch_took(batch_s)
        look_ahead.turn_took(turn_s)
        found[turn_s, batch_s] = look_ahead.depth
    assert found == depths


def test_before_a_batch_is_measured_the_look_ahead_is_the_largest() -> None:
    look_ahead = LookAhead(8)
    look_ahead.turn_took(0.001)
    assert look_ahead.depth == 8


def test_a_long_turn_is_remembered_for_a_while() -> None:
    look_ahead = LookAhead(8)
    look_ahead.batch_took(0.003)
    look_ahead.turn_took(0.010)
    depths = []
    for _ in range(100):
        look_ahead.turn_took(0.0005)
        depths.append(look_ahead.depth)
    assert depths[0] == 5
    assert depths[-1] == 2
    assert depths == sorted(depths, reverse=True)


def test_short_batches_raise_the_look_ahead_at_once_and_long_ones_lower_it_slowly() -> None:
    look_ahead = LookAhead(8)
    for batch_s, depth in ((0.100, 2), (0.001, 4), (0.100, 4)):
        look_ahead.batch_took(batch_s)
        look_ahead.turn_took(0.0015)
        assert look_ahead.depth == depth
    for _ in range(200):
        look_ahead.batch_took(0.100)
    look_ahead.turn_took(0.0015)
    assert look_ahead.depth == 2


def test_a_limit_of_one_batch_in_flight_is_kept() -> None:
    look_ahead = LookAhead(1)
    look_ahead.batch_took(0.001)
    look_ahead.turn_took(0.1)
    assert look_ahead.depth == 1


def test_the_manager_keeps_no_more_batches_in_flight_than_the_look_ahead() -> None:
    world = World(make_config(scheduling_steps_ahead=6))
    world.turn(make_request(1, prompt(5), 40))
    assert world.manager.num_in_flight == 6
    world.manager._look_ahead.batch_took(0.1)
    world.manager.turn_took(0.001)
    while world.manager.num_in_flight > 2:
        sent = len(world.batches)
        world.turn(num_results=1)
        assert len(world.batches) == sent or world.manager.num_in_flight <= 2
    world.drain()
