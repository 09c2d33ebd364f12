"""When the pages of a cartridge are there: written on demand, kept in use, evicted when idle."""

from __future__ import annotations

import pytest
from rows import named
from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.rows import Candidate
from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.protocol.commands import (
    AbortAll,
    CommandDone,
    Pause,
    PauseMode,
    Resume,
    UnloadCartridge,
)
from tokasaurus.protocol.messages import (
    AbortRequest,
    CartridgeState,
    FinishReason,
    ForwardBatch,
    FromServer,
    GenerateRequest,
    Ping,
    Statistics,
)

PAGE_SIZE = 4


def world_with(sizes: dict[str, int], **changes: object) -> World:
    """A world with cartridges of these names and sizes, none of which is there yet."""
    world = World(make_config(**changes))
    for name, num_tokens in sizes.items():
        world.load(name, num_tokens)
    return world


def behind(cartridge: str, request_id: int, length: int, max_tokens: int, **changes: object):
    """A request with a prompt of its own behind this cartridge."""
    ids = prompt(length, request_id)
    return make_request(request_id, ids, max_tokens, cartridge=cartridge, **changes)


def cartridge(world: World, name: str) -> Cartridge:
    found = world.manager._running.cartridges.find(name)
    assert found is not None
    return found


def written(world: World) -> list[str]:
    """The names of the cartridges that were written, in order."""
    return [write.paths[0] for write in world.writes.values()]


def there(world: World) -> str:
    """The names of the cartridges whose pages are there."""
    return "".join(c.name for c in world.manager._running.cartridges.all() if c.is_there)


# --- writing --------------------------------------------------------------------------------------


def test_a_cartridge_is_written_once_for_all_requests_that_name_it() -> None:
    world = world_with({"a": 10}, num_pages=64)
    world.turn(*[behind("a", i, 3, 5, n=2) for i in range(1, 7)])
    assert written(world) == ["a"]
    assert not world.batches
    world.drain()
    world.finish(behind("a", 7, 3, 5))
    assert written(world) == ["a"]
    assert world.device.num_prompt_tokens == 7 * 3


def test_a_cartridge_comes_behind_the_batch_in_which_it_was_claimed() -> None:
    world = world_with({"a": 10}, scheduling_steps_ahead=2)
    world.turn(make_request(1, prompt(5), 9), behind("a", 2, 3, 5))
    assert [type(result).__name__ for result in world.results] == [
        "ForwardResult",
        "ControlDone",
        "ForwardResult",
    ]
    world.drain()


def test_requests_that_wait_for_a_cartridge_hold_up_no_other() -> None:
    world = world_with({"a": 10, "b": 6})
    world.turn(
        behind("a", 1, 3, 5),
        behind("b", 2, 3, 5),
        make_request(3, prompt(5), 3),
        behind("a", 4, 3, 5),
        make_request(5, prompt(7, 5), 3),
    )
    first = next(batch for batch in world.batches if batch.prefill_slots.size)
    assert first.prefill_lengths.tolist() == [5, 7]
    assert written(world) == ["a", "b"]
    world.drain()


def test_samples_that_run_elsewhere_already_wait_for_a_cartridge_too() -> None:
    """The first plan finds nothing to run, and looks again behind the claim."""
    world = world_with({"a": 10}, num_lanes=3)
    world.turn(behind("a", 1, 3, 5), make_request(2, prompt(5), 9))
    assert world.batches
    world.drain()


@pytest.mark.parametrize("kind", ["request", "all", "pause"])
def test_a_request_that_waits_for_its_cartridge_can_be_ended(kind: str) -> None:
    world = world_with({"a": 10}, num_pages=16)
    world.turn(behind("a", 1, 3, 5, n=2), behind("a", 2, 3, 5), num_results=0)
    assert world.manager._running.claims.sequences()
    num_left = 1
    if kind == "request":
        world.turn(AbortRequest(1))
    elif kind == "all":
        world.command(AbortAll())
        num_left = 0
    else:
        world.command(Pause(PauseMode.ABORT))
        world.command(Resume())
        num_left = 0
    assert world.answers[1, 0].reason is world.answers[1, 1].reason is FinishReason.ABORT
    assert cartridge(world, "a").num_users == num_left
    assert len(world.manager._running.claims.sequences()) == num_left
    world.drain()
    assert there(world) == "a"  # it was on its way
    assert isinstance(world.unload("a"), CommandDone)


