"""The text core: prompts in flight, from token ids to finished samples. No HTTP, no clock, no thread.

The HTTP server and the embedded engine both stand on it: they submit prompts, feed it what the manager
says, and take outputs::

    generations = Generations(config, tokenizer, send)
    generation = generations.submit(prompt_ids, params)
    while not generation.finished:
        generations.absorb(next_message_of_the_manager())
    outputs = generation.take_all()

It holds one entry for each request: made by ``start``, dropped when the last sample's final update has
come, or when nobody wants it any more.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import EngineOverloaded, RequestError, RequestTooLong, TokasaurusError
from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.protocol.messages import (
    Acknowledge,
    Adjustments,
    CacheFlushed,
    Eta,
    FinishReason,
    FlushCache,
    FromServer,
    GenerateRequest,
    LogprobsMode,
    PooledState,
    Pooling,
    PromptLogprobs,
    RequestRejected,
    Sampling,
    SequenceUpdates,
    Statistics,
    StopSequence,
    ToServer,
)
from tokasaurus.server.adjustments import adjustments_of, check_token_ids
from tokasaurus.server.grammar import FIELD, Grammars
from tokasaurus.server.params import SamplingParams
from tokasaurus.server.samples import Sample, SampleOutput, TokenLogprobs
from tokasaurus.server.stop_strings import StopStrings
from tokasaurus.server.text import TextStream
from tokasaurus.server.tokenizer import Tokenizer
from tokasaurus.server.turnstile import Turnstile

__all__ = ["Etas", "Generation", "Generations", "PreparedRequest", "Watcher"]

# The manager holds so many times the sequences that can run: as many again may be draining, and it must
# never lack others to choose from.
_WAITING_ROUNDS = 4
_RETRY_AFTER_S = 5.0  # where nothing is predicted
_RETRY_SHARE = 0.1  # of the backlog, after which there is surely room
_MAX_RETRY_AFTER_S = 60.0  # clients ignore longer ones

_FINISH_REASONS = {
    FinishReason.RUNNING: None,
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A prompt that can run, with everything decided that the client left open."""

    prompt_ids: Int32Array
    params: SamplingParams
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: StopStrings | None
    stop_token_ids: tuple[int, ...]
    client_key: str | None = None  # whose it is, where the client says; those get fair shares
    pooling: Pooling = (
        Pooling.NONE
    )  # otherwise its answer is a vector, and the token it draws nobody's
    grammar: str = ""  # "" if the text is free


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


