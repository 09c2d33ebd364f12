"""Prompts before they run: refuses what cannot run, and decides what the client left out.

Nothing here knows what is in flight. Everything may be called from any thread, since compiling a
grammar or tokenizing bad words takes a while.
"""

from __future__ import annotations

import copy
import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError, RequestTooLong
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    SAMPLING_NUMBERS,
    Adjustments,
    GenerateRequest,
    LogprobsMode,
    Pooling,
    Sampling,
)
from tokasaurus.text.adjustments import adjustments_of, check_token_ids
from tokasaurus.text.cartridges import Prefix
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.receipts import FIELD as RECEIPT
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.stop_strings import StopStrings
from tokasaurus.text.structured_output import FIELD, Grammars
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["CHAT_TEMPERATURE", "PreparedRequest", "Preparer"]

CHAT_TEMPERATURE = 0.7
"""The temperature of conversations if neither client nor generation config gives one."""

_MIN_TEMPERATURE = 1e-5  # below it, dividing by the temperature leaves fp32
_MIN_TOP_P = 1e-8  # fp32 tells it from 0, and every likeliest token has more
_SEED_BITS = 63
_NO_SEED = (None, -1)  # vLLM's clients say -1


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A prompt that can run, with a value for everything that the client left out.

    Attributes:
        pooling: unless it is NONE, the answer is a vector, and the drawn token is ignored.
        grammar: "" if the text is free.
        receipts: write the answer's receipt; None if the client asked for none.
        prefix: the cartridges before the prompt; None if there are none.
    """

    prompt_ids: Int32Array
    params: SamplingParams
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: StopStrings | None
    stop_token_ids: tuple[int, ...]
    pooling: Pooling = Pooling.NONE
    grammar: str = ""
    receipts: Receipts | None = None
    prefix: Prefix | None = None

    def message(
        self,
        request_id: int,
        *,
        stream: bool,
        client: str,
        name: str = "",
        report_stages: bool = False,
    ) -> GenerateRequest:
        """The message to the manager."""
        params = self.params
        return GenerateRequest(
            request_id=request_id,
            prompt_ids=self.prompt_ids,
            n=int(params.n),
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
            num_logprobs=_number(params.logprobs),
            num_prompt_logprobs=_number(params.prompt_logprobs),
            priority=int(params.priority),
            first_k=int(params.first_k or 0),
            stream=stream,
            hold_for_acks=self.stops is not None,
            pooling=self.pooling,
            grammar=self.grammar,
            cartridge="" if self.prefix is None else self.prefix.name,
            client=client,
            name=name,
            report_stages=report_stages,
        )


class Preparer:
    """Prepares requests for one engine.

    Args:
        config: the server's slice.
        tokenizer: of the model.
        receipts: of the engine; None if it gives none.

    Attributes:
        prefix: the cartridges that come before the prompts; None if none do.
    """

    def __init__(
        self, config: ServerConfig, tokenizer: Tokenizer, receipts: Receipts | None = None
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.prefix: Prefix | None = None
        self._receipts = receipts
        self._grammars = Grammars(lambda: tokenizer.vocabulary(config.eos_token_ids))

    def behind(self, prefix: Prefix) -> Preparer:
        """The same preparer for prompts behind cartridges."""
        preparer = copy.copy(self)
        preparer.prefix = prefix
        return preparer

    @property
    def max_request_tokens(self) -> int:
        """Of a prompt and its completion together, behind the cartridges."""
        num_taken = 0 if self.prefix is None else self.prefix.num_tokens
        return self.config.max_request_tokens - num_taken

    def prepare(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        default_temperature: float = 1.0,
    ) -> PreparedRequest:
        """Decides what the client left out, and checks that the prompt can run.

        Args:
            prompt_ids: the prompt.
            params: how to continue it.
            default_temperature: if neither the parameters nor the generation config give one.

        Raises:
            RequestError: the prompt cannot run; names the field.
        """
        config = self.config
        prompt = _checked_prompt(prompt_ids, config.vocab_size)
        _check_sizes(params, config)
        stops = StopStrings.compile(params.stop_strings, self.tokenizer.special_ids)
        check_token_ids(params, config.vocab_size)
        # A tokenizer may have special tokens that its model cannot draw.
        stop_token_ids = {i for i in (stops.token_ids if stops else ()) if i < config.vocab_size}
        stop_token_ids.update(params.stop_token_ids or ())
        late_ids = stop_token_ids.union(config.eos_token_ids)
        if not params.ignore_eos:
            stop_token_ids.update(config.eos_token_ids)
        max_tokens = self._room(len(prompt), params.max_tokens)
        if params.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens must be at most {max_tokens}, the largest number of tokens that each"
                f" sample may have, not {params.min_tokens}",
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
            seed=_seed(params),
            stops=stops,
            stop_token_ids=tuple(sorted(stop_token_ids)),
            grammar=self._grammar(params),
            receipts=self._checked_receipts(params) if params.receipt else None,
            prefix=self.prefix,
        )

    def prepare_pooling(
        self,
        prompt_ids: Sequence[int],
        pooling: Pooling,
        *,
        priority: int = 0,
    ) -> PreparedRequest:
        """Checks that a prompt can be made into one vector.

        Args:
            prompt_ids: the prompt, at least one token shorter than a request may be.
            pooling: the kind.
            priority: lower runs first.

        Raises:
            RequestError: the prompt cannot run; names the field.
        """
        limit = self.config.max_request_tokens
        if len(prompt_ids) >= limit:
            raise RequestTooLong.for_context(
                f"prompt has {len(prompt_ids)} tokens",
                limit,
                f"so the prompt of a vector can have at most {limit - 1}",
                "prompt",
            )
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, priority=priority)
        prepared = self.prepare(prompt_ids, params)
        return dataclasses.replace(prepared, pooling=pooling)

    def prepare_grammars(self) -> None:
        """Makes the first grammar as quick as later ones. Takes a second or so, in any thread."""
        if self.config.eos_token_ids:
            self._grammars.compiler()

    def _room(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The number of tokens that each sample may have. Raises RequestTooLong."""
        limit = self.config.max_request_tokens
        room = self.max_request_tokens - num_prompt_tokens
        if max_tokens is not None and max_tokens <= room:
            return int(max_tokens)
        if max_tokens is None and room >= 1:
            return room
        prompt, together = f"{num_prompt_tokens} tokens", "prompt and completion"
        if self.prefix is not None:
            prompt += f" behind cartridges of {self.prefix.num_tokens} tokens"
            together = "cartridges, prompt and completion"
        if room < 1:
            raise RequestTooLong.for_context(
                f"prompt has {prompt}", limit, f"for {together} together", "prompt"
            )
        raise RequestTooLong.for_context(
            f"max_tokens is {max_tokens}, and the prompt has {prompt}",
            limit,
            f"so max_tokens can be at most {room}",
            "max_tokens",
        )

    def _checked_receipts(self, params: SamplingParams) -> Receipts:
        if self._receipts is None:
            raise RequestError(f"{RECEIPT} is not available in this engine", RECEIPT)
        self._receipts.check(params)
        return self._receipts

    def _grammar(self, params: SamplingParams) -> str:
        if params.structured_outputs is None:
            return ""
        if not self.config.eos_token_ids:
            raise RequestError(
                "structured_outputs needs a model with an end-of-sequence token; this one names"
                " none",
                FIELD,
            )
        return self._grammars.text(params.structured_outputs)


