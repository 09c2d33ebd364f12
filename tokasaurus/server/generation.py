"""The text core: requests in flight, from token ids to finished answers. No HTTP, no clock, no thread.

The HTTP server and the embedded engine both stand on it: they submit prompts, feed it what the manager
says, and read samples. It holds one entry for each request, made by ``submit`` and dropped when the
last sample's final update has come, so an empty table means that the manager has nothing of ours.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError, RequestTooLong, TokasaurusError
from tokasaurus.protocol.arrays import Float32Array, Int32Array
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FinishReason,
    FromServer,
    GenerateRequest,
    PromptLogprobs,
    RequestRejected,
    Sampling,
    SequenceUpdates,
    StopSequence,
    ToServer,
)
from tokasaurus.server.params import SamplingParams
from tokasaurus.server.stop_strings import StopStringSearch
from tokasaurus.server.tokenizer import IncrementalDetokenizer, Tokenizer

__all__ = ["Delta", "Generation", "Generations", "Sample", "TokenLogprobs"]

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}


@dataclass
class TokenLogprobs:
    """Logprobs of consecutive tokens, natural logarithms. k is the number of alternatives asked for."""

    logprobs: Float32Array  # [tokens]
    top_ids: Int32Array  # [tokens, k], best first
    top_logprobs: Float32Array  # [tokens, k]

    @classmethod
    def empty(cls, num_top: int) -> TokenLogprobs:
        floats = np.zeros((0, num_top), np.float32)
        return cls(np.zeros(0, np.float32), np.zeros((0, num_top), np.int32), floats)

    def __getitem__(self, tokens: slice) -> TokenLogprobs:
        return TokenLogprobs(self.logprobs[tokens], self.top_ids[tokens], self.top_logprobs[tokens])

    @classmethod
    def join(cls, pieces: Sequence[TokenLogprobs]) -> TokenLogprobs:
        return cls(
            np.concatenate([piece.logprobs for piece in pieces]),
            np.concatenate([piece.top_ids for piece in pieces]),
            np.concatenate([piece.top_logprobs for piece in pieces]),
        )


@dataclass(frozen=True)
class Delta:
    """News of one sample of a stream."""

    sample_index: int
    text: str
    token_ids: list[int]
    logprobs: TokenLogprobs | None
    finish_reason: str | None


class Sample:
    """One sample: what was generated and, where text is needed on the way, the text so far."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None  # "stop", "length", "abort"; None while running
        self.stop_string: str | None = None  # the one that ended it
        self.num_cached_tokens = 0
        self._logprobs: list[TokenLogprobs] = []
        self._pieces: list[str] | None = None
        self._detokenizer: IncrementalDetokenizer | None = None
        self._search: StopStringSearch | None = None

    def watch_text(self, detokenizer: IncrementalDetokenizer, stops: Sequence[str]) -> None:
        self._pieces, self._detokenizer = [], detokenizer
        self._search = StopStringSearch(stops)

    @property
    def logprobs(self) -> TokenLogprobs | None:
        """Logprobs of ``token_ids``; None if none were asked for."""
        if len(self._logprobs) > 1:
            self._logprobs = [TokenLogprobs.join(self._logprobs)]
        return self._logprobs[0] if self._logprobs else None

    def text(self, tokenizer: Tokenizer, stop_token_ids: frozenset[int]) -> str:
        """The sample's text. Decodes everything if nothing was decoded on the way: may take a while."""
        if self._pieces is not None:
            return "".join(self._pieces)
        return tokenizer.decode(self._visible(self.token_ids, stop_token_ids))

    def _visible(self, ids: list[int], stop_token_ids: frozenset[int]) -> list[int]:
        ended_by_id = self.finish_reason == "stop" and ids and ids[-1] in stop_token_ids
        return ids[:-1] if ended_by_id else ids

    def extend(
        self,
        ids: list[int],
        logprobs: TokenLogprobs | None,
        finish_reason: str | None,
        stop_token_ids: frozenset[int],
    ) -> Delta:
        """Appends tokens, up to a stop string if one completes in them, and ends if told to."""
        self.finish_reason = finish_reason
        text = ""
        if self._detokenizer is not None:
            num_taken, text = self._decode(ids, stop_token_ids)
            ids = ids[:num_taken]
            logprobs = None if logprobs is None else logprobs[:num_taken]
        self.token_ids.extend(ids)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        return Delta(self.index, text, ids, logprobs, self.finish_reason)

    def _decode(self, ids: list[int], stop_token_ids: frozenset[int]) -> tuple[int, str]:
        assert self._detokenizer is not None
        assert self._search is not None
        assert self._pieces is not None
        visible = self._visible(ids, stop_token_ids)
        begin = len(self._pieces)
        num_taken = len(ids)
        for position, token_id in enumerate(visible):
            self._pieces.append(self._search.feed(self._detokenizer.feed(token_id)))
            if self._search.found is not None:
                num_taken = position + 1
                break
        if self._search.found is None and self.finish_reason is not None:
            self._pieces.append(self._search.feed(self._detokenizer.finish()))
        if self._search.found is not None:
            self.finish_reason, self.stop_string = "stop", self._search.found
        elif self.finish_reason is not None:
            self._pieces.append(self._search.finish())
        return num_taken, "".join(self._pieces[begin:])


