"""Commands of the text core on the fake engine: aborts, pauses, versions of the weights."""

from __future__ import annotations

import random
from functools import partial

import pytest
from fake_engine import CONFIG, PREPARER, TOKENIZER, FakeEngine, ids_of, submit, updates
from rows import check_each, each_row

from tokasaurus.errors import Conflict, EngineAborted, EngineDead, RequestError
from tokasaurus.launch.outputs import GrowingOutput, request_output
from tokasaurus.protocol.commands import (
    AbortAll,
    CommandDone,
    CommandFailed,
    FlushCache,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    UpdateWeights,
)
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FinishReason,
    Pooling,
    StopSequence,
)
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams

PROMPT = [10, 11, 12]
RUNNING, STOP, LENGTH, ABORT = (
    FinishReason.RUNNING,
    FinishReason.STOP,
    FinishReason.LENGTH,
    FinishReason.ABORT,
)


class Post:
    """A text core whose messages are kept, and answered by the test."""

    def __init__(self):
        self.sent = []
        self.core = Generations(CONFIG, TOKENIZER, self.sent.append)
        self.done = []

    def command(self, action):
        self.core.command(action, self.done.append)
        return self.sent[-1].command_id


def take_some(core, fake, turns=6):
    for _ in range(turns):
        for message in fake.step():
            core.absorb(message)


# --- aborting everything -------------------------------------------------------------------------


