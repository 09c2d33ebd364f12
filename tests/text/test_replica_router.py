"""The router: where requests go, and how the answers of several managers become one."""

from __future__ import annotations

import msgspec
import numpy as np
from fake_engine import CONFIG, TOKENIZER, submit

from tokasaurus.errors import ReplicasLost
from tokasaurus.protocol.commands import (
    AbortAll,
    Command,
    CommandDone,
    CommandFailed,
    FlushCache,
    LoadCartridge,
    Pause,
    PauseMode,
    ReleaseMemory,
    UnloadCartridge,
    UpdateWeights,
)
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    CartridgeState,
    Eta,
    FinishReason,
    GenerateRequest,
    Ping,
    PooledState,
    Pooling,
    PromptLogprobs,
    RequestRejected,
    Sampling,
    SequenceUpdates,
    Statistics,
    StopSequence,
)
from tokasaurus.protocol.watching import Outlook, Watch
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations
from tokasaurus.text.numbering import PART_SHIFT
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.replica_reports import Loss, Seats
from tokasaurus.text.replicas import Replicas

SEATS = 4


class Engine:
    """A router and what each of its replicas was sent."""

    def __init__(self, num_replicas: int = 2, num_seats: int = SEATS) -> None:
        self.sent: list[list[object]] = [[] for _ in range(num_replicas)]
        seats = Seats(num_seats, num_cached_tokens=4096)
        self.router = Replicas([sent.append for sent in self.sent], [seats] * num_replicas)

    def submit(self, request_id: int, prompt: int = 5, **changes: object) -> GenerateRequest:
        values: dict[str, object] = {
            "request_id": request_id,
            "prompt_ids": np.arange(prompt, dtype=np.int32),
            "n": 1,
            "max_tokens": 20,
            "sampling": Sampling(),
            "seed": 7,
            "stop_token_ids": (),
        }
        request = GenerateRequest(**{**values, **changes})  # type: ignore[arg-type]
        self.router.send(request)
        return request

    def requests(self, replica: int) -> list[GenerateRequest]:
        return [each for each in self.sent[replica] if isinstance(each, GenerateRequest)]

    def last(self, replica: int) -> GenerateRequest:
        return self.requests(replica)[-1]

    def end(self, replica: int, request: GenerateRequest, *indices: int, reason=FinishReason.STOP):
        """The replica ends samples; returns what the text core gets."""
        rows = [(request.request_id, index, [1], reason) for index in indices]
        (message,) = self.router.absorb(replica, updates(rows))
        return message


def updates(rows: list[tuple[int, int, list[int], FinishReason]]) -> SequenceUpdates:
    """Rows of (request id, sample index, ids, finish reason), without logprobs."""
    none = np.array([], np.float32)
    return SequenceUpdates(
        request_ids=np.array([row[0] for row in rows], np.int64),
        sample_indices=np.array([row[1] for row in rows], np.int32),
        num_tokens=np.array([len(row[2]) for row in rows], np.int32),
        finish_reasons=np.array([row[3] for row in rows], np.int32),
        num_cached_tokens=np.zeros(len(rows), np.int32),
        num_logprobs=np.full(len(rows), -1, np.int32),
        weights_versions=np.zeros(len(rows), np.int32),
        token_ids=np.array([token for row in rows for token in row[2]], np.int32),
        logprobs=none,
        top_ids=np.array([], np.int32),
        top_logprobs=none,
    )


def indices_of(request: GenerateRequest) -> list[int]:
    """The samples that a replica was asked for."""
    if request.progress is None:
        return list(range(request.n))
    return request.progress.sample_indices.tolist()


# --- choosing ------------------------------------------------------------------------------------


def test_requests_go_where_the_least_work_is_and_a_whole_one_is_passed_on_as_it_is() -> None:
    engine = Engine()
    first = engine.submit(0, n=3)
    assert engine.sent == [[first], []]
    second = engine.submit(1, n=2)
    third = engine.submit(2)
    assert engine.sent == [[first], [second, third]]
    engine.end(0, first, 0, 1, 2)
    fourth = engine.submit(3, n=3)
    assert engine.sent[0] == [first, fourth]


def test_work_is_counted_down_as_tokens_arrive_and_samples_end() -> None:
    engine = Engine()
    zero = engine.router.living[0]
    request = engine.submit(0, prompt=30, n=2, max_tokens=20, stream=True)
    assert zero.work == 30 + 2 * 20
    rows = [(0, 0, [1, 2, 3], FinishReason.RUNNING), (0, 1, [], FinishReason.RUNNING)]
    engine.router.absorb(0, updates(rows))
    assert zero.work == 17 + 20
    # A sample that is longer than predicted still counts.
    engine.router.absorb(0, updates([(0, 0, [1] * 30, FinishReason.RUNNING)]))
    assert zero.work == 1 + 20
    engine.end(0, request, 1)
    assert zero.work == 1
    engine.end(0, request, 0)
    assert zero.work == 0