def test_a_drain_does_not_wait_for_requests_that_wait_for_a_cartridge() -> None:
    world = world_with({"a": 10, "b": 10}, num_pages=64)
    world.finish(behind("b", 1, 3, 5))
    world.turn(make_request(2, prompt(5), 12), behind("a", 3, 3, 5), behind("b", 4, 3, 5))
    drain = world.command(Pause(PauseMode.DRAIN))
    assert not world.manager._running.claims.sequences()
    while drain not in world.command_answers:
        world.turn(num_results=1)
    assert world.answers[2, 0].reason is FinishReason.LENGTH
    assert not world.answers[3, 0].reason
    world.command(Resume())
    world.drain()


def test_a_file_that_cannot_be_read_ends_the_requests_that_name_it_and_no_others() -> None:
    world = World(make_config())
    world.load("a", 9, path="missing a")
    world.load("b", 9)
    world.turn(
        behind("a", 1, 3, 5, n=3),
        behind("b", 2, 3, 5),
        make_request(3, prompt(5), 9),
        behind("a", 4, 3, 5, priority=1),
    )
    world.drain()
    reasons = {request_id: answer.reason for request_id, answer in world.rejected.items()}
    assert reasons == dict.fromkeys((1, 4), "cartridge 'a': missing a does not exist")
    assert {answer.field for answer in world.rejected.values()} == {"cartridges"}
    assert world.answers[2, 0].reason is world.answers[3, 0].reason is FinishReason.LENGTH
    assert len(cartridge(world, "a").pages) == 0
    assert world.manager._running.pages.num_idle == 3  # of "b"
    # It is tried again: the file may be there by now.
    world.failures.clear()
    world.turn(behind("a", 5, 3, 5))
    assert written(world).count("missing a") == 2
    world.drain()
    assert 5 in world.rejected


def test_a_failure_that_comes_after_the_last_request_has_gone_ends_none() -> None:
    world = World(make_config())
    world.load("a", 9, path="missing a")
    world.turn(behind("a", 1, 3, 5))
    world.turn(AbortRequest(1))
    world.turn(num_results=1)
    assert not world.rejected
    assert world.manager._running.pages.num_available == world.config.num_pages
    assert isinstance(world.unload("a"), CommandDone)


def test_a_cartridge_can_be_forgotten_while_it_is_written() -> None:
    world = world_with({"a": 9})
    world.turn(behind("a", 1, 3, 5))
    unload = world.make_command(UnloadCartridge("a"))
    world.turn(AbortRequest(1), unload)
    assert isinstance(world.command_answers[unload.command_id], CommandDone)
    assert world.manager._running.pages.pool.num_free == world.config.num_pages
    world.load("a", 9, path="a, retrained")
    world.turn(behind("a", 2, 3, 5))
    world.drain()
    assert written(world) == ["a", "a, retrained"]


# --- eviction -------------------------------------------------------------------------------------


def test_an_idle_cartridge_gives_way_and_comes_again_with_the_same_answers() -> None:
    world = world_with({"a": 10}, num_pages=10)
    world.finish(behind("a", 1, 9, 4, num_logprobs=1))
    world.finish(make_request(2, prompt(30), 4))
    assert there(world) == ""
    assert cartridge(world, "a").tally.num_evictions == 1
    same = make_request(3, prompt(9, 1), 4, cartridge="a", num_logprobs=1, seed=10_001)
    del world.device.num_drawn[10_001, 0]
    world.finish(same)
    assert world.answers[3, 0].ids == world.answers[1, 0].ids
    assert world.answers[3, 0].logprobs == world.answers[1, 0].logprobs
    assert written(world) == ["a", "a"]


