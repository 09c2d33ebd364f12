"""Sequences as rows of the forecast."""

from __future__ import annotations

from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.manager.forecast.curve import Forest
from tokasaurus.manager.forecast.learning import LengthLearning
from tokasaurus.manager.forecast.rows import Candidate, candidate_rows, running_rows
from tokasaurus.manager.forecast.use_curve import UseCurve
from tokasaurus.manager.sequence import Sequence

CONFIG = make_config(
    num_pages=64,
    max_tokens_per_forward=8,
    scheduling_steps_ahead=1,
    admission=make_admission(predict_lengths=False),
)


def learning(world: World) -> LengthLearning:
    return LengthLearning(world.config, world.manager._running)


def queued(world: World, request_id: int) -> Sequence:
    sequence = world.manager._backlog.find(request_id, 0)
    assert sequence is not None
    return sequence


def test_pages_found_in_the_cache_count_once_while_the_rest_is_fed() -> None:
    world = World(CONFIG)
    world.finish(make_request(0, prompt(20), 4))
    world.turn(*[make_request(i, prompt(20) + prompt(18, i), 4) for i in (1, 2)])
    running = world.manager._running
    most_feeding = 0
    for _ in range(12):
        slots, rows = running_rows(running, learning(world))
        if len(slots) == 2:
            most_feeding = max(most_feeding, int(rows.num_prompt_tokens.max()))
        forest = Forest(running.prefixes.parent, running.prefixes.end_column)
        forecast = UseCurve(page_size=4, prefill_rate=8).forecast(running=rows, forest=forest)
        assert forecast.use()[:1].sum() == running.pages.num_held
        world.turn(num_results=1)
    assert most_feeding > 0
    world.drain()


def test_the_row_of_a_candidate_is_followed_by_those_of_its_forks() -> None:
    world = World(CONFIG)
    world.turn(make_request(1, prompt(50, 3), 9))  # is being fed, so that the other one waits
    world.turn(make_request(2, prompt(10), 7, n=4))
    candidate = Candidate(queued(world, 2), num_tokens=10, num_held_pages=0, num_forks=3)
    rows, forest = candidate_rows([candidate], 4, learning(world))
    assert candidate.num_rows == len(rows) == 4
    assert rows.length.tolist() == [10] * 4
    assert rows.num_pages.tolist() == [3] * 4
    assert rows.num_prompt_tokens.tolist() == [10, 0, 0, 0]
    assert rows.num_steps.tolist() == [6] * 4
    assert rows.leaf.tolist() == [0] * 4
    assert (forest.parent.tolist(), forest.end_column.tolist()) == ([-1], [2])
    assert candidate.most_pages(4) == 4 * 4  # 16 positions each
    world.drain()


def test_pages_with_other_holders_are_left_out_of_a_candidate() -> None:
    world = World(CONFIG)
    world.turn(make_request(1, prompt(50, 3), 9))
    world.turn(make_request(2, prompt(10), 7))
    candidate = Candidate(queued(world, 2), num_tokens=6, num_held_pages=1, num_forks=0)
    rows, forest = candidate_rows([candidate], 4, learning(world))
    assert (rows.length.tolist(), rows.num_pages.tolist()) == ([6], [2])
    assert (rows.leaf.tolist(), len(forest.parent)) == ([-1], 0)
    world.drain()


def test_forks_of_a_running_prompt_have_rows_and_the_prompt_has_none() -> None:
    world = World(CONFIG)
    world.turn(make_request(1, prompt(10), 7, n=3))
    candidate = Candidate(queued(world, 1), num_tokens=0, num_held_pages=0, num_forks=2)
    rows, forest = candidate_rows([candidate], 4, learning(world))
    assert (rows.length.tolist(), rows.num_pages.tolist()) == ([2, 2], [1, 1])
    assert (rows.leaf.tolist(), len(forest.parent)) == ([-1, -1], 0)
    world.drain()