def test_lengths_are_predicted_from_those_of_samples_with_the_same_max_tokens() -> None:
    engine = Engine(num_replicas=1)
    (replica,) = engine.router.living
    for request_id, max_tokens, num_tokens in ((0, 1000, 10), (1, 1000, 20), (2, 500, 500)):
        request = engine.submit(request_id, max_tokens=max_tokens)
        rows = [(request_id, 0, [1] * num_tokens, FinishReason.STOP)]
        engine.router.absorb(0, updates(rows))
    # With the last max_tokens none has ended: the mean share of all counts.
    for request_id, max_tokens, expected in ((3, 1000, 15), (4, 500, 500), (5, 2000, 687)):
        request = engine.submit(request_id, prompt=7, max_tokens=max_tokens)
        assert replica.work == 7 + expected, max_tokens
        engine.end(0, request, 0, reason=FinishReason.ABORT)  # of which nothing is learned
    assert replica.work == 0


def test_a_full_replica_gets_nothing_while_another_has_seats() -> None:
    engine = Engine()
    engine.submit(0, n=SEATS, max_tokens=1)
    engine.submit(1, max_tokens=200)
    engine.submit(2, max_tokens=1)
    assert [each.request_id for each in engine.requests(1)] == [1, 2]


def test_samples_are_split_when_they_exceed_the_free_seats_of_one_replica() -> None:
    # Samples, seats taken at both replicas before, and the samples that each gets.
    for n, taken, shares in (
        (4, (0, 0), ([0, 1, 2, 3], [])),
        (6, (0, 0), ([0, 1, 2, 3], [4, 5])),
        (4, (1, 2), ([0, 1, 2], [3])),
        # They must wait in any case, and can run together.
        (4, (3, 4), ([0, 1, 2, 3], [])),
        (4, (4, 4), ([0, 1, 2, 3], [])),
        # No replica can run all of them together.
        (11, (0, 2), ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10])),
    ):
        engine = Engine()
        for replica, count in enumerate(taken):
            if count:
                engine.router._replicas[replica].num_open = count
        engine.submit(5, n=n)
        got = tuple([i for each in engine.requests(r) for i in indices_of(each)] for r in (0, 1))
        assert got == shares, (n, taken)


def test_a_split_request_keeps_its_seed_and_the_numbers_of_its_samples() -> None:
    engine = Engine()
    request = engine.submit(5, n=6, first_k=5, num_logprobs=2, stream=True)
    for replica in (0, 1):
        part = engine.last(replica)
        assert (part.n, part.first_k, part.seed) == (6, 0, request.seed)
        assert (part.num_logprobs, part.stream) == (2, True)
        assert part.progress is not None
        assert not part.progress.num_generated.any()
    assert engine.last(0).request_id != engine.last(1).request_id


def test_prompt_logprobs_and_first_k_together_are_not_split() -> None:
    engine = Engine()
    request = engine.submit(1, n=20, first_k=2, num_prompt_logprobs=0)
    assert engine.sent == [[request], []]


def test_a_prompt_goes_where_its_beginning_is_unless_that_replica_has_much_more_to_do() -> None:
    engine = Engine(num_seats=16)
    engine.submit(0, prompt=1024, max_tokens=1)
    engine.submit(1, max_tokens=1)
    engine.submit(2, prompt=1024)
    assert [each.work for each in engine.router.living] == [1024 + 1 + 20, 5 + 1]
    engine.submit(3, prompt=576)  # 1045 - 576 tokens here, 6 there
    assert [each.request_id for each in engine.requests(0)] == [0, 2]
    assert [each.request_id for each in engine.requests(1)] == [1, 3]
    assert [each.work for each in engine.router.living] == [1045, 6 + 576 + 20]
    engine.submit(4, prompt=1024)  # 1045 - 1024 tokens here, 602 - 576 there
    assert engine.last(0).request_id == 4


def with_beginning_at(replicas: tuple[int, ...], work: tuple[int, ...]) -> Engine:
    """Replicas of which some have the first 64 tokens of prompts, and all have something to do."""
    engine = Engine(len(work), num_seats=2)
    for replica in replicas:
        blocks = engine.router._places.blocks(np.arange(64, dtype=np.int32))
        engine.router._places.note(replica, blocks)
    for each, its_work in zip(engine.router.living, work, strict=True):
        each.work = its_work
    return engine


def test_a_prompt_does_not_leave_its_beginning_for_a_replica_that_is_hardly_less_busy() -> None:
    for work, expected in ((1000, 0), (1564, 0), (1565, 1)):
        engine = with_beginning_at((0,), (work, 1000))
        request = engine.submit(0, prompt=100)
        assert engine.requests(expected) == [request], work
        # A prompt that begins otherwise, or is too short for a block, goes where less is to do.
        engine = with_beginning_at((0,), (work, 999))
        assert engine.submit(0, prompt=50) in engine.sent[1], work