def test_the_cartridge_that_was_used_least_recently_gives_way() -> None:
    sizes = dict.fromkeys("abc", 10)
    world = world_with(sizes, num_pages=13)
    for request_id, name in enumerate("abcab", 1):
        world.finish(behind(name, request_id, 2, 2))
    assert written(world) == ["a", "b", "c"]
    assert there(world) == "abc"
    world.finish(make_request(6, prompt(20), 1))  # 5 pages; 4 are free or have text
    assert there(world) == "ab"
    world.finish(make_request(7, prompt(20, 1), 1))
    assert there(world) == "b"


def test_a_cartridge_in_use_stays_whatever_else_needs_pages() -> None:
    world = world_with({"a": 10}, num_pages=12)
    world.turn(behind("a", 1, 3, 24))
    for request_id in range(2, 8):
        world.turn(make_request(request_id, prompt(12, request_id), 8))
    while not world.answers[1, 0].reason:
        world.turn(num_results=1)
    world.drain()
    assert written(world) == ["a"]
    assert world.manager.counters.num_preemptions > 0


def test_a_cartridge_is_written_again_for_sequences_that_were_preempted() -> None:
    """Only running sequences hold it: in a pause, others could have its pages."""
    world = world_with({"a": 10}, num_pages=10)
    world.turn(behind("a", 1, 3, 12))
    for _ in range(4):
        world.turn(num_results=1)
    world.command(Pause(PauseMode.KEEP))
    pages = world.manager._running.pages
    assert (pages.num_pinned, pages.num_idle) == (0, 3)
    pages.pool.release(pages.allocate(10))
    assert there(world) == ""
    world.command(Resume())
    world.drain()
    assert written(world) == ["a", "a"]


# --- progress -------------------------------------------------------------------------------------


def finish_all(world: World, requests: list[GenerateRequest]) -> None:
    world.turn(*requests)
    world.drain()
    for request in requests:
        assert world.answers[request.request_id, 0].reason is FinishReason.LENGTH


def test_whatever_fits_alone_runs_whatever_else_is_wanted() -> None:
    """Cartridges that do not fit together, beside text that takes the whole cache."""
    for num_tokens in (21, 24, 30):
        for utilization in (0.3, 1.0, 1000.0):
            with named((num_tokens, utilization)):
                world = world_with(
                    dict.fromkeys("abcd", num_tokens),
                    num_pages=12,
                    max_request_tokens=48,
                    admission=make_admission(target_utilization=utilization),
                )
                requests = [
                    behind("abcd"[i % 4], i, 3, 8) if i % 3 else make_request(i, prompt(20, i), 28)
                    for i in range(1, 25)
                ]
                finish_all(world, requests)
                assert set(written(world)) == set("abcd")


def test_a_request_with_a_cartridge_gets_its_turn_in_a_crowd_that_never_ends() -> None:
    world = world_with({"a": 24}, num_pages=12, max_request_tokens=48, share_wait_s=0.02)
    world.turn(*[make_request(i, prompt(8, i), 12) for i in range(10)])
    world.turn(behind("a", 100, 3, 8))
    request_id = 200
    while not world.answers[100, 0].reason:
        arrivals: list[FromServer] = []
        if len(world.living) < 12:
            arrivals = [make_request(request_id, prompt(8, request_id), 12)]
            request_id += 1
        world.turn(*arrivals, num_results=1)
        assert request_id < 260, "it starves"
    world.drain()


def test_a_plain_request_gets_its_turn_among_requests_that_keep_a_cartridge_in_use() -> None:
    world = world_with({"a": 24}, num_pages=12, max_request_tokens=48)
    world.turn(*[behind("a", i, 3, 8) for i in range(4)])
    world.turn(make_request(100, prompt(20), 28))  # all pages
    request_id = 200
    while not world.answers[100, 0].reason:
        arrivals: list[FromServer] = []
        if len(world.living) < 5:
            arrivals = [behind("a", request_id, 3, 8)]
            request_id += 1
        world.turn(*arrivals, num_results=1)
        assert request_id < 260, "it starves"
    world.drain()


