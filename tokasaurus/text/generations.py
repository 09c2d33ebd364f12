"""The text core: the table of prompts in flight, from prepared requests to finished samples.

It knows no HTTP, no clock and no thread. The HTTP server and the embedded engine both stand on it: they start
prompts, feed it what the manager says, and take outputs::

    preparer = Preparer(config, tokenizer)
    generations = Generations(config, tokenizer, send)
    generation = generations.start(preparer.prepare(prompt_ids, params))
    while not generation.finished:
        generations.absorb(next_message_of_the_manager())
    outputs = generation.take_all()

It holds one entry for each prompt: made by ``start``, dropped when the last sample's final update has
come, or when nobody wants it any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import EngineOverloaded, RequestError, TokasaurusError
from tokasaurus.protocol.messages import (
    Acknowledge,
    CacheFlushed,
    Eta,
    FinishReason,
    FlushCache,
    FromServer,
    PooledState,
    PromptLogprobs,
    RequestRejected,
    SequenceUpdates,
    Statistics,
    StopSequence,
    ToServer,
)
from tokasaurus.text.generation import Generation
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.samples import TokenLogprobs
from tokasaurus.text.tokenizer import Tokenizer
from tokasaurus.text.turnstile import Turnstile

__all__ = ["Etas", "Generations", "Watcher"]

# The manager holds so many times the sequences that can run: as many again may be draining, and it must
# never lack others to choose from.
_WAITING_ROUNDS = 4
_RETRY_AFTER_S = 5.0  # where nothing is predicted
_RETRY_SHARE = 0.1  # of the backlog, after which there is surely room
_MAX_RETRY_AFTER_S = 60.0  # clients ignore longer ones


@dataclass(frozen=True)
class Etas:
    """When what is in flight is predicted to end, in seconds after the manager last said."""

    requests: dict[int, float]  # by request id; those of which it has said anything
    backlog_s: float | None  # until everything has ended; None if it has not said


class Watcher(Protocol):
    """Is told of every prompt, and may write its times into the generation's attributes."""

    def started(self, generation: Generation) -> None: ...

    def began(self, generation: Generation) -> None:
        """Its first token has come; not called where tokens come only at the end."""

    def ended(self, generation: Generation, outcome: str) -> None:
        """It left the table: finished, aborted, refused (by the manager) or failed (with the engine)."""


