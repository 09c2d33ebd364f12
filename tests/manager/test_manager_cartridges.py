"""Cartridges: requests behind them, what these share, and the commands about them."""

from __future__ import annotations

from fake_device import GOOD_FILES
from rows import named
from simulation import World, make_admission, make_config, make_request, prompt

from tokasaurus.manager.forecast.learning import LengthLearning
from tokasaurus.manager.forecast.rows import running_forest, running_rows
from tokasaurus.manager.forecast.use_curve import UseCurve
from tokasaurus.protocol.commands import (
    Action,
    CommandDone,
    CommandFailed,
    FlushCache,
    LoadCartridge,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    UnloadCartridge,
    UpdateWeights,
    WriteCartridge,
)
from tokasaurus.protocol.messages import (
    AbortRequest,
    Adjustments,
    FinishReason,
    Pooling,
    Sampling,
)
from tokasaurus.rounding import ceil_div

PAGE_SIZE = 4
SIZES = range(1, 2 * PAGE_SIZE + 2)


def world_with(num_tokens: int, **changes: object) -> World:
    """A world with a cartridge "a" of this size."""
    world = World(make_config(**changes))
    world.load("a", num_tokens)
    return world


def behind(request_id: int, ids: list[int], max_tokens: int, **changes: object):
    """A request behind the cartridge "a"."""
    return make_request(request_id, ids, max_tokens, cartridge="a", **changes)


def refusal_of(world: World, action: Action) -> tuple[str | None, str]:
    """Why a command fails at once."""
    answer = world.command_answers[world.command(action)]
    assert isinstance(answer, CommandFailed)
    return answer.field, answer.reason


def run_control(world: World, action: Action) -> CommandDone | CommandFailed:
    """Runs a command that goes to the worker, behind the batches in flight."""
    command_id = world.command(action)
    while command_id not in world.command_answers:
        world.turn(num_results=1)
    return world.command_answers[command_id]


# --- requests ------------------------------------------------------------------------------------


def test_a_prompt_begins_at_the_position_behind_its_cartridge() -> None:
    for num_tokens in SIZES:
        for length in (1, 3, 4, 9):
            with named((num_tokens, length)):
                world = world_with(num_tokens)
                world.finish(behind(1, prompt(length), 5))
                first = world.batches[0]
                assert first.prefill_starts.tolist() == [num_tokens]
                assert first.prefill_ids.tolist() == prompt(length)
                assert world.device.num_early_copies == (num_tokens % PAGE_SIZE > 0)
                assert world.answers[1, 0].num_cached_tokens == 0


def test_no_pseudo_id_leaves_the_manager() -> None:
    """Not in prompts, and not among the ids that adjustments and grammars read."""
    penalty = Sampling(adjustments=Adjustments(repetition_penalty=1.5))
    world = world_with(6, num_pages=12, scheduling_steps_ahead=1, force_preemption=True)
    requests = [behind(i, prompt(5, i), 12, sampling=penalty, grammar="99") for i in range(4)]
    world.turn(*requests)
    world.drain()
    assert world.manager.counters.num_preemptions > 0
    num_resumed = 0
    for batch in world.batches:
        assert (batch.prefill_ids >= 0).all()
        if batch.parameters is None:
            continue
        for group in batch.parameters.adjusted:
            (slot,) = group.slots.tolist()
            row = batch.parameters.slots.tolist().index(slot)
            request = world.request_ids[int(batch.parameters.seed[row])]
            count = int(batch.parameters.num_generated[row])
            generated = world.answers[request, 0].ids[:count]
            assert group.ids.tolist() == prompt(5, request) + generated
            num_resumed += count > 0
        for grammar in batch.parameters.grammars:
            assert (grammar.generated_ids >= 0).all()
    assert num_resumed > 0


def test_text_behind_a_cartridge_is_found_behind_that_cartridge_only() -> None:
    for num_tokens in SIZES:
        with named(num_tokens):
            world = world_with(num_tokens)
            world.load("b", num_tokens)
            text = prompt(11)
            world.finish(behind(1, text, 3))
            world.finish(make_request(2, text, 3))
            world.finish(make_request(3, text, 3, cartridge="b"))
            assert [world.answers[i, 0].num_cached_tokens for i in (1, 2, 3)] == [0, 0, 0]
            world.finish(behind(4, text, 3))
            full_pages = (num_tokens + len(text) - 1) // PAGE_SIZE
            found = full_pages * PAGE_SIZE - num_tokens
            assert found > 0
            assert world.answers[4, 0].num_cached_tokens == found
            # Of a last page that is cached and full, all but the last token is copied.
            ends_with_page = (num_tokens + len(text)) % PAGE_SIZE == 0
            reused = len(text) - 1 if ends_with_page else found
            assert world.device.num_prompt_tokens == 4 * len(text) - reused
            statistics = world.manager.statistics()
            assert statistics.num_cached_tokens == reused
            assert statistics.num_prefill_tokens == 4 * len(text) - reused


