"""What the methods of a client return: the engine's JSON as frozen dataclasses.

Token ids and logprobs are numpy arrays. Whatever has no field of its own is in ``raw``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import TokasaurusError

__all__ = [
    "Answer",
    "Batch",
    "BatchResult",
    "Cartridge",
    "Choice",
    "Health",
    "Logprobs",
    "Model",
    "Piece",
    "StoredFile",
    "ToolCall",
    "Usage",
    "WeightsVersion",
]


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Logprobs of consecutive tokens.

    Attributes:
        chosen: of the tokens themselves, float32 [tokens]; of a prompt's first token it is nan.
        top_ids: the likeliest token ids in each place, int32 [tokens, k].
        top: their logprobs, float32 [tokens, k].
    """

    chosen: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top: NDArray[np.float32]


@dataclass(frozen=True)
class Usage:
    """How many tokens a request had.

    Attributes:
        cached_tokens: of the prompt, that were found in the prefix cache.
        cartridge_tokens: positions of cartridges before the prompt, which it does not count.
        reasoning_tokens: of the completion; None where there may be none.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    cartridge_tokens: int = 0
    reasoning_tokens: int | None = None


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        arguments: a text, which is JSON if the model wrote JSON.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, eq=False)
class Choice:
    """One sample.

    Attributes:
        index: for several prompts, the prompt's position times ``n``, plus the sample's.
        text: without reasoning and calls.
        finish_reason: "stop", "length", "tool_calls" or "abort".
        token_ids: int32 [tokens], the end-of-sequence token included; None if the server does not
            tell them.
        logprobs: if they were asked for.
        reasoning: None if there is none.
        weights_versions: with ``return_weights_versions``, or once there was an update: version,
            label and number of tokens of each run.
        prompt_ids: int32 [prompt tokens], as the engine saw them: of ``generate``, and with
            ``return_token_ids``; None where the server does not tell.
    """

    index: int
    text: str
    finish_reason: str | None
    token_ids: NDArray[np.int32] | None = None
    logprobs: Logprobs | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    weights_versions: tuple[Mapping[str, Any], ...] = ()
    prompt_ids: NDArray[np.int32] | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to a request for text.

    Attributes:
        id: of the answer.
        model: as the request named it, or the engine's.
        choices: at least one.
        prompt_logprobs: of ``generate`` with ``prompt_logprobs``.
        raw: the JSON.
    """

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: Logprobs | None
    raw: Mapping[str, Any]

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Of the first choice."""
        return self.choices[0].finish_reason

    @property
    def token_ids(self) -> NDArray[np.int32] | None:
        """Of the first choice."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> Logprobs | None:
        """Of the first choice."""
        return self.choices[0].logprobs

    @property
    def prompt_ids(self) -> NDArray[np.int32] | None:
        """Of the first choice."""
        return self.choices[0].prompt_ids

    @property
    def receipt(self) -> Mapping[str, Any] | None:
        """With ``receipt=True``: what ``toka-verify`` checks."""
        receipt: Mapping[str, Any] | None = self.raw.get("receipt")
        return receipt


@dataclass(frozen=True, eq=False)
class Piece:
    """The next piece of one sample of a stream.

    Attributes:
        index: of the choice that it continues.
        text: new text; "" where there is none.
        finish_reason: None unless the sample ends.
        token_ids: the new ones, int32 [tokens]; None if the server does not tell them.
        logprobs: of these tokens, if they were asked for.
        reasoning: new text of the reasoning.
        prompt_ids: int32 [prompt tokens], in the first piece of a choice, where the choice of a
            whole answer has them; else None.
        raw: the JSON of the event.
    """

    index: int
    text: str
    finish_reason: str | None
    token_ids: NDArray[np.int32] | None
    logprobs: Logprobs | None
    reasoning: str
    prompt_ids: NDArray[np.int32] | None
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """The model of an engine.

    Attributes:
        root: where its files are.
        max_model_len: the longest prompt and completion together; None if it is not told.
    """

    id: str
    root: str | None
    max_model_len: int | None
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Health:
    """How an engine is.

    Attributes:
        serves: whether it takes requests now.
        status: "ok", or what it does instead.
        running: the number of prompts in flight.
    """

    serves: bool
    status: str
    running: int
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class StoredFile:
    """A file that the engine keeps.

    Attributes:
        purpose: "batch" for an input, "batch_output" for an output.
    """

    id: str
    filename: str
    bytes: int
    purpose: str
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """A batch as it was when the engine was asked.

    Attributes:
        status: "validating", "in_progress", "finalizing" or "cancelling"; in the end "completed",
            "failed", "expired" or "cancelled".
        num_total: lines.
        num_completed: lines that have an answer.
        num_failed: lines that have an error.
        output_file_id: of the answers, once there are any.
        error_file_id: of the errors.
        errors: of a batch that failed: code, line and message of each.
    """

    id: str
    status: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    num_total: int
    num_completed: int
    num_failed: int
    errors: tuple[Mapping[str, Any], ...]
    raw: Mapping[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether the status can change no more."""
        return self.status in ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What became of one line of a batch: one of ``answer`` and ``error`` is None.

    Attributes:
        answer: also None for an answer that is not text, such as an embedding; ``raw`` has it.
    """

    custom_id: str
    answer: Answer | None
    error: TokasaurusError | None
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class WeightsVersion:
    """The weights that an engine runs.

    Attributes:
        version: 0 for those that it started with; each update makes the next number.
        label: the one that a client gave, or the number.
    """

    version: int
    label: str


@dataclass(frozen=True)
class Cartridge:
    """A cartridge that the engine keeps.

    Attributes:
        id: what requests call it, with its ``source``.
        tokens: positions.
        digest: of its tensors.
        uploaded: whether it came by an upload.
        users: requests that use it now.
        versions: the newest, and those before it that requests still use.
    """

    id: str
    source: str
    tokens: int
    bytes: int
    digest: str
    uploaded: bool
    users: int
    versions: tuple[Mapping[str, Any], ...]
    raw: Mapping[str, Any]
