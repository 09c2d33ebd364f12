"""A seeded world of several replicas: text core, router, managers and simulated devices.

Messages between them are late, and replicas are killed with batches and messages in flight, even
all of them. Some start again. All along, each replica's manager checks its invariants and each
device its positions; what the text core delivers is compared with an oracle that knows nothing of
replicas. Commands come while replicas die: pauses, aborts, flushes, and updates of the weights,
which some replicas refuse.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from fake_device import (
    BAD_FILES,
    GOOD_FILES,
    VOCAB_SIZE,
    FakeDevice,
    Oracle,
    pooled_oracle,
    prompt_logprobs_oracle,
)
from fake_engine import CONFIG, TOKENIZER
from simulation import make_config

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import EngineAborted, ReplicasLost, TokasaurusError
from tokasaurus.manager.manager import Manager
from tokasaurus.protocol.commands import (
    AbortAll,
    Action,
    CommandDone,
    FlushCache,
    Pause,
    PauseMode,
    Resume,
    aborts_all,
)
from tokasaurus.protocol.messages import (
    FinishReason,
    ForwardBatch,
    FromServer,
    FromWorker,
    GenerateRequest,
    Pooling,
    SequenceUpdates,
    ToServer,
)
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import PreparedRequest, Preparer
from tokasaurus.text.replica_reports import Seats
from tokasaurus.text.replicas import Replicas
from tokasaurus.text.samples import SampleOutput, TokenLogprobs

MAX_REQUEST_TOKENS = 64
MAX_LATE_STEPS = 20_000
COMMANDS = (
    FlushCache(),
    Resume(),
    Resume(),
    Pause(PauseMode.KEEP),
    Pause(PauseMode.DRAIN),
)
ABORTS = (Pause(PauseMode.ABORT), AbortAll())


class SimulatedReplica:
    """A manager and a device, with the messages on their way to and from them."""

    def __init__(self, config: ManagerConfig) -> None:
        self.manager = Manager(config)
        self.device = FakeDevice(config)
        self.inbox: deque[FromServer] = deque()
        self.outbox: deque[ToServer] = deque()
        self.results: deque[FromWorker] = deque()
        self.received: list[FromServer] = []
        self._now = 0.0

    def send(self, message: FromServer) -> None:
        self.inbox.append(message)

    def turn(self, num_messages: int, num_results: int) -> None:
        """One turn of the manager, with some of the messages and results."""
        events: list[FromServer | FromWorker] = []
        for _ in range(min(num_messages, len(self.inbox))):
            message = self.inbox.popleft()
            self.received.append(message)
            if isinstance(message, GenerateRequest) and message.progress is not None:
                progress = message.progress
                for index, count in zip(
                    progress.sample_indices.tolist(), progress.num_generated.tolist(), strict=True
                ):
                    self.device.num_drawn[message.seed, index] = count
            events.append(message)
        for _ in range(min(num_results, len(self.results))):
            events.append(self.results.popleft())
        self._now += 0.001
        actions = self.manager.take_turn(events, self._now)
        self.outbox += actions.messages
        for order in actions.to_worker:
            is_batch = isinstance(order, ForwardBatch)
            run = self.device.run if is_batch else self.device.carry_out
            self.results.append(run(order))

    def predict(self) -> None:
        """Sends what a manager sends once a second."""
        eta = self.manager.eta()
        self.outbox += [] if eta is None else [eta]
        self.outbox.append(self.manager.statistics())

    @property
    def is_idle(self) -> bool:
        return not (self.inbox or self.outbox) and self.manager.idle


@dataclass(eq=False)
class Watched:
    """A prompt as its client sees it."""

    generation: Generation
    stream: bool
    news: dict[int, list[SampleOutput]] = field(default_factory=dict)
    is_aborted: bool = False
    is_doomed: bool = False  # a command, or its client, ends it with the tokens that it has

    def take_news(self) -> None:
        for output in self.generation.take_news():
            self.news.setdefault(output.index, []).append(output)

    def outputs(self) -> dict[int, SampleOutput]:
        """The whole output of every sample that is part of the answer."""
        if not self.stream:
            return {output.index: output for output in self.generation.take_all()}
        self.take_news()
        whole = {index: _joined(pieces) for index, pieces in self.news.items()}
        left_out = {sample.index for sample in self.generation.left_out}
        return {index: each for index, each in whole.items() if index not in left_out}


class ReplicaWorld:
    """Random traffic over some replicas, of which some are killed and started again.

    Args:
        seed: of everything that is left to chance.
    """

    def __init__(self, seed: int) -> None:
        chance = self._random = random.Random(seed)
        num_seats = chance.choice([2, 4, 8])
        config = make_config(
            max_seqs_per_forward=num_seats,
            num_slots=num_seats + chance.choice([1, 4]),
            num_pages=chance.choice([16, 24, 64]),
            max_request_tokens=MAX_REQUEST_TOKENS,
            num_lanes=random.Random(seed).choice([1, 1, 2, 3]),
            scheduling_steps_ahead=chance.choice([1, 3]),
            stop_lag=chance.choice([1, 4, 16]),
            check_invariants=True,
            force_preemption=chance.random() < 0.3,
        )
        num_replicas = chance.choice([2, 2, 3])
        self._config = config
        self.replicas = [SimulatedReplica(config) for _ in range(num_replicas)]
        self.former: list[SimulatedReplica] = []  # that were started again
        seats = Seats(num_seats, config.num_pages * config.page_size)
        self.router = Replicas([replica.send for replica in self.replicas], [seats] * num_replicas)
        server = dataclasses.replace(
            CONFIG, max_request_tokens=MAX_REQUEST_TOKENS, max_seqs_per_forward=num_seats
        )
        self._preparer = Preparer(server, TOKENIZER)
        self.generations = Generations(server, TOKENIZER, self.router.send)
        self.router.attach(self.generations.find, self._on_seats)
        self.living = list(range(num_replicas))
        self.watched: list[Watched] = []
        self.final_rows: Counter[tuple[int, int]] = Counter()
        self.answers: list[CommandDone | TokasaurusError] = []
        self.num_commands = 0
        self.num_updates = 0
        # In the others more samples have tokens when their replica is lost.
        self.has_aborts = chance.random() < 0.5
        # In half of the worlds dead replicas stay dead, and one lives.
        self.has_restarts = chance.random() < 0.5
        self.num_kills = chance.randint(1, 5 if self.has_restarts else num_replicas - 1)
        self.num_replayed = 0  # samples with tokens
        self.num_failed = 0  # requests that two dead replicas had
        self._beginnings = [[chance.randrange(VOCAB_SIZE) for _ in range(20)] for _ in range(2)]

    def run(self, num_requests: int) -> None:
        """Runs until all requests have come and ended, and checks what they got."""
        chance = self._random
        kill_after = sorted(chance.randrange(1, num_requests) for _ in range(self.num_kills))
        num_late_steps = 0
        while len(self.watched) < num_requests or len(self.generations):
            may_start = len(self.watched) < num_requests
            if not may_start and num_late_steps == 0:
                self._command(Resume())
            num_late_steps += not may_start
            assert num_late_steps < MAX_LATE_STEPS, "a request never ends"
            if may_start and chance.random() < 0.4:
                self._start()
            is_due = kill_after and len(self.watched) >= kill_after[0]
            if is_due and self.living and chance.random() < 0.2:
                del kill_after[0]
                self.kill(chance.choice(self.living))
            if self.has_restarts and (chance.random() < 0.03 or not may_start):
                self._restart()
            # Later an abort would hide a request that never ends.
            if chance.random() < 0.03 and self.watched and may_start:
                watched = chance.choice(self.watched)
                watched.is_aborted |= not watched.generation.finished
                self.generations.abort(watched.generation)
            if chance.random() < 0.02 and self.watched and may_start:
                self._cut_short(chance.choice(self.watched))
            if chance.random() < 0.03 and may_start:
                self._command(chance.choice(COMMANDS))
            if chance.random() < 0.015 and may_start and self.has_aborts:
                self._command(chance.choice(ABORTS))
            if chance.random() < 0.02 and may_start:
                self._update()
            for number in list(self.living):
                self._move(number)
            if self.watched and chance.random() < 0.5:
                watched = chance.choice(self.watched)
                if watched.stream:
                    watched.take_news()
        self._settle()
        self._check_last_update()
        self._check_end()

    def kill(self, number: int) -> None:
        """Kills a replica. Some of what it had sent comes before the news of its end."""
        dead = self.replicas[number]
        self.living.remove(number)
        for _ in range(self._random.randint(0, len(dead.outbox))):
            self._deliver(number, dead.outbox.popleft())
        loss = self.router.lost(number, f"kill {number}")
        for message in loss.messages:
            self._absorb(message)
        for request_id, error in loss.failed.items():
            self.num_failed += 1
            self.generations.fail(request_id, error)
        for message in dead.outbox:
            assert self.router.absorb(number, message) == []

    # --- inside -----------------------------------------------------------------------------------

    def _on_seats(self) -> None:
        self.generations.set_num_seats(self.router.num_seats, self.router.num_stuck)

    def _restart(self) -> None:
        """Starts a dead replica again, with an empty manager and the first weights."""
        dead = [number for number in range(len(self.replicas)) if number not in self.living]
        if dead:
            number = self._random.choice(dead)
            self.former.append(self.replicas[number])
            fresh = self.replicas[number] = SimulatedReplica(self._config)
            self.living.append(number)
            for message in self.router.join(number, fresh.send):
                self._absorb(message)

    def _settle(self) -> None:
        while not all(self.replicas[number].is_idle for number in self.living):
            for number in list(self.living):
                self._move(number)

    def _check_last_update(self) -> None:
        """Whatever went wrong before, an update brings all replicas to one version."""
        for number in self.living:
            self.replicas[number].device.refuses_updates = False
        self.num_commands += 1
        self.num_updates += 1
        self.generations.update_weights(GOOD_FILES, self.answers.append)
        self._settle()
        assert isinstance(self.answers[-1], CommandDone), self.answers[-1]
        versions = {self.replicas[number].device.weights_version for number in self.living}
        assert versions == {self.generations.commands.weights.version}

    def _move(self, number: int) -> None:
        replica, chance = self.replicas[number], self._random
        if chance.random() < 0.8:
            replica.turn(chance.choice([0, 1, 8]), chance.choice([0, 1, 1, 3]))
        if chance.random() < 0.05:
            replica.predict()
        for _ in range(min(chance.choice([0, 1, 4]), len(replica.outbox))):
            self._deliver(number, replica.outbox.popleft())

    def _deliver(self, number: int, message: ToServer) -> None:
        for each in self.router.absorb(number, message):
            self._absorb(each)

    def _absorb(self, message: ToServer) -> None:
        if isinstance(message, SequenceUpdates):
            for row in message.finish_reasons.nonzero()[0].tolist():
                name = (message.request_ids.item(row), message.sample_indices.item(row))
                self.final_rows[name] += 1
        self.generations.absorb(message)

    def _start(self) -> None:
        chance = self._random
        length = chance.randint(1, 20)
        shared = chance.choice(self._beginnings)[: chance.randint(0, length)]
        ids = shared + [chance.randrange(VOCAB_SIZE) for _ in range(length - len(shared))]
        stream = chance.random() < 0.5
        if chance.random() < 0.1:
            request = self._preparer.prepare_pooling(ids, Pooling.MEAN)
            stream = False
        else:
            request = self._preparer.prepare(ids, self._params())
        generation = self.generations.start(
            request, stream=stream, client=chance.choice(["a", "b"])
        )
        self.watched.append(Watched(generation, stream))

    def _cut_short(self, watched: Watched) -> None:
        watched.is_doomed |= not watched.generation.finished
        self.generations.cut_short(watched.generation)

    def _command(self, action: Action) -> None:
        self.num_commands += 1
        if not aborts_all(action):
            self.generations.command(action, self.answers.append)
            return
        doomed = [watched for watched in self.watched if not watched.generation.finished]
        for watched in doomed:
            watched.is_doomed = True

        def on_done(answer: CommandDone | TokasaurusError) -> None:
            self.answers.append(answer)
            for watched in doomed:
                assert watched.is_aborted or watched.generation.finished, "an abort left a request"

        self.generations.command(action, on_done)

    def _update(self) -> None:
        """Updates the weights of all replicas; perhaps some refuse."""
        self.num_commands += 1
        self.num_updates += 1
        for number in self.living:
            self.replicas[number].device.refuses_updates = self._random.random() < 0.2
        files = self._random.choice([GOOD_FILES, GOOD_FILES, BAD_FILES])
        self.generations.update_weights(files, self.answers.append)

    def _params(self) -> SamplingParams:
        chance = self._random
        n = chance.choice([1, 1, 2, 5, 20])
        return SamplingParams(
            n=n,
            seed=chance.randrange(1 << 40),
            max_tokens=chance.randint(1, 40),
            stop=chance.choice([None, None, ["A"], ["!", "7B"]]),
            ignore_eos=chance.random() < 0.7,
            stop_token_ids=chance.choice([None, [9, 30]]),
            frequency_penalty=chance.choice([0.0, 1.0]),
            logprobs=chance.choice([None, 0, 2]),
            prompt_logprobs=chance.choice([None, None, 0, 2]),
            first_k=chance.choice([None, chance.randint(1, n)]),
            priority=chance.choice([0, 0, 1]),
        )

    def _check_end(self) -> None:
        assert max(self.final_rows.values()) == 1, "a sample ended twice"
        for watched in self.watched:
            if not watched.is_aborted:
                self._check(watched)
        assert len(self.answers) == self.num_commands
        for answer in self.answers:
            # A drain fails if sequences could not run to their ends.
            is_known = "had ended" in str(answer) or "checksum" in str(answer)
            assert isinstance(answer, CommandDone) or is_known, answer
        turnstile = self.generations._turnstile
        assert (turnstile.num_open, turnstile.num_held) == (0, 0)
        assert not self.router._routes
        assert not self.router._broadcasts._table
        assert all(replica.num_open == 0 for replica in self.router.living)
        assert all(replica.work == 0 for replica in self.router.living)
        for replica in self.replicas + self.former:
            for message in replica.received:
                if isinstance(message, GenerateRequest) and message.progress is not None:
                    self.num_replayed += int((message.progress.num_generated > 0).sum())

    def _check(self, watched: Watched) -> None:
        generation, request = watched.generation, watched.generation.request
        assert generation.finished
        if isinstance(generation.error, ReplicasLost):
            assert self.has_restarts or self.num_kills > 1
            return
        message = request.message(
            generation.request_id, stream=watched.stream, client=generation.client
        )
        outputs = watched.outputs()
        if watched.is_doomed:
            assert generation.error is None or isinstance(generation.error, EngineAborted)
        else:
            assert generation.error is None
            for index in range(message.n):
                assert self.final_rows[generation.request_id, index] == 1, "a sample never ended"
            assert len(outputs) == (message.first_k or message.n)
        for index, output in outputs.items():
            is_cut = output.finish_reason == "abort"
            assert watched.is_doomed or not is_cut
            _check_output(output, _expected(request, message, index, output, is_cut=is_cut))
        if generation.error is None and message.pooling:
            assert generation.pooled_state is not None
            states = [pooled_oracle(message, version) for version in self._versions]
            assert generation.pooled_state.tolist() in states
        if generation.error is None and message.num_prompt_logprobs >= 0:
            assert generation.prompt_logprobs is not None
            assert generation.prompt_ranks is not None
            logprobs = generation.prompt_logprobs.logprobs.tolist()
            found = zip(logprobs, generation.prompt_ranks.tolist(), strict=True)
            oracles = [prompt_logprobs_oracle(message, version) for version in self._versions]
            for pair, rows in zip(found, zip(*oracles, strict=True), strict=True):
                assert pair in [(logprob, rank) for logprob, rank, _ in rows]

    @property
    def _versions(self) -> range:
        """The versions that weights may have had."""
        return range(self.num_updates + 1)


def _expected(
    request: PreparedRequest,
    message: GenerateRequest,
    index: int,
    output: SampleOutput,
    *,
    is_cut: bool,
) -> SampleOutput:
    """What a sample must bring: the text core's output for the oracle's tokens.

    The output says only which versions of the weights drew how many tokens, and, where it was cut
    short, how many it has.
    """
    alone = Generation(
        0, request, TOKENIZER, stream=message.stream, on_change=lambda: None, client=""
    )
    sample, generated = alone.samples[index], Oracle(message, index)
    for version, count in output.weights_versions:
        first = len(generated.ids)
        generated.generate(count, version)
        reason = FinishReason.RUNNING
        if generated.has_ended:
            reason = FinishReason.LENGTH if generated.by_length else FinishReason.STOP
        logprobs = _logprobs(generated, message.num_logprobs, first)
        alone.extend(sample, generated.ids[first:], logprobs, reason, version)
    if is_cut and sample.finish_reason is None:
        alone.extend(sample, [], None, FinishReason.ABORT, 0)
    return sample.take()


def _logprobs(generated: Oracle, num_logprobs: int, first: int) -> TokenLogprobs | None:
    """The logprobs of the oracle's tokens from ``first`` on."""
    if num_logprobs < 0:
        return None
    tops = generated.tops[first:]
    shape = (len(tops), num_logprobs)
    return TokenLogprobs(
        np.array(generated.logprobs[first:], np.float32),
        np.array([[top[0] for top in each] for each in tops]).reshape(shape),
        np.array([[top[1] for top in each] for each in tops]).reshape(shape),
    )


def _check_output(output: SampleOutput, expected: SampleOutput) -> None:
    assert output.token_ids == expected.token_ids
    assert output.text == expected.text
    assert output.finish_reason == expected.finish_reason
    if output.token_ids:
        assert (output.logprobs is None) == (expected.logprobs is None)
    if output.logprobs is not None and expected.logprobs is not None:
        for name in ("logprobs", "top_ids", "top_logprobs"):
            theirs = getattr(expected.logprobs, name).tolist()
            assert getattr(output.logprobs, name).tolist() == theirs


def _joined(pieces: list[SampleOutput]) -> SampleOutput:
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return SampleOutput(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        TokenLogprobs.join(logprobs) if logprobs else None,
        pieces[-1].finish_reason,
        [run for piece in pieces for run in piece.weights_versions],
    )