def test_two_requests_with_one_cartridge_compute_their_common_text_once() -> None:
    world = world_with(6, max_tokens_per_forward=16, scheduling_steps_ahead=2)
    world.turn(behind(1, prompt(14), 3), behind(2, prompt(14), 3))
    world.turn(num_results=1)  # the cartridge is written
    assert world.batches[0].prefill_slots.size == 1
    assert world.batches[1].prefill_starts.tolist() == [19]
    world.drain()
    assert world.answers[2, 0].num_cached_tokens == 10


def test_samples_fork_behind_a_cartridge() -> None:
    for num_tokens in SIZES:
        for length in (1, 2, 5):
            with named((num_tokens, length)):
                world = world_with(num_tokens)
                world.turn(behind(1, prompt(length), 6, n=4))
                world.turn(num_results=1)  # the cartridge is written
                assert world.batches[0].draw_slots.size == 4
                world.drain()
                assert world.device.num_prompt_tokens == length


def test_a_prompt_behind_a_cartridge_is_fed_in_chunks() -> None:
    world = world_with(7, max_tokens_per_forward=5)
    world.finish(behind(1, prompt(19), 3))
    starts = [start for batch in world.batches for start in batch.prefill_starts.tolist()]
    assert starts == [7, 12, 17, 22]


def test_prompt_logprobs_cover_all_tokens_of_the_prompt_but_its_first() -> None:
    for num_tokens in SIZES:
        with named(num_tokens):
            world = world_with(num_tokens, max_tokens_per_forward=5)
            world.finish(behind(1, prompt(9), 3))
            world.finish(behind(2, prompt(9), 3, num_prompt_logprobs=2))
            assert sorted(world.prompt_logprobs[2]) == list(range(1, 9))
            assert world.device.num_prompt_tokens == 18
            assert world.answers[2, 0].num_cached_tokens == 0


def test_the_state_of_the_last_token_is_pooled_and_the_mean_is_refused() -> None:
    world = world_with(6)
    world.finish(behind(1, prompt(9), 1, pooling=Pooling.LAST))
    assert 1 in world.pooled
    world.turn(behind(2, prompt(9), 1, pooling=Pooling.MEAN))
    assert world.rejected[2].field == "cartridges"


def test_a_request_for_a_cartridge_that_is_not_loaded_is_refused() -> None:
    world = World(make_config())
    load = world.make_command(LoadCartridge("a", ("a",), 5))
    world.turn(behind(1, prompt(3), 3), load)
    assert world.rejected[1].reason == "no cartridge 'a' is loaded"
    assert world.rejected[1].field == "cartridges"
    world.finish(behind(2, prompt(3), 3))
    assert world.answers[2, 0].reason is FinishReason.LENGTH


def test_the_tokens_of_a_cartridge_count_for_the_limits_of_a_request() -> None:
    world = world_with(10, max_request_tokens=24)
    world.turn(behind(1, prompt(10), 5), behind(2, prompt(10), 4), make_request(3, prompt(20), 4))
    assert list(world.rejected) == [1]
    assert world.rejected[1].field == "max_tokens"
    assert "a cartridge of 10 tokens, 10 prompt tokens" in world.rejected[1].reason
    world.drain()


def test_a_request_that_never_fits_with_its_cartridge_is_refused() -> None:
    world = world_with(6, num_pages=6)
    world.load("b", 8)
    world.turn(behind(1, prompt(10), 6))  # 21 positions, 6 pages, and one of which a copy is made
    assert world.rejected[1].field == "max_tokens"
    assert "a cartridge of 6 tokens, 10 prompt tokens" in world.rejected[1].reason
    world.turn(make_request(2, prompt(10), 8, cartridge="b"))  # 25 positions
    assert 2 in world.rejected
    # Whatever has loaded cartridges, and whatever they hold.
    world.finish(behind(3, prompt(10), 5))
    world.finish(make_request(4, prompt(10), 7, cartridge="b"))
    world.finish(make_request(5, prompt(10), 15))
    assert all(world.answers[i, 0].reason is FinishReason.LENGTH for i in (3, 4, 5))


# --- pages ---------------------------------------------------------------------------------------


def test_a_flush_drops_the_text_behind_a_cartridge_and_keeps_the_cartridge() -> None:
    world = world_with(10)
    world.finish(behind(1, prompt(9), 3))
    flushed = world.command_answers[world.command(FlushCache())]
    assert isinstance(flushed, CommandDone)
    assert flushed.num_pages == 3  # 21 positions were written; two pages are the cartridge's
    world.finish(behind(2, prompt(9), 3))
    assert world.answers[2, 0].num_cached_tokens == 0
    assert world.counts["writes"] == 1