def test_requests_of_cartridges_that_do_not_fit_together_run_in_groups() -> None:
    """One write serves all that name a cartridge and came together."""
    world = world_with(dict.fromkeys("ab", 24), num_pages=12, max_request_tokens=48)
    requests = [behind("ab"[i >= 6], i, 3, 4) for i in range(12)]
    finish_all(world, requests)
    assert written(world) == ["a", "b"]


def test_requests_of_cartridges_that_do_not_fit_together_are_sorted_by_cartridge() -> None:
    """For a while, those of the one that is there overtake those of the other."""
    requests = [behind("ab"[i % 2], i, 3, 4) for i in range(12)]
    for wait_s, num_writes in ((1.0, 2), (0.0, 12)):
        with named(wait_s):
            world = world_with(
                dict.fromkeys("ab", 24), num_pages=12, max_request_tokens=48, share_wait_s=wait_s
            )
            finish_all(world, requests)
            assert len(world.writes) == num_writes


def test_sequences_overtake_one_that_waits_for_room_for_its_cartridge_until_it_has_waited() -> None:
    world = world_with(
        dict.fromkeys("ab", 24), num_pages=12, max_request_tokens=48, share_wait_s=0.02
    )
    world.finish(behind("a", 0, 3, 4))
    world.turn(behind("a", 1, 3, 8))
    world.turn(behind("b", 100, 3, 8))
    request_id = 200
    while not world.answers[100, 0].reason:
        arrivals: list[FromServer] = []
        if len(world.living) < 4:
            arrivals = [behind("a", request_id, 3, 8)]
            request_id += 1
        world.turn(*arrivals, num_results=1)
        assert request_id < 260, "it starves"
    assert request_id > 204  # these came later, and came first
    assert written(world)[:2] == ["a", "b"]
    world.drain()


@pytest.mark.parametrize("kind", ["abort", "drain", "pause"])
def test_a_request_that_has_stepped_aside_can_be_ended_and_held_back(kind: str) -> None:
    world = world_with(dict.fromkeys("ab", 24), num_pages=12, max_request_tokens=48)
    world.turn(behind("a", 1, 3, 12))
    world.turn(num_results=1)
    world.turn(behind("b", 2, 3, 8), num_results=1)
    assert world.manager._running.claims.aside()
    if kind == "abort":
        world.turn(AbortRequest(2))
        assert world.answers[2, 0].reason is FinishReason.ABORT
    else:
        mode = PauseMode.DRAIN if kind == "drain" else PauseMode.KEEP
        command = world.command(Pause(mode))
        while command not in world.command_answers:
            world.turn(num_results=1)
        assert not world.answers[2, 0].reason
        world.command(Resume())
    assert kind == "pause" or not world.manager._running.claims.aside()
    world.drain()


def test_a_more_important_request_takes_the_pages_that_a_claim_keeps() -> None:
    world = world_with(dict.fromkeys("ab", 24), num_pages=12, max_request_tokens=48)
    world.turn(behind("a", 1, 3, 8))
    assert len(world.manager._running.claims.sequences()) == 1
    world.turn(behind("b", 2, 3, 8, priority=-1))
    assert written(world) == ["a", "b"]
    finished: list[int] = []
    while len(finished) < 2:
        world.turn(num_results=1)
        finished += [i for i in (1, 2) if world.answers[i, 0].reason and i not in finished]
    assert finished == [2, 1]
    world.drain()


def test_running_sequences_take_the_pages_of_a_claim_that_comes_after_them() -> None:
    generous = make_admission(target_utilization=1000.0)
    world = world_with({"a": 24}, num_pages=12, max_request_tokens=48, admission=generous)
    world.turn(make_request(1, prompt(17), 28))  # it grows to 11 pages
    world.turn(behind("a", 2, 3, 8), num_results=1)
    assert written(world) == ["a"]
    while not world.answers[1, 0].reason:
        world.turn(num_results=1)
    assert world.manager.counters.num_preemptions == 0
    world.drain()
    assert written(world) == ["a", "a"]