class Generation:
    """One prompt in flight and its samples.

    With ``first_k``, the samples that end first *here* are the answer. The manager may see another order:
    it can end a sample by length while a stop string found in another one is on its way to it. Either
    way it counts up to ``first_k`` and aborts the rest, so each sample's last row does come. The
    generation waits for these rows, since their tokens count in the usage.

    Attributes:
        client: whose it is.
        eta_s: seconds until all samples will have ended, as the manager last predicted; None until it has.
        error: why there will be no more; None while all is well.
        pooled_state: [hidden] of the prompt, not normalised; None if not asked for, or not there yet.
        started_at, began_at: when it arrived and brought its first token; a watcher's.
    """

    def __init__(
        self,
        request_id: int,
        request: PreparedRequest,
        samples: list[Sample],
        on_change: Callable[[], None],
        client: str = "",
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.samples = samples
        self.client = client
        self.error: TokasaurusError | None = None
        self.eta_s: float | None = None
        self.pooled_state: Float32Array | None = None
        self.started_at = 0.0
        self.began_at: float | None = None
        self._on_change = on_change
        self._num_wanted = int(request.params.first_k or len(samples))  # ends that still count
        self._num_running = len(samples)  # samples that have not ended, as far as a client can see
        self._num_open = len(samples)  # samples that the manager has not reported the end of
        self._changed: dict[int, Sample] = {}
        self._prompt_logprobs = _PromptLogprobs.for_request(request)

    @property
    def finished(self) -> bool:
        """Whether everything is there, or nothing more will come."""
        return self.error is not None or (self._num_running == 0 and self._has_prompt_logprobs)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that need not be computed, because other prompts had begun with them."""
        return min(
            (
                sample.num_cached_tokens
                for sample in self.samples
                if sample.num_tokens or not sample.was_cancelled  # else it may never have run
            ),
            default=0,
        )

    @property
    def num_generated_tokens(self) -> int:
        """Of all samples, the cancelled ones too."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def prompt_logprobs(self) -> TokenLogprobs | None:
        """Of the prompt's tokens from the second on: the first has none. None if not asked for."""
        return None if self._prompt_logprobs is None else self._prompt_logprobs.values

    @property
    def prompt_ranks(self) -> Int32Array | None:
        """Of the same tokens: 1 is the likeliest, or as likely as that."""
        return None if self._prompt_logprobs is None else self._prompt_logprobs.ranks

    @property
    def _has_prompt_logprobs(self) -> bool:
        return self._prompt_logprobs is None or self._prompt_logprobs.complete

    def take_news(self) -> list[SampleOutput]:
        """For streams: what there is to show since the last call. Cancelled samples end with "abort"."""
        if not self._has_prompt_logprobs:
            return []
        changed, self._changed = self._changed, {}
        return [sample.take() for sample in changed.values() if sample.has_news]

    def take_all(self) -> list[SampleOutput]:
        """The output of every sample that was not cancelled, in order. Decodes, which may take a while."""
        return [sample.take() for sample in self.samples if not sample.was_cancelled]

    # --- for Generations only ----------------------------------------------------------------------

    def _extend(
        self, sample: Sample, token_ids: list[int], logprobs: TokenLogprobs | None, reason: int
    ) -> None:
        sample.extend(token_ids, logprobs, _FINISH_REASONS[FinishReason(reason)])
        self._changed[sample.index] = sample
        if sample.finish_reason is None:
            return
        self._num_running -= 1
        if self._num_wanted == 0:
            sample.cancel()
        elif not sample.was_cancelled:
            self._num_wanted -= 1

    def _close_one(self) -> bool:
        """The manager is done with one more sample; returns whether it is with all of them."""
        self._num_open -= 1
        return self._num_open == 0

    def _fail(self, error: TokasaurusError) -> None:
        self.error = error
        self._on_change()


class Generations:
    """The table of prompts in flight.

    Args:
        config: the server's slice.
        tokenizer: of the model.
        send: gives a message to the manager; must not block.
        watcher: of every prompt, for statistics.

    Attributes:
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
        self.tokenizer = tokenizer
        self.statistics: Statistics | None = None
        self._grammars = Grammars(lambda: tokenizer.vocabulary(config.eos_token_ids))
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

    def prepare(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        default_temperature: float = 1.0,
        client_key: str | None = None,
    ) -> PreparedRequest:
        """Decides what was left open, and checks that the prompt can run. Sends nothing yet.

        Args:
            prompt_ids: the prompt.
            params: how to continue it.
            default_temperature: where neither the parameters nor the generation config say.
            client_key: whose request it is.

        Raises:
            RequestError: it cannot run; names the field.
        """
        config = self.config
        prompt = _checked_prompt(prompt_ids, config.vocab_size)
        if params.n > config.max_n:
            raise RequestError(
                f"n must be at most {config.max_n}, not {params.n}: the engine was started with"
                f" max_n={config.max_n}",
                "n",
            )
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(params, name)
            if number is not None and number > config.max_topk_logprobs:
                raise RequestError(
                    f"{name} must be at most {config.max_topk_logprobs}, not {number}: the engine was"
                    f" started with max_topk_logprobs={config.max_topk_logprobs}",
                    name,
                )
        stops = StopStrings.compile(params.stop_strings, self.tokenizer.special_ids)
        check_token_ids(params, config.vocab_size)
        # Tokenizers may have special tokens that their models cannot draw.
        stop_token_ids = {i for i in (stops.token_ids if stops else ()) if i < config.vocab_size}
        stop_token_ids.update(params.stop_token_ids or ())
        late_ids = stop_token_ids.union(config.eos_token_ids)
        if not params.ignore_eos:
            stop_token_ids.update(config.eos_token_ids)
        max_tokens = _room(len(prompt), params.max_tokens, config.max_request_tokens)
        if params.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens must be at most {max_tokens}, the largest number of tokens that each sample"
                f" may have, not {params.min_tokens}",
                "min_tokens",
            )
        return PreparedRequest(
            prompt_ids=prompt,
            params=params,
            max_tokens=max_tokens,
            sampling=_sampling(
                params,
                config,
                default_temperature,
                adjustments_of(params, late_ids, self.tokenizer, config.vocab_size),
            ),
            seed=secrets.randbits(63) if params.seed is None else int(params.seed),
            stops=stops,
            stop_token_ids=tuple(sorted(stop_token_ids)),
            grammar=self._grammar(params),
            client_key=client_key,
        )

    def _grammar(self, params: SamplingParams) -> str:
        if params.structured_outputs is None:
            return ""
        if not self.config.eos_token_ids:
            raise RequestError(
                "structured_outputs needs a model with an end-of-sequence token; this one names none",
                FIELD,
            )
        return self._grammars.text(params.structured_outputs)

    def prepare_pooling(
        self,
        prompt_ids: Sequence[int],
        pooling: Pooling,
        *,
        priority: int = 0,
        client_key: str | None = None,
    ) -> PreparedRequest:
        """Checks that a prompt can be made into one vector. Sends nothing yet.

        Args:
            prompt_ids: the prompt, at least one token shorter than a request may be.
            pooling: how.
            priority: lower runs first.
            client_key: as in ``prepare``.

        Raises:
            RequestError: it cannot run; names the field.
        """
        limit = self.config.max_request_tokens - 1
        if len(prompt_ids) > limit:
            raise RequestTooLong(
                f"prompt has {len(prompt_ids)} tokens; it may have at most {limit}", "prompt"
            )
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, priority=priority)
        prepared = self.prepare(prompt_ids, params, client_key=client_key)
        return dataclasses.replace(prepared, pooling=pooling)

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
        tokenizer, stops, params = self.tokenizer, request.stops, request.params
        reads = stream or stops is not None  # the text, while it grows
        min_tokens, unseen = int(params.min_tokens), frozenset(params.stop_token_ids or ())
        samples = [
            Sample(
                index,
                tokenizer,
                TextStream(tokenizer, stops, min_tokens) if reads else None,
                unseen,
            )
            for index in range(params.n)
        ]
        generation = Generation(self._next_id, request, samples, on_change, client)
        self._next_id += 1
        if not self._table:
            self._backlog_eta_s = None  # was said of what has long ended
        self._table[generation.request_id] = generation
        if self._watcher is not None:
            self._watcher.started(generation)
        self._num_of_client[client] += 1
        self._turnstile.submit(
            client,
            GenerateRequest(
                request_id=generation.request_id,
                prompt_ids=request.prompt_ids,
                n=int(params.n),
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
                num_logprobs=_number(params.logprobs),
                num_prompt_logprobs=_number(params.prompt_logprobs),
                priority=int(params.priority),
                first_k=int(params.first_k or 0),
                stream=stream,
                hold_for_acks=stops is not None,
                pooling=request.pooling,
                grammar=request.grammar,
            ),
        )
        return generation

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Generation:
        """``prepare`` and ``start`` for a prompt whose samples are wanted at the end."""
        return self.start(self.prepare(prompt_ids, params))

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
            generation._fail(error)
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
            if generation is not None and generation._prompt_logprobs is not None:
                generation._prompt_logprobs.fill(message)
                generation._on_change()
        elif isinstance(message, PooledState):
            generation = self._table.get(message.request_id)
            if generation is not None:
                generation.pooled_state = (
                    message.state.copy()
                )  # it is a view of all that came with it
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
            generation._fail(RequestError(message.reason, message.field))
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
                generation._extend(sample, token_ids, logprobs, reason)
                changed[request_id] = generation
                if reason == FinishReason.RUNNING:
                    if sample.finish_reason is not None:
                        self._send(StopSequence(request_id, index))
                    elif generation.request.stops is not None:
                        acknowledged.append((request_id, index, sample.num_tokens))
            if reason != FinishReason.RUNNING and generation._close_one():
                del self._table[request_id]
                self._ended(generation, "finished")
        if acknowledged:
            self._acknowledge(acknowledged)
        for generation in changed.values():
            generation._on_change()

    def _acknowledge(self, rows: list[tuple[int, int, int]]) -> None:
        request_ids, sample_indices, num_tokens = zip(*rows, strict=True)
        self._send(
            Acknowledge(
                request_ids=np.array(request_ids, np.int64),
                sample_indices=np.array(sample_indices, np.int32),
                num_tokens=np.array(num_tokens, np.int32),
            )
        )


class _PromptLogprobs:
    """Logprobs of a prompt's tokens from the second on, put together from pieces that may come twice."""

    def __init__(self, num_tokens: int, num_top: int) -> None:
        self.values = TokenLogprobs(
            np.zeros(num_tokens, np.float32),
            np.zeros((num_tokens, num_top), np.int32),
            np.zeros((num_tokens, num_top), np.float32),
        )
        self.ranks: Int32Array = np.zeros(num_tokens, np.int32)
        self._missing = np.ones(num_tokens, np.bool_)

    @staticmethod
    def for_request(request: PreparedRequest) -> _PromptLogprobs | None:
        number = request.params.prompt_logprobs
        return None if number is None else _PromptLogprobs(len(request.prompt_ids) - 1, number)

    @property
    def complete(self) -> bool:
        return not self._missing.any()

    def fill(self, message: PromptLogprobs) -> None:
        start = message.first_position - 1
        here = slice(start, start + len(message.logprobs))
        self.values.logprobs[here] = message.logprobs
        self.ranks[here] = message.ranks
        self.values.top_ids[here] = message.top_ids
        self.values.top_logprobs[here] = message.top_logprobs
        self._missing[here] = False


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


def _checked_prompt(prompt_ids: Sequence[int], vocab_size: int) -> Int32Array:
    if len(prompt_ids) == 0:
        raise RequestError("prompt must hold at least one token", "prompt")
    ids = np.asarray(prompt_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError("prompt must hold token ids, which are whole numbers", "prompt")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(
            f"prompt must hold token ids from 0 to {vocab_size - 1}, not {low if low < 0 else high}",
            "prompt",
        )
    return ids.astype(np.int32)


def _room(num_prompt_tokens: int, max_tokens: int | None, limit: int) -> int:
    """How many tokens each sample may have."""
    room = limit - num_prompt_tokens
    if room < 1:
        raise RequestTooLong(
            f"prompt has {num_prompt_tokens} tokens; prompt and completion together may have"
            f" max_num_tokens_per_request={limit}",
            "prompt",
        )
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise RequestTooLong(
            f"max_tokens is {max_tokens}, and the prompt has {num_prompt_tokens} tokens; together they"
            f" may be max_num_tokens_per_request={limit}, so max_tokens can be at most {room}",
            "max_tokens",
        )
    return int(max_tokens)


def _sampling(
    params: SamplingParams,
    config: ServerConfig,
    default_temperature: float,
    adjustments: Adjustments | None,
) -> Sampling:
    top_k = int(_first(params.top_k, config.top_k, 0))
    mode = params.logprobs_mode
    return Sampling(
        temperature=float(_first(params.temperature, config.temperature, default_temperature)),
        top_k=top_k if 0 < top_k < config.vocab_size else 0,
        top_p=float(_first(params.top_p, config.top_p, 1.0)),
        min_p=float(_first(params.min_p, config.min_p, 0.0)),
        logprobs_mode=mode if isinstance(mode, LogprobsMode) else config.logprobs_mode,
        adjustments=adjustments,
    )


def _first(*choices: float | None) -> float:
    return next(choice for choice in choices if choice is not None)


def _number(num_logprobs: int | None) -> int:
    return -1 if num_logprobs is None else int(num_logprobs)