class Generations:
    """The table of prompts in flight.

    Args:
        config: the server's slice.
        tokenizer: of the model.
        send: gives a message to the manager; must not block.
        watcher: of every prompt, for statistics.

    Attributes:
        config: as given.
        statistics: what the manager last said of itself; None until it has.
    """

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: Tokenizer,
        send: Callable[[FromServer], None],
        watcher: Watcher | None = None,
    ) -> None:
        self.config = config
        self.statistics: Statistics | None = None
        self._tokenizer = tokenizer
        self._send = send
        self._watcher = watcher
        self._turnstile = Turnstile(send, _WAITING_ROUNDS * config.max_seqs_per_forward)
        self._num_of_client: Counter[str] = Counter()  # prompts in flight
        self._table: dict[int, Generation] = {}
        self._next_id = 0
        self._flushes: dict[int, Callable[[CacheFlushed | TokasaurusError], None]] = {}
        self._backlog_eta_s: float | None = None

    def __len__(self) -> int:
        """How many prompts are in flight."""
        return len(self._table)

    def etas(self) -> Etas:
        """What the manager last predicted of all that is in flight."""
        etas = ((request_id, each.eta_s) for request_id, each in self._table.items())
        known = {request_id: eta_s for request_id, eta_s in etas if eta_s is not None}
        if not self._table:
            return Etas(known, 0.0)
        backlog_s, turnstile = self._backlog_eta_s, self._turnstile
        if backlog_s is not None and turnstile.num_open:
            # What the manager has not heard of will take as long, each, as what it has.
            backlog_s *= 1 + turnstile.num_held / turnstile.num_open
        return Etas(known, backlog_s)

    @property
    def num_held(self) -> int:
        """Sequences that the manager has not heard of, since it has enough for now."""
        return self._turnstile.num_held

    def check_room(self, client: str) -> None:
        """Whether one more request may come.

        When the queue is full, a client that has less than its share in flight still gets in, until there
        are twice as many prompts as there should be.

        Raises:
            EngineOverloaded: no; says when to come again.
        """
        limit, num_prompts = self.config.max_queued_requests, len(self._table)
        if num_prompts < limit:
            return
        counts = self._num_of_client
        num_clients = len(counts) + (client not in counts)
        if num_prompts < 2 * limit and counts[client] * num_clients < limit:
            return
        backlog_s = self.etas().backlog_s
        wait_s = _RETRY_AFTER_S if backlog_s is None else backlog_s * _RETRY_SHARE
        raise EngineOverloaded(
            f"{num_prompts} prompts are in flight, and max_queued_requests={limit}; try again later",
            round(min(max(wait_s, 1.0), _MAX_RETRY_AFTER_S)),
        )

    # --- towards the manager -----------------------------------------------------------------------

    def start(
        self,
        request: PreparedRequest,
        *,
        stream: bool = False,
        on_change: Callable[[], None] = lambda: None,
        client: str = "",
    ) -> Generation:
        """Sends a request to the manager, at once or when its turn comes.

        Args:
            request: as prepared.
            stream: there will be news before the end.
            on_change: called when there is news for a stream, and when the generation has finished.
            client: whose it is; clients get fair shares.
        """
        generation = Generation(
            self._next_id,
            request,
            self._tokenizer,
            stream=stream,
            on_change=on_change,
            client=client,
        )
        self._next_id += 1
        if not self._table:
            self._backlog_eta_s = None  # was said of what has long ended
        self._table[generation.request_id] = generation
        if self._watcher is not None:
            self._watcher.started(generation)
        self._num_of_client[client] += 1
        self._turnstile.submit(client, request.message(generation.request_id, stream=stream))
        return generation

    def abort(self, generation: Generation) -> None:
        """Nobody wants the generation any more. Harmless if it is over."""
        if self._table.pop(generation.request_id, None) is not None:
            self._turnstile.abort(generation.request_id)
            self._ended(generation, "aborted")

    def flush_cache(self, on_done: Callable[[CacheFlushed | TokasaurusError], None]) -> None:
        """Asks for the prefix cache to be emptied; calls back with what was dropped, or why nothing was."""
        flush_id = self._next_id
        self._next_id += 1
        self._flushes[flush_id] = on_done
        self._send(FlushCache(flush_id))

    def fail_all(self, error: TokasaurusError) -> None:
        """The engine is gone: every generation in flight ends with this error, and every flush."""
        generations, self._table = self._table, {}
        self._turnstile.clear()
        for generation in generations.values():
            generation.fail(error)
            self._ended(generation, "failed")
        flushes, self._flushes = self._flushes, {}
        for on_done in flushes.values():
            on_done(error)

    def _ended(self, generation: Generation, outcome: str) -> None:
        """Whatever ended it, and after it has left the table."""
        self._num_of_client[generation.client] -= 1
        if not self._num_of_client[generation.client]:
            del self._num_of_client[generation.client]
        num_tokens = generation.num_generated_tokens if outcome == "finished" else None
        self._turnstile.ended(generation.request_id, num_tokens)
        if self._watcher is not None:
            self._watcher.ended(generation, outcome)

    # --- from the manager --------------------------------------------------------------------------

    def absorb(self, message: ToServer) -> None:
        """Takes one message of the manager; may send some back.

        Whatever concerns a request that is not in the table any more is ignored: it was on its way
        when the request was aborted.
        """
        if isinstance(message, SequenceUpdates):
            self._absorb_updates(message)
        elif isinstance(message, PromptLogprobs):
            generation = self._table.get(message.request_id)
            if generation is not None:
                generation.fill_prompt_logprobs(message)
        elif isinstance(message, PooledState):
            generation = self._table.get(message.request_id)
            if generation is not None:
                # Copied, since it is a view of all that came with it.
                generation.pooled_state = message.state.copy()
        elif isinstance(message, Eta):
            self._absorb_etas(message)
        elif isinstance(message, CacheFlushed):
            self._flushes.pop(message.flush_id)(message)
        elif isinstance(message, Statistics):
            self.statistics = message
        else:
            self._absorb_rejection(message)

    def _absorb_etas(self, message: Eta) -> None:
        self._backlog_eta_s = message.backlog_seconds
        rows = zip(message.request_ids.tolist(), message.seconds.tolist(), strict=True)
        for request_id, seconds in rows:
            generation = self._table.get(request_id)
            if generation is not None:
                generation.eta_s = seconds

    def _absorb_rejection(self, message: RequestRejected) -> None:
        generation = self._table.pop(message.request_id, None)
        if generation is not None:
            generation.fail(RequestError(message.reason, message.field))
            self._ended(generation, "refused")

    def _absorb_updates(self, message: SequenceUpdates) -> None:
        acknowledged: list[tuple[int, int, int]] = []
        changed: dict[int, Generation] = {}
        for request_id, index, token_ids, logprobs, reason, num_cached in _rows(message):
            generation = self._table.get(request_id)
            if generation is None:
                continue
            sample = generation.samples[index]
            if sample.finish_reason is None:
                sample.num_cached_tokens = num_cached
                if generation.began_at is None and sample.reads and self._watcher is not None:
                    self._watcher.began(generation)
                generation.extend(sample, token_ids, logprobs, reason)
                changed[request_id] = generation
                if reason == FinishReason.RUNNING:
                    if sample.finish_reason is not None:
                        self._send(StopSequence(request_id, index))
                    elif generation.request.stops is not None:
                        acknowledged.append((request_id, index, sample.num_tokens))
            if reason != FinishReason.RUNNING and generation.close_one():
                del self._table[request_id]
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


def _rows(
    message: SequenceUpdates,
) -> Iterator[tuple[int, int, list[int], TokenLogprobs | None, int, int]]:
    """Each row: request id, sample index, token ids, logprobs, finish reason, cached tokens."""
    token_ids = message.token_ids.tolist()
    token = chosen = top = 0
    for request_id, index, count, reason, num_cached, num_top in zip(
        message.request_ids.tolist(),
        message.sample_indices.tolist(),
        message.num_tokens.tolist(),
        message.finish_reasons.tolist(),
        message.num_cached_tokens.tolist(),
        message.num_logprobs.tolist(),
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
        yield request_id, index, token_ids[token : token + count], logprobs, reason, num_cached
        token += count