@each_row("action", [AbortAll(), Pause(PauseMode.ABORT)])
@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_ends_running_and_held_requests_with_the_tokens_that_they_have(action, stream):
    fake = FakeEngine()
    core = Generations(CONFIG, TOKENIZER, fake.send)
    limit = 4 * CONFIG.max_seqs_per_forward
    params = SamplingParams(n=8, max_tokens=400, ignore_eos=True)
    generations = [submit(core, PROMPT, params, stream=stream) for _ in range(limit // 8 + 5)]
    assert core.num_held == 40
    take_some(core, fake)
    done = []
    core.command(action, done.append)
    assert core.num_held == 0
    assert all(generation.finished for generation in generations[-5:])
    fake._is_held = False
    fake.run(core)
    assert done[0].num_sequences == limit + 40
    assert len(core) == 0
    assert not core._turnstile.num_open
    assert not core._num_of_client
    num_tokens = []
    for number, generation in enumerate(generations):
        outputs = generation.take_news() if stream else generation.take_all()
        assert [each.finish_reason for each in outputs] == ["abort"] * 8
        num_tokens.append(sum(len(each.token_ids) for each in outputs))
        assert num_tokens[-1] == generation.num_generated_tokens
        assert (num_tokens[-1] == 0) == (number >= limit // 8)
    assert not any(isinstance(each, AbortRequest) for each in fake.received)


@each_row("action", [Pause(PauseMode.KEEP), Pause(PauseMode.DRAIN), FlushCache(), Resume()])
def test_other_commands_end_no_request(action):
    post = Post()
    params = SamplingParams(n=4 * CONFIG.max_seqs_per_forward, max_tokens=5)
    held = [submit(post.core, PROMPT, params) for _ in range(3)]
    post.command(action)
    assert post.core.num_held == 2 * params.n
    assert not any(generation.finished for generation in held)


def test_a_request_after_an_abort_runs(core, fake):
    submit(core, PROMPT, SamplingParams(max_tokens=9))
    core.command(AbortAll(), lambda result: None)
    generation = submit(core, PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))
    fake.run(core)
    assert generation.take_all()[0].finish_reason == "length"


def test_one_request_is_cut_short_by_name_wherever_it_is(core, fake):
    params = SamplingParams(n=4 * CONFIG.max_seqs_per_forward, max_tokens=50, ignore_eos=True)
    first = submit(core, PROMPT, params, names=("a", "b"))
    second = submit(core, PROMPT, params, names=("c",))
    third = submit(core, PROMPT, SamplingParams(max_tokens=5, ignore_eos=True), names=("b",))
    assert (core.named("a"), core.named("b"), core.named("x")) == ([first], [first, third], [])
    take_some(core, fake, 4)
    core.cut_short(second)  # held: the manager never hears of it
    assert second.finished
    assert {each.finish_reason for each in second.take_all()} == {"abort"}
    assert not fake.aborted
    core.cut_short(first)
    core.cut_short(second)
    fake.run(core)
    core.cut_short(first)
    assert fake.aborted == {first.request_id}
    assert {each.finish_reason for each in first.take_all()} == {"abort"}
    assert first.num_generated_tokens > 0
    assert third.take_all()[0].finish_reason == "length"


def test_with_first_k_an_abort_answers_with_all_samples():
    post = Post()
    generation = submit(post.core, PROMPT, SamplingParams(n=3, first_k=2, max_tokens=50))
    request = post.sent[0]
    rows = [(request, 1, ids_of("ab"), LENGTH, 0), (request, 0, ids_of("c"), ABORT, 0)]
    post.core.absorb(updates(rows))
    assert not generation.finished
    post.core.absorb(updates([(request, 2, [], ABORT, 0)]))
    outputs = generation.take_all()
    assert [each.finish_reason for each in outputs] == ["abort", "length", "abort"]
    assert [each.text for each in outputs] == ["c", "ab", ""]
    assert not generation.left_out


def test_the_abort_of_the_rest_may_come_before_the_last_end_that_counts():
    post = Post()
    generation = submit(post.core, PROMPT, SamplingParams(n=3, first_k=1, max_tokens=50))
    request = post.sent[0]
    rows = [(request, index, [], ABORT, 0) for index in (0, 1)]
    post.core.absorb(updates([*rows, (request, 2, ids_of("x"), LENGTH, 0)]))
    assert not generation.was_aborted
    assert [each.index for each in generation.take_all()] == [2]
    assert [each.index for each in generation.left_out] == [0, 1]


def test_an_abort_before_the_prompt_is_computed_is_an_error():
    for pooling in (Pooling.MEAN, Pooling.NONE):
        post, changes = Post(), []
        if pooling:
            prepared = PREPARER.prepare_pooling(PROMPT, pooling)
        else:
            prepared = PREPARER.prepare(PROMPT, SamplingParams(prompt_logprobs=1))
        generation = post.core.start(prepared, on_change=partial(changes.append, 1))
        post.core.absorb(updates([(post.sent[0], 0, [], ABORT, 0)]))
        assert isinstance(generation.error, EngineAborted)
        assert changes
        assert len(post.core) == 0


def test_the_watcher_counts_aborted_prompts():
    class Watcher:
        def __init__(self):
            self.outcomes = []

        def started(self, generation):
            pass

        began = predicted = started

        def ended(self, generation, outcome):
            self.outcomes.append(outcome)

    fake, watcher = FakeEngine(), Watcher()
    core = Generations(CONFIG, TOKENIZER, fake.send, watcher)
    submit(core, PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
    core.command(AbortAll(), lambda result: None)
    submit(core, PROMPT, SamplingParams(max_tokens=3))
    fake.run(core)
    assert sorted(watcher.outcomes) == ["aborted", "finished"]


# --- the table of commands -----------------------------------------------------------------------


def test_each_command_gets_its_own_answer():
    post = Post()
    first, second, third = (
        post.command(FlushCache()),
        post.command(Resume()),
        post.command(Resume()),
    )
    assert len({first, second, third}) == 3
    post.core.absorb(CommandFailed(second, "the weights are missing"))
    post.core.absorb(CommandDone(first, 5))
    post.core.absorb(CommandFailed(third, "no such file", "files"))
    refused, flushed, wrong = post.done
    assert isinstance(refused, Conflict)
    assert flushed.num_pages == 5
    assert type(wrong) is RequestError
    assert wrong.field == "files"


def test_a_refused_update_is_about_its_files_unless_the_weights_are_released():
    post = Post()
    for released in (False, True):
        if released:
            post.core.absorb(CommandDone(post.command(ReleaseMemory(weights=True, kv_cache=False))))
        post.core.update_weights(["/f"], post.done.append)
        post.core.absorb(CommandFailed(post.sent[-1].command_id, "no"))
        assert getattr(post.done[-1], "field", None) == (None if released else "files")
        assert isinstance(post.done[-1], Conflict) == released


def test_a_dead_engine_ends_all_commands():
    post = Post()
    post.command(AbortAll())
    post.command(FlushCache())
    post.core.fail_all(EngineDead("it broke"))
    assert [str(each) for each in post.done] == ["it broke"] * 2
    post.core.fail_all(EngineDead("again"))
    assert len(post.done) == 2


def test_the_core_knows_whether_the_engine_is_paused():
    post = Post()
    commands = post.core.commands
    drain = post.command(Pause(PauseMode.DRAIN))
    assert not commands.is_paused
    resume = post.command(Resume())
    post.core.absorb(CommandDone(resume))
    post.core.absorb(CommandDone(drain))  # late
    assert not commands.is_paused
    post.core.absorb(CommandDone(post.command(Pause(PauseMode.KEEP))))
    assert commands.is_paused
    post.core.absorb(CommandFailed(post.command(Resume()), "no"))
    assert commands.is_paused
    post.core.absorb(CommandDone(post.command(Resume())))
    assert not commands.is_paused


def test_the_core_knows_what_is_released():
    post = Post()
    commands = post.core.commands
    for action, released in (
        (ReleaseMemory(weights=True, kv_cache=True), {"weights", "kv_cache"}),
        (RestoreMemory(weights=True, kv_cache=False), {"kv_cache"}),
        (ReleaseMemory(weights=False, kv_cache=True), {"kv_cache"}),
        (RestoreMemory(weights=True, kv_cache=True), set()),
    ):
        post.core.absorb(CommandDone(post.command(action)))
        assert commands.released == released


def test_the_core_knows_when_nothing_can_run_before_a_further_command():
    post = Post()
    commands = post.core.commands
    restore = RestoreMemory(weights=True, kv_cache=True)
    for action, lacks_weights, holds in (
        (Pause(PauseMode.KEEP), False, True),
        (Resume(), False, False),
        (ReleaseMemory(weights=False, kv_cache=True), False, True),
        (restore, False, False),
        (ReleaseMemory(weights=True, kv_cache=False), False, True),
        (restore, True, True),
        (FlushCache(), False, True),
        (UpdateWeights(1, ("a.safetensors",)), False, False),
    ):
        command_id = post.command(action)
        assert not commands.hold_everything, action  # it may let requests run
        post.core.absorb(CommandDone(command_id, lacks_weights=lacks_weights))
        assert commands.hold_everything == holds, action


# --- versions of the weights ---------------------------------------------------------------------


def test_updates_are_numbered_and_labelled():
    post = Post()
    core, weights = post.core, post.core.commands.weights

    def update(label=None):
        core.update_weights(["/f"], post.done.append, checksums=["ab"], label=label)
        return post.sent[-1]

    assert (weights.version, weights.label(), weights.are_original) == (0, "default", True)
    first, second = update("step-1"), update()
    assert [each.action.version for each in (first, second)] == [1, 2]
    assert first.action.files == ("/f",)
    assert first.action.checksums == ("ab",)
    assert weights.version == 0
    core.absorb(CommandDone(first.command_id, weights_version=1))
    assert (weights.version, weights.label()) == (1, "step-1")
    core.absorb(CommandFailed(second.command_id, "bad", "files"))
    assert (weights.version, weights.label(), weights.are_original) == (1, "step-1", False)
    third = update()
    assert third.action.version == 2  # the failed update did not take the number
    core.absorb(CommandDone(third.command_id, weights_version=2))
    assert [weights.label(version) for version in range(3)] == ["default", "step-1", "2"]
    weights.rename("mine")
    assert (weights.label(), weights.label(1)) == ("mine", "step-1")


def test_a_failed_update_leaves_no_label_behind():
    post = Post()
    post.core.update_weights([], post.done.append, label="wrong")
    post.core.absorb(CommandFailed(post.sent[-1].command_id, "no files", "files"))
    post.core.update_weights([], post.done.append)
    post.core.absorb(CommandDone(post.sent[-1].command_id, weights_version=1))
    assert post.core.commands.weights.label() == "1"


def test_several_rows_of_one_sequence_in_one_message():
    """Each case: stop, rows (text, reason, version); text, reason, runs; stops, acknowledged."""
    cases = [
        (None, [("ab", RUNNING, 0), ("cd", LENGTH, 1)], "abcd", "length", [(0, 2), (1, 2)], 0, []),
        (
            None,
            [("a", RUNNING, 0), ("b", RUNNING, 2), ("c", RUNNING, 2), ("", ABORT, 3)],
            "abc",
            "abort",
            [(0, 1), (2, 2)],
            0,
            [],
        ),
        # The stop string lies across two versions, and the manager has ended the sequence already.
        ("bc", [("ab", RUNNING, 0), ("cd", LENGTH, 1)], "a", "stop", [(0, 2), (1, 1)], 0, [[2]]),
        # It is found in the first row: the tokens of the others are left out.
        ("b", [("abx", RUNNING, 0), ("cd", RUNNING, 1)], "a", "stop", [(0, 2)], 1, []),
        # The manager ignores what it is told of a sequence that has ended.
        ("b", [("abx", RUNNING, 0), ("cd", LENGTH, 1)], "a", "stop", [(0, 2)], 1, []),
        # The sequence goes on: the last acknowledgement is of both rows.
        (
            "no",
            [("ab", RUNNING, 0), ("cd", RUNNING, 1)],
            "abcd",
            None,
            [(0, 2), (1, 2)],
            0,
            [[2, 4]],
        ),
    ]

    def check(case):
        stop, rows, text, reason, runs, num_stops, acknowledged = case
        for streams in (False, True):
            post = Post()
            params = SamplingParams(max_tokens=50, stop=stop, logprobs=1)
            generation = submit(post.core, PROMPT, params, stream=streams)
            request = post.sent[0]
            message = updates([(request, 0, ids_of(t), r, 0, version) for t, r, version in rows])
            post.core.absorb(message)
            told = post.sent[1:]
            assert sum(isinstance(each, StopSequence) for each in told) == num_stops
            counts = [each.num_tokens.tolist() for each in told if isinstance(each, Acknowledge)]
            assert counts == acknowledged
            (output,) = generation.take_news() if streams else generation.take_all()
            assert output.finish_reason == reason
            assert output.text == text
            assert output.weights_versions == runs
            assert sum(count for _, count in runs) == len(output.token_ids)
            assert len(output.logprobs) == len(output.token_ids)
            assert (len(post.core) == 0) == (rows[-1][1] != RUNNING)

    check_each(cases, check)


@each_row("seed", range(12))
def test_versions_belong_to_their_tokens_under_any_updates(seed):
    rng = random.Random(seed)
    fake = FakeEngine(seed)
    core = Generations(CONFIG, TOKENIZER, fake.send)
    fake.script = lambda request, index: rng.choices(ids_of("abcd"), k=60)
    fake.largest_step = rng.choice([1, 4, 9])
    drawn = {}
    rows_of = fake._rows

    def noting(sequence, reason):
        name = sequence.request.request_id, sequence.index
        drawn.setdefault(name, []).extend(version for _, version in sequence.pending)
        return rows_of(sequence, reason)

    fake._rows = noting
    streams = [rng.random() < 0.5 for _ in range(12)]
    generations = [
        submit(
            core,
            PROMPT,
            SamplingParams(n=2, max_tokens=60, stop=rng.choice([None, "abcd"]), ignore_eos=True),
            stream=stream,
        )
        for stream in streams
    ]
    runs = {}

    def note(generation, outputs):
        for output in outputs:
            name = generation.request_id, output.index
            versions = [v for v, count in output.weights_versions for _ in range(count)]
            assert len(versions) == len(output.token_ids)
            runs.setdefault(name, []).extend(versions)

    while fake.num_running:
        for message in fake.step():
            core.absorb(message)
        if rng.random() < 0.1:
            core.update_weights(["/f"], lambda result: None)
        for generation, stream in zip(generations, streams, strict=True):
            if stream:
                note(generation, generation.take_news())
    fake.run(core)
    for generation, stream in zip(generations, streams, strict=True):
        note(generation, generation.take_news() if stream else generation.take_all())
    assert core.commands.weights.version > 0
    for name, versions in runs.items():
        assert versions == drawn[name][: len(versions)]
    assert any(len(set(versions)) > 1 for versions in runs.values())


def test_outputs_of_the_embedded_engine_tell_the_versions(core, fake):
    fake.largest_step = 1
    generation = submit(core, PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))
    while fake._running and next(iter(fake._running.values())).position < 4:
        fake.step()
    core.update_weights(["/f"], lambda result: None)
    fake.run(core)
    (completion,) = request_output(generation, None, TOKENIZER).outputs
    assert completion.weights_versions == [(0, 4), (1, 5)]


def test_a_stream_of_the_embedded_engine_tells_the_versions_and_keeps_what_a_command_aborted():
    post = Post()
    params = SamplingParams(n=2, max_tokens=50, ignore_eos=True)
    generation = submit(post.core, PROMPT, params, stream=True)
    request, growing = post.sent[0], GrowingOutput(generation, None, TOKENIZER)
    for rows in (
        [(request, 0, ids_of("ab"), RUNNING, 0), (request, 1, ids_of("x"), RUNNING, 0)],
        [(request, 0, ids_of("c"), RUNNING, 0, 1), (request, 0, ids_of("d"), ABORT, 0, 1)],
        [(request, 1, [], ABORT, 0, 1)],
    ):
        post.core.absorb(updates(rows))
        assert growing.grow()
        outputs = growing.so_far().outputs
    assert growing.finished
    assert [(each.text, each.finish_reason) for each in outputs] == [
        ("abcd", "abort"),
        ("x", "abort"),
    ]
    assert [each.weights_versions for each in outputs] == [[(0, 2), (1, 2)], [(0, 1)]]