@dataclass(eq=False)
class Generation:
    """One prompt on its way: its samples, and who wants to hear of them."""

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    samples: list[Sample]
    stop_token_ids: frozenset[int]
    stream: bool
    on_change: Callable[[], None]
    deltas: deque[Delta] = field(default_factory=deque)
    error: TokasaurusError | None = None
    num_running: int = 0  # samples without a verdict
    num_open: int = 0  # samples whose final update has not come
    _prompt_pieces: dict[int, TokenLogprobs] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.num_running == 0 or self.error is not None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were already there, when its first sample started."""
        return self.samples[0].num_cached_tokens

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def prompt_logprobs(self) -> TokenLogprobs | None:
        """Of prompt tokens 1, 2, ...: the first token has none. None if none were asked for."""
        if self.params.prompt_logprobs is None:
            return None
        pieces = [self._prompt_pieces[start] for start in sorted(self._prompt_pieces)]
        if not pieces:
            return TokenLogprobs.empty(self.params.prompt_logprobs)
        return TokenLogprobs.join(pieces)

    def add_prompt_piece(self, message: PromptLogprobs) -> None:
        piece = TokenLogprobs(message.logprobs, message.top_ids, message.top_logprobs)
        end = message.first_position + len(piece.logprobs)
        # After a preemption the prompt is computed again, perhaps in other pieces.
        for start in [s for s in self._prompt_pieces if message.first_position < s < end]:
            del self._prompt_pieces[start]
        self._prompt_pieces[message.first_position] = piece


class Generations:
    """The table of requests in flight.

    Args:
        config: the server's slice.
        tokenizer: of the model.
        send: gives a message to the manager; must not block.
    """

    def __init__(
        self, config: ServerConfig, tokenizer: Tokenizer, send: Callable[[FromServer], None]
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._send = send
        self._table: dict[int, Generation] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._table)

    # --- requests ----------------------------------------------------------------------------------

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Whether this prompt can run.

        Returns:
            How many tokens may be generated.

        Raises:
            RequestError: names the field.
        """
        config = self.config
        if not prompt_ids:
            raise RequestError("prompt is empty: it needs at least one token", "prompt")
        if min(prompt_ids) < 0 or max(prompt_ids) >= config.vocab_size:
            wrong = next(i for i in prompt_ids if not 0 <= i < config.vocab_size)
            raise RequestError(
                f"prompt holds token id {wrong}, outside the vocabulary of {config.vocab_size}",
                "prompt",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > config.max_topk_logprobs:
                raise RequestError(
                    f"{name} is {value}, but this engine computes at most "
                    f"{config.max_topk_logprobs}; start it with a larger max_topk_logprobs",
                    name,
                )
        room = config.max_request_tokens - len(prompt_ids)
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if wanted > room:
            limit = f"the limit of {config.max_request_tokens} tokens for a request"
            raise RequestTooLong(
                f"prompt ({len(prompt_ids)} tokens) and max_tokens ({wanted}) exceed {limit}",
                "prompt" if room < 1 else "max_tokens",
            )
        return room if params.max_tokens is None else params.max_tokens

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = False,
        on_change: Callable[[], None] = lambda: None,
    ) -> Generation:
        """Sends a request to the manager.

        Args:
            prompt_ids: the prompt.
            params: how to continue it.
            stream: fill ``deltas`` as tokens come.
            on_change: called when there are new deltas, and when the generation has finished.

        Raises:
            RequestError: the request is wrong; nothing was sent.
        """
        max_tokens = self.check(prompt_ids, params)
        stops = params.stop_strings
        # A special token never shows in the text, so a stop string that reads like one is its id.
        special = [self.tokenizer.special_id(stop) for stop in stops]
        stop_ids = {token_id for token_id in special if token_id is not None}
        if not params.ignore_eos:
            stop_ids.update(self.config.eos_token_ids)
        text_stops = [stop for stop, sid in zip(stops, special, strict=True) if sid is None]
        seed = secrets.randbits(63) if params.seed is None else params.seed % 2**63
        generation = Generation(
            request_id=self._next_id,
            prompt_ids=list(prompt_ids),
            params=params,
            max_tokens=max_tokens,
            seed=seed,
            samples=[Sample(index) for index in range(params.n)],
            stop_token_ids=frozenset(stop_ids),
            stream=stream,
            on_change=on_change,
            num_running=params.n,
            num_open=params.n,
        )
        if stream or text_stops:
            for sample in generation.samples:
                sample.watch_text(self.tokenizer.detokenizer(), text_stops)
        self._next_id += 1
        self._table[generation.request_id] = generation
        self._send(self._message(generation, hold_for_acks=bool(text_stops)))
        return generation

    def _message(self, generation: Generation, *, hold_for_acks: bool) -> GenerateRequest:
        params = generation.params
        mode = params.logprobs_mode
        return GenerateRequest(
            request_id=generation.request_id,
            prompt_ids=np.asarray(generation.prompt_ids, np.int32),
            n=params.n,
            max_tokens=generation.max_tokens,
            sampling=Sampling(
                temperature=float(params.temperature),
                top_k=max(params.top_k, 0),
                top_p=float(params.top_p),
                min_p=float(params.min_p),
                logprobs_mode=self.config.logprobs_mode if mode is None else mode,
            ),
            seed=generation.seed,
            stop_token_ids=tuple(sorted(generation.stop_token_ids)),
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
            num_prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
            stream=generation.stream,
            hold_for_acks=hold_for_acks,
        )

    def abort(self, generation: Generation) -> None:
        """The caller lost interest: ends what still runs. Harmless if nothing does."""
        if generation.request_id in self._table and generation.num_open > 0:
            generation.on_change = lambda: None
            self._send(AbortRequest(generation.request_id))

    def fail_all(self, error: TokasaurusError) -> None:
        """The engine is gone: every generation in flight ends with this error."""
        generations, self._table = list(self._table.values()), {}
        for generation in generations:
            generation.error = error
            generation.on_change()

    # --- answers -----------------------------------------------------------------------------------

    def absorb(self, message: ToServer) -> None:
        """Takes one message of the manager; may send acknowledgements and stops."""
        if isinstance(message, SequenceUpdates):
            self._absorb_updates(message)
        elif isinstance(message, PromptLogprobs):
            if (generation := self._table.get(message.request_id)) is not None:
                generation.add_prompt_piece(message)
        elif isinstance(message, RequestRejected) and message.request_id in self._table:
            generation = self._table.pop(message.request_id)
            generation.error = RequestError(message.reason, message.field)
            generation.on_change()

    def _absorb_updates(self, message: SequenceUpdates) -> None:
        acks: list[tuple[int, int, int]] = []
        changed: dict[int, Generation] = {}
        for request_id, index, ids, logprobs, finish, cached in _rows(message):
            generation = self._table.get(request_id)
            if generation is None:
                continue
            sample = generation.samples[index]
            sample.num_cached_tokens = cached
            final = finish != FinishReason.RUNNING
            if sample.finish_reason is None:
                reason = _FINISH[finish] if final else None
                delta = sample.extend(ids, logprobs, reason, generation.stop_token_ids)
                if generation.stream and (delta.text or delta.token_ids or delta.finish_reason):
                    generation.deltas.append(delta)
                    changed[request_id] = generation
                if sample.finish_reason is not None:
                    generation.num_running -= 1
                    changed[request_id] = generation
                    if not final:
                        self._send(StopSequence(request_id, index))
                else:
                    acks.append((request_id, index, len(sample.token_ids)))
            if final:
                self._close(generation)
        if acks:
            ids64, indices, counts = zip(*acks, strict=True)
            self._send(
                Acknowledge(
                    np.array(ids64, np.int64),
                    np.array(indices, np.int32),
                    np.array(counts, np.int32),
                )
            )
        for generation in changed.values():
            if generation.stream or generation.finished:
                generation.on_change()

    def _close(self, generation: Generation) -> None:
        generation.num_open -= 1
        if generation.num_open == 0:
            del self._table[generation.request_id]


def _rows(
    message: SequenceUpdates,
) -> Iterable[tuple[int, int, list[int], TokenLogprobs | None, FinishReason, int]]:
    """The rows of a columnar update, one by one."""
    token_ids = message.token_ids.tolist()
    token = chosen = top = 0
    for request_id, index, count, finish, cached, num_top in zip(
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
            shape, width = (count, num_top), count * num_top
            logprobs = TokenLogprobs(
                message.logprobs[chosen : chosen + count],
                message.top_ids[top : top + width].reshape(shape),
                message.top_logprobs[top : top + width].reshape(shape),
            )
            chosen, top = chosen + count, top + width
        ids = token_ids[token : token + count]
        token += count
        yield request_id, index, ids, logprobs, FinishReason(finish), cached