def test_of_replicas_with_a_beginning_the_one_with_the_least_work_gets_the_prompt() -> None:
    engine = with_beginning_at((0, 1, 2), (1300, 1100, 1200, 1000))
    assert engine.submit(0, prompt=100) in engine.sent[1]


def test_a_full_replica_does_not_get_a_prompt_for_its_beginning() -> None:
    for full, other in ((0, 1), (1, 0)):
        engine = with_beginning_at((full,), (1000, 1000))
        engine.router.living[full].num_open = 2
        assert engine.submit(0, prompt=100) in engine.sent[other], full


def test_prompts_that_take_nothing_from_the_cache_go_where_the_least_work_is() -> None:
    for changes in ({"num_prompt_logprobs": 0}, {"pooling": Pooling.MEAN}, {"cartridge": "c"}):
        engine = Engine(num_seats=16)
        engine.submit(0, prompt=1024)
        engine.submit(1, prompt=1024, **changes)
        assert engine.last(1).request_id == 1, changes


def test_requests_that_name_a_cartridge_go_where_its_pages_are() -> None:
    # Whether another prompt may take hits or not: the cartridge is never computed.
    for changes in ({}, {"num_prompt_logprobs": 0}, {"pooling": Pooling.MEAN}):
        engine = Engine(3, num_seats=16)
        engine.router.send(Command(1, LoadCartridge("c", ("file",), 1000)))
        zero, one, two = engine.router.living
        first = engine.submit(0, prompt=5, max_tokens=1, cartridge="c")
        assert zero.work == 1000 + 5 + 1
        engine.end(0, first, 0)
        zero.work = 900
        request = engine.submit(1, prompt=7, cartridge="c", **changes)
        assert engine.last(0) is request, changes
        assert zero.work == 900 + 7 + 20  # its positions are no work there
        # A replica that is much busier does not get them all.
        zero.work, one.work, two.work = 1601, 500, 400
        request = engine.submit(2, prompt=5, cartridge="c", **changes)
        assert engine.last(2) is request, changes
        assert two.work == 400 + 1000 + 5 + 20
        engine.router.send(Command(2, UnloadCartridge("c")))
        request = engine.submit(3, prompt=5, cartridge="c")
        assert engine.last(1) is request
        assert one.work == 500 + 5 + 20


def test_no_beginning_is_cached_after_a_flush_or_an_update() -> None:
    for action in (FlushCache(), UpdateWeights(1, ())):
        engine = Engine(num_seats=16)
        request = engine.submit(0, prompt=1024)
        engine.end(0, request, 0)
        engine.router.send(Command(1, action))
        for replica in (0, 1):
            engine.router.absorb(replica, CommandDone(1))
        engine.submit(1, prompt=1024)
        assert engine.router.living[0].work >= 1024, action
        engine.submit(2, prompt=1024)
        assert engine.last(1).request_id == 2


def acknowledged(message: Acknowledge) -> list[tuple[int, int, int]]:
    columns = message.request_ids, message.sample_indices, message.num_tokens
    return list(zip(*(column.tolist() for column in columns), strict=True))


# --- messages to the managers --------------------------------------------------------------------


def test_each_part_hears_of_its_own_samples() -> None:
    engine = Engine()
    engine.submit(5, n=6, hold_for_acks=True)
    engine.submit(6, hold_for_acks=True)
    parts = [engine.requests(replica)[0].request_id for replica in (0, 1)]
    engine.router.send(StopSequence(5, 4))
    stop = engine.sent[1][-1]
    assert (type(stop), stop.request_id, stop.sample_index) == (StopSequence, parts[1], 4)
    engine.router.send(
        Acknowledge(
            np.array([5, 5, 6, 9]), np.array([1, 5, 0, 0], np.int32), np.array([7, 8, 9, 1])
        )
    )
    rows = [acknowledged(engine.sent[replica][-1]) for replica in (0, 1)]
    assert rows == [[(parts[0], 1, 7)], [(parts[1], 5, 8), (6, 0, 9)]]
    engine.router.send(AbortRequest(5))
    assert [engine.sent[replica][-1].request_id for replica in (0, 1)] == parts
    engine.router.send(AbortRequest(6))
    engine.end(0, engine.requests(0)[0], 0, 1, 2, 3, reason=FinishReason.ABORT)
    engine.end(1, engine.requests(1)[0], 4, 5, reason=FinishReason.ABORT)
    engine.end(1, engine.requests(1)[1], 0, reason=FinishReason.ABORT)
    num_sent = [len(sent) for sent in engine.sent]
    for message in (AbortRequest(5), StopSequence(6, 0), StopSequence(5, 1)):
        engine.router.send(message)  # of requests that are not there any more
    assert [len(sent) for sent in engine.sent] == num_sent
    assert [(each.num_open, each.work) for each in engine.router.living] == [(0, 0)] * 2