def test_an_important_request_finds_the_pages_of_its_cartridge() -> None:
    world = world_with({"a": 24}, num_pages=12, max_request_tokens=48)
    world.turn(*[make_request(i, prompt(8, i), 8) for i in range(3)])
    world.turn(num_results=1)
    assert world.manager._running.num_running == 3
    world.turn(behind("a", 3, 3, 8, priority=-1), num_results=1)
    assert written(world) == ["a"]
    world.drain()


def test_a_cartridge_is_not_written_before_the_forecast_has_room_for_it() -> None:
    careful = make_admission(predict_lengths=False)
    world = world_with({"a": 40}, num_pages=24, max_request_tokens=64, admission=careful)
    world.turn(make_request(1, prompt(17), 32))  # up to 12 pages
    world.turn(behind("a", 2, 3, 20), num_results=1)  # 10 pages, and up to 6 of its own
    assert not world.writes
    while not world.answers[1, 0].reason:
        world.turn(num_results=1)
    world.drain()
    assert written(world) == ["a"]


def test_a_prompt_that_is_cached_whole_starts_where_no_page_is_left_for_its_copy() -> None:
    world = world_with({"a": 10}, num_pages=4)
    world.finish(behind("a", 1, 2, 1))
    world.finish(make_request(2, prompt(2, 1), 1, cartridge="a"))
    assert written(world) == ["a"]


def test_a_claim_is_not_dropped_from_under_a_sequence_that_is_about_to_start() -> None:
    world = world_with({"a": 24}, num_pages=12, max_request_tokens=48)
    world.turn(behind("a", 1, 3, 8, priority=1))
    # The first of these starts with the pages that the claim keeps. The second has no room beside.
    world.turn(behind("a", 2, 3, 8), make_request(3, prompt(24, 3), 4), num_results=1)
    assert world.manager._running.num_running == 1
    world.drain()


def test_a_plan_ends_where_sequences_take_each_others_claims() -> None:
    """The first has room only without the claim of the second, and the forecast refuses it."""
    careful = make_admission(predict_lengths=False)
    world = world_with({"a": 32, "b": 16}, num_pages=20, max_request_tokens=64, admission=careful)
    world.turn(make_request(1, prompt(8), 28))  # up to 9 pages
    world.turn(num_results=1)
    world.turn(behind("a", 2, 3, 20), behind("b", 3, 3, 4), num_results=1)
    world.turn(num_results=1)
    assert written(world) == ["b"]
    world.drain()
    assert written(world) == ["b", "a"]


def test_one_refusal_counts_for_all_that_want_the_same_cartridge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_asked, ask = 0, AdmissionControl.num_admissible

    def counted(self: AdmissionControl, candidates: list[Candidate]) -> int:
        nonlocal num_asked
        num_asked += 1
        return ask(self, candidates)

    careful = make_admission(predict_lengths=False)
    world = world_with({"a": 40}, num_pages=24, max_request_tokens=64, admission=careful)
    world.turn(make_request(1, prompt(17), 32))  # up to 12 pages
    monkeypatch.setattr(AdmissionControl, "num_admissible", counted)
    requests = [behind("a", i, 3, 20) for i in range(2, 42)]  # 10 pages, and up to 6 of their own
    world.turn(*requests, num_results=3)
    assert len(world.manager._running.claims.aside()) == 40
    assert num_asked == 1
    world.drain()


def test_a_sequence_for_which_others_were_preempted_does_not_step_aside() -> None:
    """Others of its cartridge have: there was no room for them, who outrank none."""
    careful = make_admission(predict_lengths=False)
    world = world_with({"a": 40}, num_pages=24, max_request_tokens=64, admission=careful)
    world.turn(make_request(1, prompt(17), 32))  # up to 12 pages
    world.turn(behind("a", 2, 3, 20), num_results=1)  # 10 pages, and up to 6 of its own
    assert world.manager._running.claims.aside()
    assert not world.writes
    world.turn(behind("a", 3, 3, 20, priority=-1), num_results=1)
    assert written(world) == ["a"]
    world.drain()


