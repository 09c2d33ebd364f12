"""The text core: the table of prompts in flight, from prepared requests to finished samples.

It knows neither HTTP nor clocks nor threads. The HTTP server and the embedded engine both stand on
it: they start prompts, feed it the manager's messages, and take outputs::

    preparer = Preparer(config, tokenizer)
    generations = Generations(config, tokenizer, send)
    generation = generations.start(preparer.prepare(prompt_ids, params))
    while not generation.finished:
        generations.absorb(next_message_of_the_manager())
    outputs = generation.take_all()

It has one entry for each prompt. ``start`` makes the entry; it is dropped when the final update of
the last sample has come, or when the prompt is aborted.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError, TokasaurusError
from tokasaurus.observability.request_names import about, current_request
from tokasaurus.protocol.commands import (
    Action,
    CommandDone,
    CommandFailed,
    UpdateWeights,
    aborts_all,
)
from tokasaurus.protocol.messages import (
    Acknowledge,
    Eta,
    FinishReason,
    FromServer,
    GenerateRequest,
    PooledState,
    PromptLogprobs,
    RequestRejected,
    RequestStage,
    SequenceUpdates,
    Stage,
    Statistics,
    StopSequence,
    ToServer,
)
from tokasaurus.protocol.watching import Outlook, Watch
from tokasaurus.text.commands import Commands, OnDone
from tokasaurus.text.generation import Generation
from tokasaurus.text.numbering import process_of
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.queue_limit import check_queue
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.samples import TokenLogprobs
from tokasaurus.text.tokenizer import Tokenizer
from tokasaurus.text.turnstile import Turnstile

if TYPE_CHECKING:
    from tokasaurus.text.relay import Relay
    from tokasaurus.text.replicas import Replicas

__all__ = ["Etas", "Generations", "Watcher"]

log = logging.getLogger(__name__)

# The manager holds this many times the sequences that can run: as many again may be draining, and
# it must always have others to choose from.
_WAITING_ROUNDS = 4
_RETRY_AFTER_S = 5.0  # if nothing is predicted
_RETRY_SHARE = 0.1  # of the backlog; after this time there is surely room
_MAX_RETRY_AFTER_S = 60.0  # clients ignore longer ones


@dataclass(frozen=True)
class Etas:
    """The predicted ends of what is in flight, in seconds after the manager's last prediction.

    Attributes:
        requests: by request id, for requests with a prediction.
        backlog_s: until everything has ended; None if that is not predicted yet.
    """

    requests: dict[int, float]
    backlog_s: float | None


class Watcher(Protocol):
    """Observes every prompt, and may write times into the attributes of its generation."""

    def started(self, generation: Generation) -> None: ...

    def began(self, generation: Generation) -> None:
        """Its first token has come; not called if all tokens come at the end."""

    def predicted(self, generation: Generation, seconds: float) -> None:
        """Its end is predicted for the first time."""

    def ended(self, generation: Generation, outcome: str) -> None:
        """It left the table: finished, aborted, refused by the manager, failed with the engine."""


class Generations:
    """The table of prompts in flight.

    Args:
        config: the server's slice.
        tokenizer: of the model.
        send: gives a message to the manager; must not block.
        watcher: observes every prompt, for statistics.
        receipts: are told where new weights come from.
        replicas: the router that ``send`` leads to, if there is one.
        first_id: of the request ids, which count up from it.

    Attributes:
        config: as given.
        replicas: as given.
        relay: to the HTTP processes, if there are any.
        commands: to the engine, and what they have made of it.
        stalled: the processes that have work and make no progress; their owner says so.
        is_stuck: as long as these make no progress, no request can.
    """

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: Tokenizer,
        send: Callable[[FromServer], None],
        watcher: Watcher | None = None,
        receipts: Receipts | None = None,
        replicas: Replicas | None = None,
        first_id: int = 0,
    ) -> None:
        self.config = config
        self.replicas = replicas
        self.relay: Relay | None = None
        self._receipts = receipts
        self.commands = Commands(send)
        self._statistics: Statistics | None = None
        self._outlook: Outlook | None = None
        self.stalled: tuple[str, ...] = ()
        self.is_stuck = False
        self._tokenizer = tokenizer
        self._send = send
        self._watcher = watcher
        self._turnstile = Turnstile(send, _WAITING_ROUNDS * config.max_seqs_per_forward)
        self._num_of_client: Counter[str] = Counter()  # prompts in flight, and expected ones
        self._num_expected = 0
        self._table: dict[int, Generation] = {}
        self._next_id = first_id
        self._backlog_eta_s: float | None = None

    def __len__(self) -> int:
        """The number of prompts in flight."""
        return len(self._table)

    def etas(self) -> Etas:
        """The manager's last predictions for everything in flight."""
        etas = ((request_id, each.eta_s) for request_id, each in self._table.items())
        known = {request_id: eta_s for request_id, eta_s in etas if eta_s is not None}
        return Etas(known, self.backlog_s)

    @property
    def backlog_s(self) -> float | None:
        """That of ``etas``, without a look at each prompt."""
        if not self._table:
            return 0.0
        backlog_s, turnstile = self._backlog_eta_s, self._turnstile
        if backlog_s is not None and turnstile.num_open:
            # A sequence that the manager has not heard of takes as long as one that it has.
            backlog_s *= 1 + turnstile.num_held / turnstile.num_open
        return backlog_s

    @property
    def statistics(self) -> Statistics | None:
        """The engine's latest figures; None before the first."""
        return self._statistics if self.replicas is None else self.replicas.statistics

    def watch(self, seconds: float) -> None:
        """The forecast is watched for this time, so the managers send it."""
        self._send(Watch(seconds))

    def outlooks(self) -> dict[int, Outlook]:
        """The latest forecast of each replica; none before ``watch``."""
        if self.replicas is not None:
            return self.replicas.outlooks()
        return {} if self._outlook is None else {0: self._outlook}

    def in_flight(self) -> Iterator[Generation]:
        """The prompts in flight, the oldest first."""
        return iter(self._table.values())

    def find(self, request_id: int) -> Generation | None:
        """A prompt in flight; None if there is none with this id."""
        return self._table.get(request_id)

    def set_num_seats(self, num_seats: int, num_stuck: int = 0) -> None:
        """From now on, the engine runs at most this many sequences at once.

        Args:
            num_seats: the sequences that can run.
            num_stuck: those that the manager holds beside them, and that do not go on.
        """
        self._turnstile.resize(_WAITING_ROUNDS * num_seats + num_stuck)

    @property
    def await_manager(self) -> bool:
        """Whether the manager has something that it must answer sooner or later."""
        return self._turnstile.num_open > 0 or self.commands.num_unanswered > 0

    @property
    def num_clients(self) -> int:
        """The clients with prompts in flight."""
        return len(self._num_of_client)

    @property
    def retry_after_s(self) -> int:
        """When to come again after a refusal for lack of room, in seconds."""
        backlog_s = self.etas().backlog_s
        wait_s = _RETRY_AFTER_S if backlog_s is None else backlog_s * _RETRY_SHARE
        return round(min(max(wait_s, 1.0), _MAX_RETRY_AFTER_S))

    def num_of(self, client: str) -> int:
        """The prompts of a client in flight."""
        return self._num_of_client.get(client, 0)

    @property
    def num_held(self) -> int:
        """Sequences held back from the manager, which has enough for now."""
        return self._turnstile.num_held

    @contextlib.contextmanager
    def expecting(self, client: str) -> Iterator[None]:
        """Surrounds the wait for what a prompt needs before it starts: it counts as in flight."""
        self._num_expected += 1
        self._num_of_client[client] += 1
        try:
            yield
        finally:
            self._num_expected -= 1
            self._forget_one(client)

    def check_room(self, client: str) -> None:
        """Checks that there is room for one more request.

        When the queue is full, a client with less than its share in flight still gets in, until
        there are twice as many prompts as the queue should hold.

        Raises:
            EngineOverloaded: there is no room; says when to come again.
        """
        others = 1 - (client in self._num_of_client)
        check_queue(
            self.config.max_queued_requests,
            num_prompts=len(self._table) + self._num_expected,
            num_clients=self.num_clients + others,
            num_of_client=self.num_of(client),
            retry_after_s=lambda: self.retry_after_s,
        )

    # --- towards the manager ----------------------------------------------------------------------

    def start(
        self,
        request: PreparedRequest,
        *,
        stream: bool = False,
        on_change: Callable[[], None] = lambda: None,
        client: str = "",
        names: Sequence[str] = (),
        on_stage: Callable[[Stage], None] | None = None,
    ) -> Generation:
        """Sends a request to the manager, at once or when the turnstile lets it pass.

        Args:
            request: as prepared.
            stream: news comes before the end.
            on_change: called when there is news for a stream, and when the generation has finished.
            client: whose share of the engine it takes; clients get fair shares.
            names: by which the client may end it; see ``named``.
            on_stage: called when the engine has reached a stage with it.
        """
        log_name = current_request()
        generation = Generation(
            self._next_id,
            request,
            self._tokenizer,
            stream=stream,
            on_change=on_change,
            client=client,
            names=names,
            log_name=log_name,
            on_stage=on_stage,
            weights=self.commands.weights,
        )
        self._next_id += 1
        message = request.message(
            generation.request_id,
            stream=stream,
            client=client,
            name=log_name,
            report_stages=on_stage is not None,
        )
        self.enter(generation, message)
        return generation

    def enter(self, generation: Generation, message: GenerateRequest) -> None:
        """Puts a generation into the table, and sends its message now or later."""
        if not self._table:
            self._backlog_eta_s = None  # it was for prompts that have ended long ago
        self._table[generation.request_id] = generation
        log.debug(
            "prompt %d starts: %d tokens, n=%d, max_tokens=%d",
            generation.request_id,
            len(message.prompt_ids),
            message.n,
            message.max_tokens,
            extra=about(generation.log_name),
        )
        if self._watcher is not None:
            self._watcher.started(generation)
        self._num_of_client[generation.client] += 1
        self._turnstile.submit(message)

    def named(self, name: str) -> list[Generation]:
        """The generations in flight that have this name."""
        return [each for each in self._table.values() if name in each.names]

    def started_by(self, process: int) -> list[Generation]:
        """The generations in flight that a process with this number has started."""
        return [each for each in self._table.values() if process_of(each.request_id) == process]

    def abort(self, generation: Generation) -> None:
        """Ends a generation that no client waits for. Harmless if it has ended already."""
        if self._table.pop(generation.request_id, None) is not None:
            self._turnstile.abort(generation.request_id)
            self._ended(generation, "aborted")

    def cut_short(self, generation: Generation) -> None:
        """Ends a generation; its client gets the tokens so far, and "abort" as the reason.

        Harmless if it has ended already.
        """
        if generation.request_id in self._table and self._turnstile.abort(generation.request_id):
            self._end_unsent(generation)

    def command(self, action: Action, on_done: OnDone) -> None:
        """Gives the engine a command; calls back with what it did, or with an error.

        A command that aborts all sequences ends those that the turnstile holds, too.
        """
        if aborts_all(action):
            on_done = _with_more_sequences(self._turnstile.num_held, on_done)
            for request_id in self._turnstile.take_held():
                self._end_unsent(self._table[request_id])
        self.commands.submit(action, on_done)

    def update_weights(
        self,
        files: Sequence[str],
        on_done: OnDone,
        *,
        checksums: Sequence[str] = (),
        label: str | None = None,
        are_received: bool = False,
    ) -> None:
        """Replaces the weights of the model by the next version.

        Args:
            files: safetensors files, which together have every tensor.
            on_done: as for ``command``.
            checksums: the SHA-256 of each file, in hexadecimal; () does not check.
            label: of the new version; None is its number.
            are_received: in the place of files, the tensors that ReceiveWeights has brought.
        """
        version = self.commands.weights.reserve(label)
        if self._receipts is not None:
            self._receipts.note_update(version, files)
        if self.relay is not None:
            self.relay.note_update(version, files)
        action = UpdateWeights(version, tuple(files), tuple(checksums), are_received)
        self.command(action, on_done)

    def fail(self, request_id: int, error: TokasaurusError) -> None:
        """Ends a generation with an error. Harmless if it has ended already."""
        generation = self._table.pop(request_id, None)
        if generation is not None:
            generation.fail(error)
            self._ended(generation, "failed")

    def fail_all(self, error: TokasaurusError) -> None:
        """The engine is gone: ends every generation and every command with this error."""
        generations, self._table = self._table, {}
        self._turnstile.clear()
        for generation in generations.values():
            generation.fail(error)
            self._ended(generation, "failed")
        self.commands.fail_all(error)

    def _end_unsent(self, generation: Generation) -> None:
        """Ends a generation that the turnstile has dropped before the manager heard of it."""
        del self._table[generation.request_id]
        for sample in generation.samples:
            generation.extend(sample, [], None, FinishReason.ABORT, 0)
            generation.close_one()
        self._ended(generation, "aborted")
        generation.note_unsent()

    def _ended(self, generation: Generation, outcome: str) -> None:
        """Updates the counts after a generation has left the table, for any reason."""
        self._forget_one(generation.client)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "prompt %d is %s: %d tokens generated",
                generation.request_id,
                outcome,
                generation.num_generated_tokens,
                extra=about(generation.log_name),
            )
        num_tokens = generation.num_generated_tokens if outcome == "finished" else None
        self._turnstile.ended(generation.request_id, num_tokens)
        if self._watcher is not None:
            self._watcher.ended(generation, outcome)

    def _forget_one(self, client: str) -> None:
        self._num_of_client[client] -= 1
        if not self._num_of_client[client]:
            del self._num_of_client[client]

    # --- from the manager -------------------------------------------------------------------------

    def absorb(self, message: ToServer) -> None:
        """Takes one message of the manager; may send messages back.

        A message about a request that is not in the table any more is ignored: the manager sent it
        before it heard that the request was aborted.
        """
        if self.relay is not None:
            self.relay.pass_on(message)
        if isinstance(message, SequenceUpdates):
            self._absorb_updates(message)
        elif isinstance(message, PromptLogprobs):
            generation = self._table.get(message.request_id)
            if generation is not None:
                generation.fill_prompt_logprobs(message)
        elif isinstance(message, PooledState):
            generation = self._table.get(message.request_id)
            if generation is not None:
                # Copied, since the array is a view of the whole message.
                generation.pooled_state = message.state.copy()
        elif isinstance(message, RequestStage):
            generation = self._table.get(message.request_id)
            if generation is not None and generation.on_stage is not None:
                generation.on_stage(message.stage)
        elif isinstance(message, Eta):
            self._absorb_etas(message)
        elif isinstance(message, CommandDone | CommandFailed):
            self.commands.absorb(message)
        elif isinstance(message, Statistics):
            self._statistics = message
        elif isinstance(message, Outlook):
            self._outlook = message
        else:
            self._absorb_rejection(message)

    def _absorb_etas(self, message: Eta) -> None:
        self._backlog_eta_s = message.backlog_seconds
        rows = zip(message.request_ids.tolist(), message.seconds.tolist(), strict=True)
        for request_id, seconds in rows:
            generation = self._table.get(request_id)
            if generation is None:
                continue
            if generation.eta_s is None and self._watcher is not None:
                self._watcher.predicted(generation, seconds)
            generation.eta_s = seconds

    def _absorb_rejection(self, message: RequestRejected) -> None:
        generation = self._table.pop(message.request_id, None)
        if generation is not None:
            generation.fail(RequestError(message.reason, message.field))
            self._ended(generation, "refused")

    def _absorb_updates(self, message: SequenceUpdates) -> None:
        """Takes the rows in order; a sequence may have several, of which the last may be final."""
        acknowledged: list[tuple[int, int, int]] = []
        changed: dict[int, Generation] = {}
        for request_id, index, token_ids, logprobs, reason, num_cached, version in _rows(message):
            generation = self._table.get(request_id)
            if generation is None:
                continue
            sample = generation.samples[index]
            if sample.finish_reason is None:
                sample.num_cached_tokens = num_cached
                if generation.began_at is None and sample.reads and self._watcher is not None:
                    self._watcher.began(generation)
                generation.extend(sample, token_ids, logprobs, reason, version)
                changed[request_id] = generation
                if reason == FinishReason.RUNNING:
                    if sample.finish_reason is not None:
                        self._send(StopSequence(request_id, index))
                    elif generation.request.stops is not None:
                        acknowledged.append((request_id, index, sample.num_tokens))
            if reason != FinishReason.RUNNING and generation.close_one():
                del self._table[request_id]
                if generation.was_aborted:
                    self._ended(generation, "aborted")
                    changed[request_id] = generation  # it may have an error now
                else:
                    self._ended(generation, "finished")
        if acknowledged:
            self._acknowledge(acknowledged)
        for generation in changed.values():
            generation.on_change()

    def _acknowledge(self, rows: list[tuple[int, int, int]]) -> None:
        request_ids, sample_indices, num_tokens = zip(*rows, strict=True)
        self._send(
            Acknowledge(
                request_ids=np.array(request_ids, np.int64),
                sample_indices=np.array(sample_indices, np.int32),
                num_tokens=np.array(num_tokens, np.int32),
            )
        )