def _checked_prompt(prompt_ids: Sequence[int], vocab_size: int) -> Int32Array:
    if len(prompt_ids) == 0:
        raise RequestError("prompt must hold at least one token", "prompt")
    ids = np.asarray(prompt_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError("prompt must hold token ids, which are whole numbers", "prompt")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(
            f"prompt must hold token ids from 0 to {vocab_size - 1}, not"
            f" {low if low < 0 else high}",
            "prompt",
        )
    return ids.astype(np.int32)


def _check_sizes(params: SamplingParams, config: ServerConfig) -> None:
    """Raises RequestError if the parameters exceed the limits that the engine was started with."""
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


def _seed(params: SamplingParams) -> int:
    """The seed on the wire, which is not negative; a new one if the client gave none."""
    if params.seed in _NO_SEED:
        return secrets.randbits(_SEED_BITS)
    assert params.seed is not None
    return int(params.seed) % (1 << _SEED_BITS)


def _sampling(
    params: SamplingParams,
    config: ServerConfig,
    default_temperature: float,
    adjustments: Adjustments | None,
) -> Sampling:
    defaults = {
        **SAMPLING_NUMBERS,
        "temperature": default_temperature,
        **config.sampling_defaults,
    }
    numbers: dict[str, Any] = {}
    for name, neutral in SAMPLING_NUMBERS.items():
        asked = getattr(params, name)
        numbers[name] = type(neutral)(defaults[name] if asked is None else asked)
    if numbers["temperature"] < _MIN_TEMPERATURE:
        numbers["temperature"] = 0.0
    numbers["top_p"] = max(numbers["top_p"], _MIN_TOP_P)
    if not 0 < numbers["top_k"] < config.vocab_size:
        numbers["top_k"] = 0
    mode = params.logprobs_mode
    return Sampling(
        **numbers,
        logprobs_mode=mode if isinstance(mode, LogprobsMode) else config.logprobs_mode,
        adjustments=adjustments,
    )


def _number(num_logprobs: int | None) -> int:
    return -1 if num_logprobs is None else int(num_logprobs)