# --- messages from the managers ------------------------------------------------------------------


def test_parts_answer_in_the_name_of_their_request() -> None:
    engine = Engine()
    engine.submit(5, n=6)
    part = engine.last(1).request_id
    message = engine.end(1, engine.last(1), 4)
    assert message.request_ids.tolist() == [5]
    empty, table = np.zeros(1, np.float32), np.zeros((1, 0), np.float32)
    for given in (
        PromptLogprobs(part, 1, empty, empty.astype(np.int32), table.astype(np.int32), table),
        PooledState(part, empty),
    ):
        (message,) = engine.router.absorb(1, given)
        assert message.request_id == 5


def test_first_k_of_a_split_request_is_counted_over_all_parts() -> None:
    engine = Engine()
    engine.submit(5, n=8, first_k=3)
    zero, one = engine.last(0), engine.last(1)
    engine.end(0, zero, 0, 1)
    assert len(engine.sent[0]) == len(engine.sent[1]) == 1
    engine.end(1, one, 4)
    for replica, part in enumerate((zero, one)):
        (abort,) = engine.sent[replica][1:]
        assert isinstance(abort, AbortRequest)
        assert abort.request_id == part.request_id
    engine.end(0, zero, 2, 3, reason=FinishReason.ABORT)
    engine.end(1, one, 5)  # it ended before it heard of the abort
    engine.end(1, one, 6, 7, reason=FinishReason.ABORT)
    assert [len(sent) for sent in engine.sent] == [2, 2]
    assert not engine.router._routes


def test_a_split_request_is_refused_once() -> None:
    engine = Engine()
    engine.submit(5, n=8)
    zero, one = engine.last(0), engine.last(1)
    (message,) = engine.router.absorb(1, RequestRejected(one.request_id, "too much", "n"))
    assert (message.request_id, message.reason, message.field) == (5, "too much", "n")
    (abort,) = engine.sent[0][1:]
    assert (type(abort), abort.request_id) == (AbortRequest, zero.request_id)
    assert len(engine.sent[1]) == 1
    assert [(each.num_open, each.work) for each in engine.router.living] == [(0, 0)] * 2


def eta(rows: dict[int, float], backlog: float) -> Eta:
    return Eta(np.array(list(rows), np.int64), np.array(list(rows.values())), backlog)


def test_predictions_are_those_of_the_last_part_and_of_the_longest_backlog() -> None:
    engine = Engine()
    engine.submit(5, n=6)
    engine.submit(6)
    parts = [engine.requests(replica)[0].request_id for replica in (0, 1)]
    (message,) = engine.router.absorb(0, eta({parts[0]: 8.0}, 9.0))
    assert (message.request_ids.tolist(), message.seconds.tolist()) == ([5], [8.0])
    (message,) = engine.router.absorb(1, eta({parts[1]: 3.0, 6: 4.0, 77: 1.0}, 4.0))
    assert (message.request_ids.tolist(), message.seconds.tolist()) == ([5, 6], [8.0, 4.0])
    assert message.backlog_seconds == 9.0
    engine.end(0, engine.requests(0)[0], 0, 1, 2, 3)
    (message,) = engine.router.absorb(1, eta({parts[1]: 2.0}, 2.5))
    assert (message.seconds.tolist(), message.backlog_seconds) == ([2.0], 2.5)


def statistics(
    value: int, step_s: float, weights_version: int = 0, *, paused: bool = False
) -> Statistics:
    values = dict.fromkeys(Statistics.__struct_fields__, value)
    values |= {"step_s": step_s, "weights_version": weights_version, "paused": paused}
    values["cartridges"] = ()
    return Statistics(**values)  # type: ignore[arg-type]


def test_all_replicas_are_watched_and_each_has_its_own_outlook() -> None:
    engine = Engine()
    engine.router.send(Watch(2.0))
    for replica in (0, 1):
        assert [each.seconds for each in engine.sent[replica] if isinstance(each, Watch)] == [2.0]
    none = np.zeros(1, np.int32)
    outlooks = [Outlook(step, 0.1, 1, 2, 3, none, none, none, none, 0) for step in (5, 6)]
    for replica, outlook in enumerate(outlooks):
        assert engine.router.absorb(replica, outlook) == []
    assert engine.router.outlooks() == dict(enumerate(outlooks))
    engine.router.lost(0, "killed")
    assert engine.router.outlooks() == {1: outlooks[1]}


