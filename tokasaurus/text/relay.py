"""The server's side of several server processes: it looks like one manager to each HTTP process.

::

    HTTP process 1 ──┐                      ┌──▶ manager ──▶ worker
    HTTP process 2 ──┼──▶ server: table, ───┤
    HTTP process 3 ──┘    router, commands  └──▶ manager ──▶ worker

HTTP processes parse, tokenize, decode and write; that is nearly all of the work. The server has
what there must be one of: the turnstile with its fair shares, the limit of the queue, the router
over replicas, commands, versions of the weights, metrics. So none of these knows that there are
several processes.

A prompt of an HTTP process is in the server's table like its own, as a ``Generation`` that counts
tokens and makes no text. The manager's rows go to the process that started the request, which its
id names. Nothing is decoded for that: the rows of one process are cut out of the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from tokasaurus.errors import EngineOverloaded, RequestError, TokasaurusError
from tokasaurus.protocol.arrays import BoolArray
from tokasaurus.protocol.identity import WeightFile, WorkerIdentity
from tokasaurus.protocol.messages import (
    AbortRequest,
    FinishReason,
    FromServer,
    GenerateRequest,
    PooledState,
    PromptLogprobs,
    RequestRejected,
    RequestStage,
    SequenceUpdates,
    StopSequence,
    ToServer,
)
from tokasaurus.protocol.relaying import (
    AcquirePrefix,
    AnswerCounts,
    EngineNews,
    FromHTTP,
    ReleasePrefix,
    RequestFailed,
    Submit,
    ToHTTP,
    WeightsUpdate,
)
from tokasaurus.receipts.weights import stamped
from tokasaurus.text.cartridges import PrefixSource
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations
from tokasaurus.text.numbering import PROCESS_SHIFT, process_of
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.prefix_relay import PrefixRelay
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.samples import Sample, TokenLogprobs
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["Relay", "rows_of"]

_NUM_UPDATES = 3  # of the weights, that a process which starts anew is told of
_MANY = 0.5  # of max_queued_requests: from here on processes are told how many prompts there are


class Relay:
    """Between the table of prompts and the HTTP processes.

    Args:
        generations: the table.
        tokenizer: of the model.
        send: gives a message to the managers; must not block.
        count: notes that an HTTP process has answered: path, status, how often.
        prefixes: for requests with cartridges.
    """

    def __init__(
        self,
        generations: Generations,
        tokenizer: Tokenizer,
        send: Callable[[FromServer], None],
        count: Callable[[str, str, int], None],
        prefixes: PrefixSource,
    ) -> None:
        self._generations = generations
        self._prefixes = PrefixRelay(prefixes, self._send_to)
        self._tokenizer = tokenizer
        self._send = send
        self._count = count
        self._processes: dict[int, Callable[[ToHTTP], None]] = {}  # by number
        self._greeted: set[int] = set()
        self._workers: tuple[WorkerIdentity, ...] = ()
        self._updates: list[WeightsUpdate] = []  # the latest ones
        self._told = (0, 0)  # revision of versions, prompts

    @property
    def all_can_serve(self) -> bool:
        """Whether all processes have said that they can serve."""
        return self._greeted >= self._processes.keys()

    def open(self, number: int, send: Callable[[ToHTTP], None]) -> None:
        """There is an HTTP process, which can serve after this.

        Args:
            number: of the process.
            send: gives a message to it; must not block.
        """
        self._processes[number] = send
        send(self._news(workers=self._workers, updates=tuple(self._updates)))

    def close(self, number: int) -> int:
        """An HTTP process has ended: ends its requests, and returns their number."""
        del self._processes[number]
        self._greeted.discard(number)
        left = self._generations.started_by(number)
        for generation in left:
            self._generations.abort(generation)
        self._prefixes.close(number)
        return len(left)

    def _send_to(self, number: int, message: ToHTTP) -> None:
        send = self._processes.get(number)
        if send is not None:
            send(message)

    # --- from HTTP processes ----------------------------------------------------------------------

    def absorb(self, message: FromHTTP) -> None:
        """Takes a message of an HTTP process."""
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, AbortRequest):
            generation = self._generations.find(message.request_id)
            if generation is not None:
                self._generations.abort(generation)
        elif isinstance(message, StopSequence):
            self._stop(message)
        elif isinstance(message, AnswerCounts):
            self._greeted.add(message.number)
            for path, status, number in message.counts:
                self._count(path, status, number)
        elif isinstance(message, AcquirePrefix):
            self._prefixes.acquire(message)
        elif isinstance(message, ReleasePrefix):
            self._prefixes.release(message.ticket)
        else:
            self._send(message)

    def _submit(self, message: Submit) -> None:
        request, generations = message.request, self._generations
        send = self._processes.get(process_of(request.request_id))
        if send is None:  # it has ended
            return
        if message.needs_room:
            try:
                generations.check_room(request.client)
            except EngineOverloaded as error:
                send(_failure(request.request_id, error))
                return
        keeps_tokens = generations.replicas is not None
        relayed = _Relayed(request, message.names, self._tokenizer, send, keeps_tokens, generations)
        generations.enter(relayed, request)

    def _stop(self, message: StopSequence) -> None:
        """The sample has ended for its client."""
        generation = self._generations.find(message.request_id)
        if generation is None:
            return
        sample = generation.samples[message.sample_index]
        if sample.finish_reason is None:
            generation.extend(sample, [], None, FinishReason.STOP, sample.weights_version)
        self._send(message)

    # --- to HTTP processes ------------------------------------------------------------------------

    def pass_on(self, message: ToServer) -> None:
        """Passes on what concerns requests of HTTP processes."""
        if self._generations.commands.weights.revision != self._told[0]:
            self._tell()
        if isinstance(message, SequenceUpdates):
            self._pass_rows_on(message)
        elif isinstance(message, PromptLogprobs | PooledState | RequestStage):
            send = self._processes.get(process_of(message.request_id))
            if send is not None:
                send(message)

    def _pass_rows_on(self, message: SequenceUpdates) -> None:
        numbers = message.request_ids >> PROCESS_SHIFT
        found = np.unique(numbers)
        for number in found.tolist():
            send = self._processes.get(number)
            if send is not None:
                send(message if len(found) == 1 else rows_of(message, numbers == number))

    def adopt_workers(self, workers: Sequence[WorkerIdentity]) -> None:
        """The workers are these from now on."""
        self._workers = tuple(workers)
        self._tell(workers=self._workers)

    def note_update(self, version: int, files: Sequence[str]) -> None:
        """The engine is about to read weights of this version from these files, or from none."""
        found = [WeightFile(each.path, *each.stamp) for each in stamped(files)]
        update = WeightsUpdate(version, tuple(found))
        self._updates = [*self._updates[1 - _NUM_UPDATES :], update]
        self._tell(updates=(update,))

    def tell(self) -> None:
        """Says what has changed. To be called now and then."""
        num_prompts = self._crowd()[0]
        if (self._generations.commands.weights.revision, num_prompts) != self._told:
            self._tell()

    def _crowd(self) -> tuple[int, int]:
        """Prompts and clients, or zeros while there are few prompts."""
        num_prompts = len(self._generations)
        if num_prompts < _MANY * self._generations.config.max_queued_requests:
            return 0, 0
        return num_prompts, self._generations.num_clients

    def _tell(
        self,
        workers: tuple[WorkerIdentity, ...] | None = None,
        updates: tuple[WeightsUpdate, ...] = (),
    ) -> None:
        news = self._news(workers, updates)
        for send in self._processes.values():
            send(news)

    def _news(
        self,
        workers: tuple[WorkerIdentity, ...] | None,
        updates: tuple[WeightsUpdate, ...],
    ) -> EngineNews:
        weights = self._generations.commands.weights
        num_prompts, num_clients = self._crowd()
        self._told = weights.revision, num_prompts
        retry_after_s = self._generations.retry_after_s if num_prompts else 1
        return EngineNews(
            weights.version,
            weights.labels,
            workers,
            updates,
            num_prompts,
            num_clients,
            retry_after_s,
        )


class _Relayed(Generation):
    """A prompt of an HTTP process, which has its text."""

    def __init__(
        self,
        message: GenerateRequest,
        names: Sequence[str],
        tokenizer: Tokenizer,
        send: Callable[[ToHTTP], None],
        keeps_tokens: bool,
        generations: Generations,
    ) -> None:
        samples: list[Sample] = [
            _Counted(index, tokenizer, message.stream, keeps_tokens) for index in range(message.n)
        ]
        super().__init__(
            message.request_id,
            _prepared(message),
            tokenizer,
            stream=message.stream,
            on_change=_ignore,
            client=message.client,
            names=names,
            log_name=message.name,
            weights=generations.commands.weights,
            samples=samples,
        )
        self._send = send

    def note_unsent(self) -> None:
        num_samples = len(self.samples)
        zeros, no_ids = np.zeros(num_samples, np.int32), np.zeros(0, np.int32)
        no_logprobs = np.zeros(0, np.float32)
        self._send(
            SequenceUpdates(
                request_ids=np.full(num_samples, self.request_id, np.int64),
                sample_indices=np.arange(num_samples, dtype=np.int32),
                num_tokens=zeros,
                finish_reasons=np.full(num_samples, FinishReason.ABORT, np.int32),
                num_cached_tokens=zeros,
                num_logprobs=np.full(num_samples, -1, np.int32),
                weights_versions=zeros,
                token_ids=no_ids,
                logprobs=no_logprobs,
                top_ids=no_ids,
                top_logprobs=no_logprobs,
            )
        )

    def fail(self, error: TokasaurusError) -> None:
        super().fail(error)
        self._send(_failure(self.request_id, error))


class _Counted(Sample):
    """A sample of which only the number of tokens counts or, for a move, the tokens."""

    __slots__ = ("_keeps_tokens", "_streams")

    def __init__(self, index: int, tokenizer: Tokenizer, streams: bool, keeps_tokens: bool) -> None:
        super().__init__(index, tokenizer, None)
        self._streams, self._keeps_tokens = streams, keeps_tokens

    @property
    def reads(self) -> bool:
        return self._streams

    def extend(
        self,
        token_ids: list[int],
        logprobs: TokenLogprobs | None,
        finish_reason: str | None,
        weights_version: int = 0,
    ) -> None:
        self.finish_reason = finish_reason
        self.num_tokens += len(token_ids)
        if self._keeps_tokens:
            self.token_ids += token_ids


def _ignore() -> None:
    """Nothing here waits for news."""


def _prepared(message: GenerateRequest) -> PreparedRequest:
    """What the table must know of a prompt."""
    return PreparedRequest(
        prompt_ids=message.prompt_ids,
        params=_params(message.n, message.first_k, message.num_prompt_logprobs, message.priority),
        max_tokens=message.max_tokens,
        sampling=message.sampling,
        seed=message.seed,
        stops=None,  # its process looks for them, and acknowledges
        stop_token_ids=message.stop_token_ids,
        pooling=message.pooling,
    )


@functools.lru_cache(maxsize=256)
def _params(n: int, first_k: int, num_prompt_logprobs: int, priority: int) -> SamplingParams:
    """What counts here of the parameters; checking them takes longer than all the rest."""
    prompt_logprobs = None if num_prompt_logprobs < 0 else num_prompt_logprobs
    return SamplingParams(
        n=n, first_k=first_k or None, prompt_logprobs=prompt_logprobs, priority=priority
    )


def _failure(request_id: int, error: TokasaurusError) -> RequestRejected | RequestFailed:
    if isinstance(error, RequestError):
        return RequestRejected(request_id, error.message, error.field)
    retry_after_s = error.retry_after_s if isinstance(error, EngineOverloaded) else None
    return RequestFailed(request_id, str(error), retry_after_s)


def rows_of(message: SequenceUpdates, chosen: BoolArray) -> SequenceUpdates:
    """Some rows of an update.

    Args:
        message: with all rows.
        chosen: [rows] which ones.
    """
    counts, widths = message.num_tokens, message.num_logprobs
    num_logprobs = np.where(widths >= 0, counts, 0)
    of_logprobs = np.repeat(chosen, num_logprobs)
    of_top = np.repeat(chosen, num_logprobs * widths)
    return msgspec.structs.replace(
        message,
        request_ids=message.request_ids[chosen],
        sample_indices=message.sample_indices[chosen],
        num_tokens=counts[chosen],
        finish_reasons=message.finish_reasons[chosen],
        num_cached_tokens=message.num_cached_tokens[chosen],
        num_logprobs=widths[chosen],
        weights_versions=message.weights_versions[chosen],
        token_ids=message.token_ids[np.repeat(chosen, counts)],
        logprobs=message.logprobs[of_logprobs],
        top_ids=message.top_ids[of_top],
        top_logprobs=message.top_logprobs[of_top],
    )