def test_a_dropped_claim_is_no_reason_to_ask_again_for_those_that_stepped_aside() -> None:
    world = world_with(dict.fromkeys("abc", 24), num_pages=12, max_request_tokens=48)
    world.turn(behind("a", 1, 3, 8, priority=1))
    world.turn(behind("b", 2, 3, 8, priority=2))
    claims = world.manager._running.claims
    (sequence,) = claims.aside()
    world.turn(behind("c", 3, 3, 8))  # it drops the claim on "a"
    assert claims.sequences() != [sequence]
    assert written(world) == ["a", "c"]
    assert sequence in claims.aside()
    assert not claims.recall_is_due(world.manager.counters.device_s)
    world.drain()


# --- groups ---------------------------------------------------------------------------------------


def test_sequences_behind_a_cartridge_form_a_prefix_group_over_its_pages() -> None:
    world = world_with({"a": 18}, num_pages=64, max_tokens_per_forward=64)
    world.turn(*[behind("a", i, 2, 6) for i in range(1, 7)])
    world.turn(num_results=1)
    world.turn(num_results=1)
    (prefill, *decodes) = world.batches
    assert prefill.group_first_chunks is not None
    assert prefill.group_num_chunks is not None
    assert prefill.group_num_chunks.tolist() == [6]
    assert prefill.group_num_columns.tolist() == [4]  # the full pages of 18 tokens
    batch: ForwardBatch = decodes[-1]
    assert batch.group_num_decodes.tolist() == [6]
    assert batch.group_num_columns.tolist() == [4]
    world.drain()


# --- statistics -----------------------------------------------------------------------------------


def state_of(world: World, name: str) -> CartridgeState:
    (state,) = [each for each in world.manager.statistics().cartridges if each.name == name]
    return state


def test_statistics_tell_what_becomes_of_each_cartridge() -> None:
    world = world_with({"a": 10, "b": 3}, num_pages=10)
    assert state_of(world, "a") == CartridgeState("a", 10, 0, 0, 0, 0, 0, 0, 0, 0.001)
    world.turn(behind("a", 1, 3, 5), behind("a", 2, 3, 5))
    assert state_of(world, "a") == CartridgeState("a", 10, 0, 3, 2, 2, 0, 1, 0, 0.0)
    world.drain()
    ended_at = world.now
    state = state_of(world, "a")
    assert state == CartridgeState("a", 10, 1, 3, 0, 2, 0, 1, 0, state.idle_s)
    world.now += 5
    world.turn(behind("a", 3, 3, 5), behind("b", 4, 3, 5))
    assert state_of(world, "a").num_hits == 1
    world.drain()
    world.finish(make_request(5, prompt(33), 4))
    statistics = world.manager.statistics()
    assert state_of(world, "a") == CartridgeState(
        "a", 10, 0, 0, 0, 3, 1, 1, 1, state_of(world, "a").idle_s
    )
    assert 0 < state_of(world, "a").idle_s < world.now - ended_at
    totals = (
        statistics.num_cartridge_requests,
        statistics.num_cartridge_hits,
        statistics.num_cartridge_loads,
        statistics.num_cartridge_evictions,
    )
    assert totals == (4, 1, 2, 1)
    world.unload("a")
    statistics = world.manager.statistics()
    assert [each.name for each in statistics.cartridges] == ["b"]
    assert statistics.num_cartridge_requests == 4
    actions = world.manager.take_turn([Ping()], world.now)
    assert isinstance(actions.messages[0], Statistics)


def test_pages_of_idle_cartridges_count_as_unused() -> None:
    world = world_with({"a": 10}, num_pages=16)
    world.turn(behind("a", 1, 3, 5))
    gauges = world.manager.gauges()
    assert gauges.num_cartridge_pages == 3
    assert gauges.num_free_pages + gauges.num_evictable_pages == 13
    world.drain()
    gauges = world.manager.gauges()
    assert gauges.num_cartridge_pages == 3
    assert gauges.num_free_pages + gauges.num_evictable_pages == 16