def test_statistics_are_sums_whose_totals_never_fall() -> None:
    engine = Engine()
    router = engine.router
    assert router.statistics is None
    assert router.absorb(0, statistics(3, 0.5)) == []
    assert (router.statistics.num_finished, router.statistics.step_s) == (3, 0.5)
    router.absorb(1, statistics(4, 0.25))
    both = router.statistics
    assert (both.num_finished, both.num_pages, both.step_s) == (7, 7, 0.5)
    assert router.statistics is both  # added once for all reports that came
    router.lost(0, "killed")
    left = router.statistics
    assert (left.num_finished, left.num_pages, left.step_s) == (7, 4, 0.25)
    router.absorb(1, statistics(5, 0.25))
    assert (router.statistics.num_finished, router.statistics.device_s) == (8, 8)
    assert (router.statistics.num_pages, router.statistics.num_waiting) == (5, 5)
    router.lost(1, "killed")
    assert (router.statistics.num_finished, router.statistics.num_pages) == (8, 0)


def test_cartridges_are_merged_by_name() -> None:
    engine = Engine()

    def having(value: int, **idle_s: float) -> Statistics:
        states = [CartridgeState(name, 5, *[value] * 7, each) for name, each in idle_s.items()]
        return msgspec.structs.replace(statistics(value, 0.5), cartridges=tuple(states))

    engine.router.absorb(0, having(1, a=3.0, b=4.0))
    engine.router.absorb(1, having(2, a=2.5, c=7.0))
    assert engine.router.statistics.cartridges == (
        CartridgeState("a", 5, *[3] * 7, 2.5),
        CartridgeState("b", 5, *[1] * 7, 4.0),
        CartridgeState("c", 5, *[2] * 7, 7.0),
    )
    engine.router.lost(0, "killed")
    engine.router.absorb(1, having(4, a=1.0))
    merged = engine.router.statistics
    assert merged.cartridges == (CartridgeState("a", 5, *[4] * 7, 1.0),)
    assert merged.num_cartridge_loads == 5
    assert merged.num_cartridge_pages == 4


def test_a_version_and_a_pause_are_not_summed() -> None:
    router = Engine().router
    for replica in (0, 1):
        router.absorb(replica, statistics(1, 0.5, weights_version=2, paused=True))
    assert (router.statistics.weights_version, router.statistics.paused) == (2, True)
    router.lost(0, "killed")
    router.absorb(1, statistics(1, 0.5, weights_version=2))
    assert (router.statistics.weights_version, router.statistics.paused) == (2, False)


def test_the_text_core_has_the_statistics_of_all_replicas() -> None:
    engine, generations = text_core()
    assert generations.statistics is None
    for replica in (0, 1):
        for message in engine.router.absorb(replica, statistics(4, 0.5)):
            generations.absorb(message)
    assert generations.statistics.num_finished == 8


def test_a_command_is_done_when_every_replica_has_done_it() -> None:
    engine = Engine(3)
    engine.router.send(Command(1, FlushCache()))
    assert all(len(sent) == 1 for sent in engine.sent)
    assert engine.router.absorb(0, CommandDone(1, 1, 16, 2, weights_version=3)) == []
    assert engine.router.absorb(2, CommandDone(1, 2, 32, 0, 3, lacks_weights=True)) == []
    (message,) = engine.router.absorb(1, CommandDone(1, 4, 64, 1, weights_version=3))
    numbers = message.num_pages, message.num_tokens, message.num_sequences, message.weights_version
    assert numbers == (7, 112, 3, 3)
    assert message.lacks_weights


def test_a_failed_command_says_which_replicas_failed_if_not_all_did() -> None:
    for answers, reason in (
        (["no", "no"], "no"),
        (["no", None], "replica 0: no; 1 of 2 replicas have done it"),
        (["no", "never"], "replica 0: no; replica 1: never"),
    ):
        engine = Engine()
        engine.router.send(Command(1, FlushCache()))
        messages = []
        for replica, problem in enumerate(answers):
            answer = CommandDone(1) if problem is None else CommandFailed(1, problem, "path")
            messages += engine.router.absorb(replica, answer)
        (message,) = messages
        assert (message.reason, message.field) == (reason, "path"), answers
        assert message.is_partial == (None in answers)


def test_a_lost_replica_is_not_waited_for() -> None:
    engine = Engine()
    engine.router.send(Command(1, FlushCache()))
    assert engine.router.absorb(1, CommandDone(1, 4)) == []
    (message,) = engine.router.lost(0, "killed").messages
    assert (message.command_id, message.num_pages) == (1, 4)
    assert engine.router.absorb(0, CommandDone(1, 4)) == []


# --- a loss --------------------------------------------------------------------------------------


def text_core(num_replicas: int = 2) -> tuple[Engine, Generations]:
    """A text core over a router of some replicas."""
    engine = Engine(num_replicas)
    generations = Generations(CONFIG, TOKENIZER, engine.router.send, replicas=engine.router)
    router = engine.router
    router.attach(
        generations.find, lambda: generations.set_num_seats(router.num_seats, router.num_stuck)
    )
    return engine, generations