def test_a_forecast_counts_no_pinned_page() -> None:
    world = World(
        make_config(
            num_pages=64,
            max_tokens_per_forward=8,
            scheduling_steps_ahead=1,
            admission=make_admission(predict_lengths=False),
        )
    )
    world.load("a", 18)
    world.load("b", 9)
    world.finish(behind(0, prompt(12), 4))
    world.finish(make_request(5, prompt(12), 4, cartridge="b"))
    requests = [behind(i, prompt(12) + prompt(9, i), 6) for i in (1, 2)]
    requests += [make_request(3, prompt(9), 5, cartridge="b"), make_request(4, prompt(6), 9)]
    world.turn(*requests)
    running = world.manager._running
    learning = LengthLearning(world.config, running)
    most_rows, limits = 0, []
    for _ in range(30):
        slots, rows = running_rows(running, learning)
        most_rows = max(most_rows, len(slots))
        forest = running_forest(running)
        forecast = UseCurve(page_size=4, prefill_rate=8).forecast(running=rows, forest=forest)
        assert forecast.use()[:1].sum() == running.pages.num_held
        world.manager.eta()
        world.turn(num_results=1)
        limits.append(world.manager._admission.limit)
    assert most_rows == 4
    assert min(limits) == 64 - 5 - 3
    world.drain()
    assert running.pages.num_held == 0
    assert world.manager._admission.limit == 64


# --- commands ------------------------------------------------------------------------------------


def test_a_load_is_answered_at_once_and_writes_nothing() -> None:
    world = World(make_config())
    for action in (Pause(PauseMode.KEEP), ReleaseMemory(weights=True, kv_cache=True)):
        world.command(action)
    done = world.load("a", 9)
    assert isinstance(done, CommandDone)
    assert not world.writes
    assert world.manager._running.pages.num_available == world.config.num_pages
    assert isinstance(world.unload("a"), CommandDone)


def test_loads_that_cannot_be_are_refused() -> None:
    world = world_with(9, num_pages=12)
    for action, field, reason in (
        (LoadCartridge("a", ("other",), 1), "name", "cartridge 'a' is loaded already"),
        (LoadCartridge("", ("other",), 1), "name", "is empty"),
        (LoadCartridge("b", (), 1), "paths", "at least one file"),
        (LoadCartridge("b", ("b",), 0), "num_tokens", "it must be at least 1"),
        (LoadCartridge("b", ("b",), 49), "num_tokens", "takes 13 pages, and the KV cache has 12"),
    ):
        with named(action):
            found_field, found_reason = refusal_of(world, action)
            assert found_field == field
            assert reason in found_reason


def test_an_unload_fails_while_a_request_names_the_cartridge() -> None:
    world = world_with(6)
    world.turn(behind(1, prompt(5), 6))
    reason = "a request that has not ended names cartridge 'a'"
    assert refusal_of(world, UnloadCartridge("a")) == ("name", reason)
    assert refusal_of(world, UnloadCartridge("b")) == ("name", "no cartridge 'b' is loaded")
    # In one turn with the end of the last request.
    unload = world.make_command(UnloadCartridge("a"))
    world.turn(AbortRequest(1), unload)
    assert isinstance(world.command_answers[unload.command_id], CommandDone)
    world.turn(behind(2, prompt(5), 6))
    assert world.rejected[2].reason == "no cartridge 'a' is loaded"
    world.drain()
    assert world.manager._running.pages.num_pinned == 0


def test_an_unload_drops_the_text_behind_the_cartridge_and_no_other() -> None:
    for num_tokens in SIZES:
        with named(num_tokens):
            world = world_with(num_tokens)
            world.load("b", num_tokens)
            world.finish(make_request(1, prompt(10), 3))
            world.finish(make_request(2, prompt(10), 3, cartridge="b"))
            num_before = world.manager._running.pages.pool.num_free
            world.finish(behind(3, prompt(10), 3))
            world.finish(behind(4, prompt(6) + prompt(5, 1), 3))  # two leaves
            done = world.unload("a")
            assert isinstance(done, CommandDone)
            num_own = ceil_div(num_tokens, PAGE_SIZE)
            assert world.manager._running.pages.pool.num_free == num_before
            assert done.num_tokens == num_tokens + (done.num_pages - num_own) * PAGE_SIZE
            world.finish(make_request(5, prompt(10), 3))
            world.finish(make_request(6, prompt(10), 3, cartridge="b"))
            assert world.answers[5, 0].num_cached_tokens == 8
            assert world.answers[6, 0].num_cached_tokens > 0