def _with_more_sequences(number: int, on_done: OnDone) -> OnDone:
    """Adds sequences to those that a command has aborted."""

    def done(result: CommandDone | TokasaurusError) -> None:
        if isinstance(result, CommandDone):
            total = result.num_sequences + number
            result = msgspec.structs.replace(result, num_sequences=total)
        on_done(result)

    return done


def _rows(
    message: SequenceUpdates,
) -> Iterator[tuple[int, int, list[int], TokenLogprobs | None, int, int, int]]:
    """Each row: request, sample, token ids, logprobs, finish reason, cached tokens, version."""
    token_ids = message.token_ids.tolist()
    token = chosen = top = 0
    for request_id, index, count, reason, num_cached, num_top, version in zip(
        message.request_ids.tolist(),
        message.sample_indices.tolist(),
        message.num_tokens.tolist(),
        message.finish_reasons.tolist(),
        message.num_cached_tokens.tolist(),
        message.num_logprobs.tolist(),
        message.weights_versions.tolist(),
        strict=True,
    ):
        logprobs = None
        if num_top >= 0:
            top_end = top + count * num_top
            logprobs = TokenLogprobs(
                message.logprobs[chosen : chosen + count],
                message.top_ids[top:top_end].reshape(count, num_top),
                message.top_logprobs[top:top_end].reshape(count, num_top),
            )
            chosen, top = chosen + count, top_end
        ids = token_ids[token : token + count]
        yield request_id, index, ids, logprobs, reason, num_cached, version
        token += count