def start(generations: Generations, **params: object) -> Generation:
    values = {"max_tokens": 20, "seed": 3, "ignore_eos": True, **params}
    stream = bool(values.pop("stream", False))
    return submit(generations, [9, 10, 11], SamplingParams(**values), stream=stream)


def lose(engine: Engine, generations: Generations, replica: int) -> Loss:
    loss = engine.router.lost(replica, "killed")
    for message in loss.messages:
        generations.absorb(message)
    for request_id, error in loss.failed.items():
        generations.fail(request_id, error)
    return loss


def test_a_stream_goes_on_with_its_tokens_and_others_begin_again() -> None:
    engine, generations = text_core()
    stream = start(generations, n=2, stream=True)
    part = engine.last(0).request_id
    rows = [(part, 0, [20, 21], FinishReason.RUNNING), (part, 1, [30], FinishReason.RUNNING)]
    for message in engine.router.absorb(0, updates(rows)):
        generations.absorb(message)
    stream.take_news()
    whole = start(generations, n=2)  # replica 1 has more room
    assert engine.last(1).request_id == whole.request_id
    lose(engine, generations, 0)
    replay = engine.last(1)
    assert replay.progress is not None
    assert replay.progress.sample_indices.tolist() == [0, 1]
    assert replay.progress.num_generated.tolist() == [2, 1]
    assert replay.progress.generated_ids.tolist() == [20, 21, 30]
    late = updates([(part, 0, [99], FinishReason.RUNNING)])
    assert engine.router.absorb(0, late) == []
    assert engine.router.num_seats == SEATS


def test_samples_that_have_ended_do_not_come_again_and_count_for_first_k() -> None:
    engine, generations = text_core()
    generation = start(generations, n=4, first_k=3)
    part = engine.last(0).request_id
    rows = [(part, 2, [5], FinishReason.LENGTH), (part, 0, [5], FinishReason.LENGTH)]
    for message in engine.router.absorb(0, updates(rows)):
        generations.absorb(message)
    lose(engine, generations, 0)
    replay = engine.last(1)
    assert (indices_of(replay), replay.progress.num_finished, replay.first_k) == ([1, 3], 2, 3)
    assert not generation.finished


def test_a_stop_string_that_the_dead_had_not_heard_of_ends_its_sample() -> None:
    engine, generations = text_core()
    text = TOKENIZER.decode([40])
    generation = start(generations, n=3, first_k=1, stop=text)
    part = engine.last(0).request_id
    for message in engine.router.absorb(0, updates([(part, 1, [40], FinishReason.RUNNING)])):
        generations.absorb(message)
    assert isinstance(engine.sent[0][-1], StopSequence)
    lose(engine, generations, 0)
    assert generation.finished
    assert [output.index for output in generation.take_all()] == [1]
    assert len(generations) == 0
    assert engine.sent[1] == []


def test_prompt_logprobs_are_asked_for_again_unless_all_have_come() -> None:
    for num_missing, asked in ((1, 1), (0, -1)):
        engine, generations = text_core()
        start(generations, prompt_logprobs=1)
        request = engine.last(0)
        count = len(request.prompt_ids) - 1 - num_missing
        piece = PromptLogprobs(
            request.request_id,
            1,
            np.zeros(count, np.float32),
            np.ones(count, np.int32),
            np.zeros((count, 1), np.int32),
            np.zeros((count, 1), np.float32),
        )
        for message in engine.router.absorb(0, piece):
            generations.absorb(message)
        lose(engine, generations, 0)
        assert engine.last(1).num_prompt_logprobs == asked, num_missing


def test_a_request_that_was_cut_short_ends_though_its_replica_is_lost() -> None:
    engine, generations = text_core()
    generation = start(generations)
    generations.cut_short(generation)
    assert isinstance(engine.sent[0][-1], AbortRequest)
    lose(engine, generations, 0)
    assert generation.finished
    assert not len(generations)
    assert not engine.sent[1]


def test_requests_that_a_command_aborts_do_not_go_on_after_a_loss() -> None:
    for action in (AbortAll(), Pause(PauseMode.ABORT)):
        engine, generations = text_core()
        before, answers = start(generations, max_tokens=9), []
        generations.command(action, answers.append)
        after = start(generations, max_tokens=9)
        assert engine.router.absorb(1, CommandDone(0, num_sequences=2)) == []
        num_sent = len(engine.sent[1])
        lose(engine, generations, 0)
        assert before.finished, action
        assert not after.finished, action
        assert len(answers) == 1, action
        assert all(isinstance(each, GenerateRequest) for each in engine.sent[1][num_sent:])