def test_another_version_of_a_cartridge_shares_nothing_with_the_one_before() -> None:
    world = world_with(6)
    world.finish(behind(1, prompt(9), 3))
    world.unload("a")
    world.load("a", 6, path="a, retrained")
    world.finish(behind(2, prompt(9), 3))
    assert world.answers[2, 0].num_cached_tokens == 0
    assert world.answers[1, 0].ids != world.answers[2, 0].ids


def test_a_pseudo_id_is_never_used_again() -> None:
    world = World(make_config())
    cartridges = world.manager._running.cartridges
    seen: set[int] = set()
    for version, num_tokens in enumerate((3, 9, 1, 4)):
        world.load("a", num_tokens, path=f"version {version}")
        ids = cartridges.find("a").ids.tolist()
        assert len(ids) == num_tokens
        assert max(ids) < 0
        assert not seen & set(ids)
        seen |= set(ids)
        world.unload("a")
    cartridges._next_id = -(2**31) + 1
    assert refusal_of(world, LoadCartridge("a", ("a",), 3))[0] == "num_tokens"
    world.load("a", 2)
    world.finish(behind(1, prompt(5), 3))
    assert cartridges.find("a").ids.tolist() == [-(2**31) + 1, -(2**31)]


# --- weights and memory --------------------------------------------------------------------------


def test_a_cartridge_outlives_an_update_of_the_weights_and_the_text_behind_it_does_not() -> None:
    for num_tokens in SIZES:
        with named(num_tokens):
            world = world_with(num_tokens)
            world.finish(behind(1, prompt(10), 3))
            num_writes = len(world.controls)
            world.turn(behind(2, prompt(6, 2), 12))
            assert isinstance(run_control(world, UpdateWeights(1, GOOD_FILES)), CommandDone)
            world.drain()
            assert len(world.controls) == num_writes + 1  # it is not written again
            world.finish(behind(3, prompt(10), 3))
            world.finish(behind(4, prompt(10), 3))
            assert world.answers[3, 0].num_cached_tokens == 0
            assert world.answers[4, 0].num_cached_tokens > 0
            assert isinstance(world.unload("a"), CommandDone)
            assert world.manager._running.pages.num_available >= world.config.num_pages


def test_cartridges_are_written_again_when_requests_need_them_after_a_restore() -> None:
    world = world_with(6)
    world.load("b", 9)
    world.finish(make_request(1, prompt(6), 3, cartridge="b"))
    world.turn(behind(2, prompt(6), 12))
    world.turn(num_results=1)
    done = run_control(world, ReleaseMemory(weights=False, kv_cache=True))
    assert isinstance(done, CommandDone)
    assert done.num_pages >= 2 + 3  # the cartridges, and text
    assert world.manager._running.pages.pool.num_free == world.config.num_pages
    num_writes = len(world.writes)
    restored = run_control(world, RestoreMemory(weights=False, kv_cache=True))
    assert isinstance(restored, CommandDone)
    world.drain()
    (write,) = list(world.writes.values())[num_writes:]
    assert write.paths == ("a",)
    world.finish(make_request(3, prompt(6), 12, cartridge="b"))
    assert len(world.writes) == num_writes + 2


def test_a_cartridge_that_cannot_be_written_again_ends_the_requests_that_name_it() -> None:
    world = world_with(6)
    world.turn(behind(1, prompt(6), 12, stream=True, n=2), make_request(2, prompt(6), 12))
    for _ in range(6):
        world.turn(num_results=1)
    assert world.answers[1, 0].ids  # it has begun
    run_control(world, ReleaseMemory(weights=False, kv_cache=True))
    world.device.keeps_files = False
    done = run_control(world, RestoreMemory(weights=False, kv_cache=True))
    assert isinstance(done, CommandDone)
    world.drain()
    assert world.rejected[1].reason == "cartridge 'a': a does not exist"
    assert world.answers[2, 0].reason is FinishReason.LENGTH
    world.device.keeps_files = True
    world.finish(behind(3, prompt(6), 3))
    assert world.answers[3, 0].reason is FinishReason.LENGTH


def test_a_restore_of_the_weights_alone_writes_no_cartridge() -> None:
    world = world_with(6)
    world.finish(behind(1, prompt(6), 3))
    run_control(world, ReleaseMemory(weights=True, kv_cache=False))
    run_control(world, RestoreMemory(weights=True, kv_cache=False))
    world.finish(behind(2, prompt(6), 3))
    assert [type(control.action) for control in world.controls] == [
        WriteCartridge,
        ReleaseMemory,
        RestoreMemory,
    ]
