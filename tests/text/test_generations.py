"""The text core on the fake engine, without HTTP."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import (
    CONFIG,
    EOS_ID,
    PREPARER,
    TOKENIZER,
    FakeEngine,
    ids_of,
    logprob_row,
    random_ids,
    submit,
    updates,
)
from rows import each_row

from tokasaurus.errors import EngineDead, RequestError
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    Eta,
    FinishReason,
    LogprobsMode,
    StopSequence,
)
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Etas, Generations
from tokasaurus.text.params import SamplingParams

PROMPT = [10, 11, 12]


def run(core, fake, params, prompt=PROMPT):
    generation = submit(core, prompt, params)
    fake.run(core)
    assert len(core) == 0
    assert generation.finished
    return generation


def stream(core, fake, params, prompt=PROMPT):
    """Stream a generation; return all outputs of each sample, in order."""
    generation = submit(core, prompt, params, stream=True)
    outputs = [[] for _ in range(params.n)]
    for _ in range(10_000):
        for message in fake.step():
            core.absorb(message)
        for output in generation.take_news():
            outputs[output.index].append(output)
        if generation.finished:
            break
    fake.run(core)
    assert len(core) == 0
    return outputs


def test_the_manager_receives_prompt_and_sampling_parameters(core, fake):
    params = SamplingParams(
        n=3, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=7, max_tokens=9, logprobs=2
    )
    run(core, fake, params)
    (request,) = fake.received
    assert request.prompt_ids.tolist() == PROMPT
    assert (request.n, request.max_tokens, request.seed) == (3, 9, 7)
    assert (request.num_logprobs, request.num_prompt_logprobs) == (2, -1)
    assert request.stop_token_ids == (EOS_ID,)
    assert not request.stream
    assert not request.hold_for_acks
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.min_p, sampling.logprobs_mode) == (0.1, LogprobsMode.TEMPERATURE)


def test_all_samples_come_in_order(core, fake):
    generation = run(core, fake, SamplingParams(n=50, seed=3, max_tokens=7))
    outputs = generation.take_all()
    assert [output.index for output in outputs] == list(range(50))
    for output in outputs:
        assert output.token_ids == random_ids(fake.requests[0], output.index)
        assert output.text == TOKENIZER.decode(output.token_ids)
        assert output.finish_reason == "length"
    assert generation.num_generated_tokens == 350


def test_an_end_of_sequence_token_counts_but_does_not_show(core, fake):
    fake.script = lambda request, index: [*ids_of("hello"), EOS_ID, *ids_of("more") * 50]
    (output,) = run(core, fake, SamplingParams(max_tokens=50)).take_all()
    assert (output.text, output.finish_reason) == ("hello", "stop")
    assert output.token_ids == [*ids_of("hello"), EOS_ID]
    (output,) = run(core, fake, SamplingParams(max_tokens=6, ignore_eos=True)).take_all()
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 6
    assert output.text.startswith("hellom")


@each_row("seed", range(15))
def test_streams_and_wholes_are_the_same(seed):
    """With and without stop strings, whatever the size of updates."""
    rng = random.Random(seed)
    fake = FakeEngine()
    core = Generations(CONFIG, TOKENIZER, fake.send)
    said = [rng.choices(ids_of("ab é😀") + ids_of("hello the"), k=60) for _ in range(3)]
    fake.script = lambda request, index: [*said[index], EOS_ID]
    for stop in (None, ["ba", "é a"], ["😀", "</s>"], ["never"]):
        fake.largest_step = rng.choice([1, 3, 30])
        params = SamplingParams(n=3, max_tokens=rng.randint(1, 80), stop=stop, logprobs=2)
        whole = run(core, fake, params).take_all()
        pieces = stream(core, fake, params)
        for sample, parts in zip(whole, pieces, strict=True):
            assert "".join(part.text for part in parts) == sample.text
            assert [i for part in parts for i in part.token_ids] == sample.token_ids
            assert parts[-1].finish_reason == sample.finish_reason
            assert all(part.finish_reason is None for part in parts[:-1])
            logprobs = np.concatenate([part.logprobs.logprobs for part in parts if part.logprobs])
            assert logprobs.tolist() == sample.logprobs.logprobs.tolist()
            assert not any(string in sample.text for string in stop or [])


def test_logprobs_belong_to_their_tokens(core, fake):
    for number in (0, 1, 5):
        params = SamplingParams(n=2, max_tokens=9, logprobs=number, stop="never")
        for output in run(core, fake, params).take_all():
            for row, token_id in enumerate(output.token_ids):
                chosen, top_ids, top = logprob_row(token_id, number)
                assert output.logprobs.logprobs[row] == np.float32(chosen)
                assert output.logprobs.top_ids[row].tolist() == top_ids
                assert output.logprobs.top_logprobs[row].tolist() == top


def test_prompt_logprobs_belong_to_their_positions(core, fake):
    prompt = list(range(10, 31))
    generation = run(core, fake, SamplingParams(prompt_logprobs=3), prompt)
    logprobs = generation.prompt_logprobs
    assert len(logprobs) == len(prompt) - 1
    for row, token_id in enumerate(prompt[1:]):
        chosen, top_ids, top = logprob_row(token_id, 3)
        assert logprobs.logprobs[row] == np.float32(chosen)
        assert logprobs.top_ids[row].tolist() == top_ids
        assert logprobs.top_logprobs[row].tolist() == top
    assert (
        run(core, fake, SamplingParams(prompt_logprobs=0), [5]).prompt_logprobs.logprobs.size == 0
    )


def test_a_stop_string_stops_the_engine(core, fake):
    fake.script = lambda request, index: ids_of("x") * 5 + ids_of("END") + ids_of("y") * 400
    generation = run(core, fake, SamplingParams(n=4, max_tokens=450, stop="END"))
    for output in generation.take_all():
        assert (output.text, output.finish_reason) == ("xxxxx", "stop")
        assert output.token_ids == ids_of("x") * 5 + ids_of("END")
    assert sum(isinstance(message, StopSequence) for message in fake.received) == 4
    assert fake.requests[0].hold_for_acks


def test_acknowledgements_keep_a_sequence_going_and_come_in_one_message(core, fake):
    fake.largest_step = 50  # more than a sequence may run ahead
    run(core, fake, SamplingParams(n=5, max_tokens=200, stop="never"))
    acknowledged = [m for m in fake.received if isinstance(m, Acknowledge)]
    assert max(len(m.request_ids) for m in acknowledged) > 1
    counts = {}
    for message in acknowledged:
        for index, count in zip(message.sample_indices, message.num_tokens, strict=True):
            assert count > counts.get(int(index), 0)
            counts[int(index)] = count


def test_no_acknowledgements_without_stop_strings(core, fake):
    stream(core, fake, SamplingParams(n=3, max_tokens=20))
    assert len(fake.received) == 1


def test_aborting_twice_tells_the_manager_once(core, fake):
    generation = submit(core, PROMPT, SamplingParams(n=3, max_tokens=100))
    core.abort(generation)
    core.abort(generation)
    assert len(core) == 0
    assert [type(m) for m in fake.received[1:]] == [AbortRequest]
    fake.run(core)  # late updates are ignored
    assert fake.num_running == 0


def test_the_manager_is_told_the_priority_and_how_many_samples_are_enough(core, fake):
    run(core, fake, SamplingParams(priority=-7, n=5, first_k=2))
    run(core, fake, SamplingParams(n=5))
    first, second = fake.requests
    assert (first.priority, first.first_k) == (-7, 2)
    assert (second.priority, second.first_k) == (0, 0)


def test_only_the_first_k_samples_are_the_answer(core, fake):
    lengths = [30, 3, 40, 6]
    fake.largest_step = 1
    fake.script = lambda request, index: [*ids_of("x") * lengths[index], EOS_ID]
    outputs = run(core, fake, SamplingParams(n=4, first_k=2, max_tokens=100)).take_all()
    assert [output.index for output in outputs] == [1, 3]
    assert [output.text for output in outputs] == ["xxx", "xxxxxx"]
    assert {output.finish_reason for output in outputs} == {"stop"}


def test_a_stop_string_counts_even_if_the_manager_hears_of_it_too_late():
    """Sample 0 ends first here, sample 2 first in the manager; the answer is sample 0 alone."""
    sent = []
    core = Generations(CONFIG, TOKENIZER, sent.append)
    generation = submit(core, PROMPT, SamplingParams(n=3, first_k=1, max_tokens=50, stop="END"))
    request = sent[0]
    core.absorb(updates([(request, 0, ids_of("a END b"), FinishReason.RUNNING, 0)]))
    assert [(type(m), m.sample_index) for m in sent[1:]] == [(StopSequence, 0)]
    assert not generation.finished  # the tokens of the others have yet to be counted
    core.absorb(
        updates(
            [
                (request, 2, ids_of("xyz"), FinishReason.LENGTH, 0),
                (request, 1, ids_of("late END"), FinishReason.ABORT, 0),
                (request, 0, ids_of("more"), FinishReason.ABORT, 0),
            ]
        )
    )
    assert generation.finished
    assert len(core) == 0
    (output,) = generation.take_all()
    assert (output.index, output.text, output.finish_reason) == (0, "a ", "stop")
    said = [ids_of("a END"), ids_of("late END"), ids_of("xyz")]
    assert generation.num_generated_tokens == sum(map(len, said))


@each_row("seed", range(8))
@pytest.mark.parametrize("stream", [False, True])
def test_first_k_gives_exactly_k_samples_however_late_the_manager_hears(seed, stream):
    rng = random.Random(seed)
    fake, post = FakeEngine(), []
    core = Generations(CONFIG, TOKENIZER, post.append)
    said = rng.choices([*ids_of("abcd"), EOS_ID], weights=[5, 5, 5, 5, 1], k=3000)
    fake.script = lambda request, index: said[7 * index + 40 * request.request_id :]
    fake.largest_step = rng.choice([1, 4, 30])
    alive = []
    for number in range(2000):
        if number < 30:
            n = rng.randint(1, 8)
            params = SamplingParams(
                n=n,
                first_k=rng.randint(1, n),
                max_tokens=rng.randint(1, 40),
                stop=rng.choice([None, "ab", ["cc", "da"]]),
                prompt_logprobs=rng.choice([None, 1]),
            )
            alive.append(submit(core, PROMPT, params, stream=stream))
        for message in post[: rng.randint(0, len(post))]:
            fake.send(message)
            post.remove(message)
        for message in fake.step():
            core.absorb(message)
        if number >= 30 and not len(core):
            break
    assert len(core) == 0
    for generation in alive:
        assert generation.finished
        outputs = generation.take_all()
        assert len(outputs) == generation.request.params.first_k
        assert {output.finish_reason for output in outputs} <= {"stop", "length"}
        for output in outputs:
            whole = said[7 * output.index + 40 * generation.request_id :]
            assert output.token_ids == whole[: len(output.token_ids)]
        if stream:
            news = {output.index for output in generation.take_news()}
            assert news == set(range(generation.request.params.n))


def test_cached_tokens_are_not_those_of_a_sample_that_never_ran(fake):
    sent = []
    core = Generations(CONFIG, TOKENIZER, sent.append)
    generation = submit(core, PROMPT, SamplingParams(n=3, first_k=1))
    request = sent[0]
    rows = [
        (request, 0, ids_of("a"), FinishReason.LENGTH, 2),
        (request, 1, ids_of("a"), FinishReason.ABORT, 3),
        (request, 2, [], FinishReason.ABORT, 0),
    ]
    core.absorb(updates(rows))
    assert generation.num_cached_tokens == 2


def test_rows_of_several_weights_versions_are_one_output():
    """After an update of the weights, a sequence has one row of each version in one message."""
    sent = []
    core = Generations(CONFIG, TOKENIZER, sent.append)
    generation = submit(core, PROMPT, SamplingParams(n=2, logprobs=1, max_tokens=9))
    request = sent[0]
    rows = [
        (request, 1, ids_of("ab"), FinishReason.RUNNING, 2),
        (request, 1, ids_of("c"), FinishReason.RUNNING, 2),
        (request, 1, ids_of("de"), FinishReason.LENGTH, 2),
        (request, 0, ids_of("x"), FinishReason.RUNNING, 0),
        (request, 0, [EOS_ID], FinishReason.STOP, 0),
    ]
    core.absorb(updates(rows))
    assert generation.finished
    assert len(core) == 0
    assert len(sent) == 1
    outputs = generation.take_all()
    assert [output.text for output in outputs] == ["x", "abcde"]
    assert [output.finish_reason for output in outputs] == ["stop", "length"]
    assert [len(output.logprobs) for output in outputs] == [2, 5]


def test_a_stop_string_may_lie_in_any_row_of_a_message():
    for row in range(3):
        pieces = [ids_of("ab"), ids_of("cd"), ids_of("ef")]
        pieces[row] = ids_of("END")
        check_that_a_stop_string_ends_a_sample_of_several_rows(pieces, row)


def check_that_a_stop_string_ends_a_sample_of_several_rows(pieces, row):
    sent = []
    core = Generations(CONFIG, TOKENIZER, sent.append)
    generation = submit(core, PROMPT, SamplingParams(max_tokens=50, stop="END"))
    request = sent.pop()
    reasons = [FinishReason.RUNNING, FinishReason.RUNNING, FinishReason.LENGTH]
    core.absorb(updates([(request, 0, *each, 0) for each in zip(pieces, reasons, strict=True)]))
    assert generation.finished, row
    assert len(core) == 0, row
    (output,) = generation.take_all()
    assert (output.text, output.finish_reason) == ("abcd"[: 2 * row], "stop"), row
    # It has ended for the manager too, which ignores what is said of it.
    stops = [message for message in sent if isinstance(message, StopSequence)]
    acks = [message for message in sent if isinstance(message, Acknowledge)]
    assert len(stops) == (row < 2), row
    assert [ack.num_tokens.tolist() for ack in acks] == [[], [[2]], [[2, 4]]][row], row


def test_etas_are_those_of_the_latest_message(core, fake):
    fake.paused = True
    first, second, third = (submit(core, PROMPT, SamplingParams()) for _ in range(3))
    assert (first.eta_s, core.etas().backlog_s) == (None, None)
    ids = [first.request_id, third.request_id, 99]
    core.absorb(Eta(np.array(ids, np.int64), np.array([1.5, 4.0, 9.0]), 12.0))
    assert (first.eta_s, second.eta_s, third.eta_s) == (1.5, None, 4.0)
    assert core.etas() == Etas({0: 1.5, 2: 4.0}, 12.0)
    core.absorb(Eta(np.array([0], np.int64), np.array([0.5]), 11.0))
    assert core.etas() == Etas({0: 0.5, 2: 4.0}, 11.0)
    core.abort(first)
    assert core.etas() == Etas({2: 4.0}, 11.0)
    fake.paused = False
    fake.run(core)
    assert core.etas() == Etas({}, 0.0)
    submit(core, PROMPT, SamplingParams())
    assert core.etas() == Etas({}, None)  # the forecast for the earlier requests is out of date


def test_the_state_has_the_etas(core):
    state = EngineState()
    assert state.etas() == Etas({}, 0.0)
    state.ready(PREPARER, core)
    submit(core, PROMPT, SamplingParams())
    core.absorb(Eta(np.array([0], np.int64), np.array([2.0]), 3.0))
    assert state.etas() == Etas({0: 2.0}, 3.0)
    state.die("the worker ended")
    assert state.etas() == Etas({}, 0.0)


def test_a_refusal_by_the_manager_is_an_error_of_the_prompt(core, fake):
    fake.reject = "it can never fit"
    generation = run(core, fake, SamplingParams())
    assert isinstance(generation.error, RequestError)
    assert generation.error.field == "prompt"


def test_the_death_of_the_engine_fails_every_generation(core, fake):
    notes = []
    generations = [
        submit(core, PROMPT, SamplingParams(), on_change=lambda: notes.append(1)) for _ in range(3)
    ]
    core.fail_all(EngineDead("the worker ended"))
    assert all(generation.finished for generation in generations)
    assert all("worker" in str(generation.error) for generation in generations)
    assert len(notes) == 3
    assert len(core) == 0


def test_cached_tokens_are_those_of_the_sample_that_computed_the_prompt(core, fake):
    fake.num_cached_tokens = 2
    assert run(core, fake, SamplingParams(n=2)).num_cached_tokens == 2


@each_row("seed", range(5))
def test_any_mix_leaves_nothing_behind(seed):
    rng = random.Random(seed)
    fake = FakeEngine()
    core = Generations(CONFIG, TOKENIZER, fake.send)
    fake.script = lambda request, index: rng.choices([*ids_of("ab"), EOS_ID], k=request.max_tokens)
    alive = []
    for _ in range(200):
        if rng.random() < 0.5:
            stop = rng.choice([None, "ab", ["bb", "aa"]])
            params = SamplingParams(n=rng.randint(1, 4), max_tokens=rng.randint(1, 40), stop=stop)
            params = replace(params, ignore_eos=rng.random() < 0.5)
            alive.append(submit(core, PROMPT, params, stream=rng.random() < 0.5))
        if alive and rng.random() < 0.1:
            core.abort(alive.pop(rng.randrange(len(alive))))
        for message in fake.step():
            core.absorb(message)
    fake.run(core)
    assert len(core) == 0
    assert fake.num_running == 0
    assert all(generation.finished and generation.error is None for generation in alive)
    for generation in alive:
        for sample in generation.samples:
            assert sample.finish_reason in ("stop", "length")