def test_an_answer_of_a_lost_replica_does_not_count() -> None:
    engine = Engine(3)
    engine.router.send(Command(1, UpdateWeights(1, ("f",))))
    engine.router.absorb(0, CommandFailed(1, "no such file", "files"))
    engine.router.absorb(1, CommandDone(1, weights_version=1))
    assert engine.router.lost(0, "killed").messages == []
    (message,) = engine.router.absorb(2, CommandDone(1, weights_version=1))
    assert isinstance(message, CommandDone)


def test_an_update_that_only_one_replica_refused_can_be_followed_by_another() -> None:
    engine, generations = text_core()
    answers: list[object] = []
    generations.update_weights(["f"], answers.append, label="mine")
    for message in (CommandDone(0, weights_version=1), CommandFailed(0, "no such file")):
        replica = int(isinstance(message, CommandFailed))
        for each in engine.router.absorb(replica, message):
            generations.absorb(each)
    versions = generations.commands.weights
    assert len(answers) == 1
    assert (versions.version, versions.label(1)) == (0, "mine")  # replica 0 draws tokens with it
    generations.update_weights(["f"], answers.append)
    assert engine.sent[1][-1].action.version == 2


# --- replicas that hang --------------------------------------------------------------------------


def test_a_stalled_replica_gets_no_requests_as_long_as_another_makes_progress() -> None:
    engine = Engine(num_replicas=3)
    held = engine.submit(1, n=2)
    engine.router.set_stalled({0})
    assert (engine.router.num_seats, engine.router.num_stuck) == (2 * SEATS, 2)
    engine.submit(2, n=3 * SEATS)
    for request_id in range(3, 9):
        engine.submit(request_id, prompt=200)
    assert engine.requests(0) == [held]
    engine.router.set_stalled({0, 1, 2})
    assert (engine.router.num_seats, engine.router.num_stuck) == (3 * SEATS, 0)
    engine.submit(20)
    assert engine.last(0).request_id == 20
    engine.router.set_stalled(set())
    engine.submit(21)
    assert engine.last(0).request_id == 21


def test_a_prefix_does_not_lead_to_a_stalled_replica() -> None:
    engine = Engine()
    engine.submit(1, prompt=200)
    engine.router.set_stalled({0})
    engine.submit(2, prompt=200)
    assert engine.last(1).request_id == 2


def test_a_replica_is_awaited_while_it_has_samples_or_a_command() -> None:
    engine = Engine()
    assert [engine.router.is_awaited(number) for number in range(3)] == [False] * 3
    request = engine.submit(1)
    assert [engine.router.is_awaited(number) for number in range(2)] == [True, False]
    engine.end(0, request, 0)
    assert not engine.router.is_awaited(0)
    engine.router.send(Command(1, Pause(PauseMode.KEEP)))
    engine.router.absorb(0, CommandDone(1))
    assert [engine.router.is_awaited(number) for number in range(2)] == [False, True]


def test_a_ping_goes_to_every_replica() -> None:
    engine = Engine()
    engine.router.send(Ping())
    assert [[type(each) for each in sent] for sent in engine.sent] == [[Ping], [Ping]]


def test_more_requests_pass_the_turnstile_beside_those_that_are_stuck() -> None:
    engine, generations = text_core()
    passed = 4 * 2 * SEATS  # rounds of seats
    for _ in range(passed + 1):
        start(generations)
    assert generations.num_held == 1
    engine.router.set_stalled({0})
    num_stuck = engine.router.num_stuck
    assert num_stuck == passed / 2
    for request in engine.requests(1):
        for message in engine.router.absorb(
            1, updates([(request.request_id, 0, [1], FinishReason.LENGTH)])
        ):
            generations.absorb(message)
    assert generations.num_held == 0


# --- replicas that are started again, and requests that lose two ---------------------------------


def join(engine: Engine, generations: Generations, replica: int) -> list[object]:
    """A lost replica is back; returns what its new manager is sent."""
    engine.sent[replica] = []
    for message in engine.router.join(replica, engine.sent[replica].append):
        generations.absorb(message)
    return engine.sent[replica]


def test_a_request_moves_once_and_fails_when_a_second_replica_ends() -> None:
    engine, generations = text_core(3)
    poisonous = start(generations)
    other = start(generations)  # on replica 1
    assert lose(engine, generations, 0).num_moved == 1
    assert engine.last(2).request_id == poisonous.request_id | 1 << PART_SHIFT
    loss = lose(engine, generations, 2)
    assert loss.num_moved == 0
    assert isinstance(poisonous.error, ReplicasLost)
    assert "(killed; killed)" in str(poisonous.error)
    assert not other.finished
    assert len(generations) == 1
    # It has moved once now, and fails with the last one's end.
    assert engine.requests(1)[-1].request_id == other.request_id
    assert lose(engine, generations, 1).num_moved == 1
    assert not other.finished


def test_a_split_request_that_fails_is_ended_at_the_replicas_that_live() -> None:
    engine, generations = text_core(3)
    generation = start(generations, n=3 * SEATS)
    lose(engine, generations, 0)
    lose(engine, generations, 1)
    assert isinstance(generation.error, ReplicasLost)
    aborted = [each for each in engine.sent[2] if isinstance(each, AbortRequest)]
    assert [each.request_id for each in aborted] == [each.request_id for each in engine.requests(2)]
    (two,) = engine.router.living
    assert (two.num_open, two.work) == (0, 0)
    # What it still says of the request is ignored.
    late = updates([(engine.requests(2)[0].request_id, 8, [1], FinishReason.ABORT)])
    for message in engine.router.absorb(2, late):
        generations.absorb(message)


def test_requests_and_commands_wait_while_there_is_no_replica() -> None:
    engine, generations = text_core()
    stream = start(generations, n=2, stream=True)
    rows = [(0, 0, [20, 21], FinishReason.RUNNING)]
    for message in engine.router.absorb(0, updates(rows)):
        generations.absorb(message)
    for replica in (1, 0):
        engine.router.lost(replica, "killed", starts_again=True)
    assert {each.state for each in engine.router.reports().values()} == {"starting"}
    assert engine.router.num_seats == 0
    waiting, aborted = start(generations), start(generations)
    generations.cut_short(aborted)
    answers: list[object] = []
    generations.command(FlushCache(), answers.append)
    flush, *requests = join(engine, generations, 1)
    assert isinstance(flush, Command)
    moved, fresh = requests
    assert moved.progress.num_generated.tolist() == [2, 0]
    assert (fresh.request_id, fresh.progress) == (waiting.request_id, None)
    assert aborted.finished
    assert not stream.finished
    engine.router.absorb(1, CommandDone(0))
    assert engine.router.num_seats == SEATS


def test_a_replica_that_starts_again_is_told_what_still_counts_before_it_gets_requests() -> None:
    engine, generations = text_core()
    answers: list[object] = []
    for action in (
        UpdateWeights(1, ("f",)),
        Pause(PauseMode.ABORT),
        UpdateWeights(2, ("g",)),
        ReleaseMemory(weights=False, kv_cache=True),
    ):
        generations.command(action, answers.append)
        number = len(answers)
        for replica in (0, 1):
            for message in engine.router.absorb(replica, CommandDone(number)):
                generations.absorb(message)
    assert len(answers) == 4
    generations.command(FlushCache(), answers.append)  # in flight
    engine.router.lost(0, "killed", starts_again=True)
    told = join(engine, generations, 0)
    assert [type(each.action) for each in told] == [
        Pause,
        UpdateWeights,
        ReleaseMemory,
        FlushCache,
    ]
    assert told[0].action.mode is PauseMode.KEEP
    assert told[1].action.version == 2
    assert (told[2].action.weights, told[2].action.kv_cache) == (False, True)
    for _ in range(3):
        start(generations)
    assert engine.requests(0) == []
    assert engine.router.reports()[0].state == "catching up"
    for command in told[:3]:
        assert engine.router.absorb(0, CommandDone(command.command_id)) == []
    assert engine.router.reports()[0].state == "ok"
    start(generations)
    assert len(engine.requests(0)) == 1
    # The command in flight is answered when this one has answered, too.
    assert engine.router.absorb(1, CommandDone(4)) == []
    assert len(engine.router.absorb(0, CommandDone(4))) == 1


def test_a_replica_that_cannot_get_the_weights_waits_for_the_next_ones(tmp_path) -> None:
    engine, generations = text_core()
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    answers: list[object] = []

    def update(replicas: tuple[int, ...]) -> None:
        number = len(answers)
        generations.update_weights([str(file)], answers.append)
        for replica in replicas:
            for message in engine.router.absorb(replica, CommandDone(number)):
                generations.absorb(message)
        assert len(answers) == number + 1

    update((0, 1))
    file.write_bytes(b"other")
    engine.router.lost(0, "killed", starts_again=True)
    assert join(engine, generations, 0) == []
    assert engine.router.reports()[0].state == "waiting for weights"
    assert str(file) in engine.router.obstacle(0)
    start(generations)
    assert engine.requests(0) == []
    update((0, 1))
    assert engine.router.reports()[0].state == "ok"
    start(generations)
    assert len(engine.requests(0)) == 1


def test_totals_go_on_when_a_replica_starts_again_and_lost_tokens_are_counted() -> None:
    engine, generations = text_core()
    engine.router.absorb(0, statistics(10, 0.5))
    engine.router.absorb(0, updates([(77, 0, [1, 2, 3], FinishReason.RUNNING)]))
    engine.router.lost(0, "killed")
    assert engine.router.losses.num_lost_tokens == 7
    join(engine, generations, 0)
    engine.router.absorb(0, statistics(1, 0.5))
    merged = engine.router.statistics
    assert (merged.num_finished, merged.num_pages) == (11, 1)
