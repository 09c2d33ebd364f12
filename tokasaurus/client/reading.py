"""Makes results of the engine's JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokasaurus.client.failures import error_of
from tokasaurus.client.results import (
    Answer,
    Batch,
    BatchResult,
    Cartridge,
    Choice,
    Health,
    Logprobs,
    Model,
    Piece,
    StoredFile,
    ToolCall,
    Usage,
)
from tokasaurus.errors import EngineError, TokasaurusError

__all__ = [
    "read_answer",
    "read_batch",
    "read_batch_result",
    "read_cartridge",
    "read_embeddings",
    "read_file",
    "read_health",
    "read_model",
    "read_pieces",
    "read_usage",
]

JSON = Mapping[str, Any]


def read_answer(body: JSON) -> Answer:
    """The answer of a route that generates.

    Raises:
        EngineError: it is none.
    """
    if "choices" in body:
        fingerprint = _Fingerprint(body)
        choices = [
            _choice(each, fingerprint, position, body)
            for position, each in enumerate(body["choices"])
        ]
        prompt_logprobs = None
    elif "output_ids" in body:
        prompt_ids = _ids(body.get("prompt_ids"))
        choices = [_native_choice(each, prompt_ids) for each in body.get("samples") or [body]]
        prompt_logprobs = _columns(body.get("prompt_logprobs"))
    else:
        raise EngineError(f"this answer has no text: {str(body)[:300]}")
    if not choices:
        raise EngineError(f"this answer has no choices: {str(body)[:300]}")
    return Answer(
        id=str(body.get("id", "")),
        model=str(body.get("model", "")),
        choices=tuple(choices),
        usage=read_usage(body.get("usage")),
        prompt_logprobs=prompt_logprobs,
        raw=body,
    )


def read_pieces(event: JSON) -> Iterator[Piece]:
    """The pieces that an event of a stream brings; none if it only tells the usage."""
    if "choices" in event:
        fingerprint = _Fingerprint(event)
        for position, each in enumerate(event["choices"]):
            yield _piece(each, fingerprint, position, event)
    elif "output_ids" in event:
        yield Piece(
            index=event.get("index", 0),
            text=event.get("text") or "",
            finish_reason=event.get("finish_reason"),
            token_ids=np.asarray(event["output_ids"], np.int32),
            logprobs=_columns(event.get("logprobs")),
            reasoning="",
            prompt_ids=_ids(event.get("prompt_ids")),
            raw=event,
        )


def read_usage(usage: Any) -> Usage:
    """A ``usage``, which may be missing."""
    fields: JSON = usage or {}
    prompt: JSON = fields.get("prompt_tokens_details") or {}
    completion: JSON = fields.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=fields.get("prompt_tokens", 0),
        completion_tokens=fields.get("completion_tokens", 0),
        total_tokens=fields.get("total_tokens", 0),
        cached_tokens=prompt.get("cached_tokens") or 0,
        cartridge_tokens=prompt.get("cartridge_tokens") or 0,
        reasoning_tokens=completion.get("reasoning_tokens"),
    )


def read_embeddings(body: JSON) -> NDArray[np.float32]:
    """Vectors, [inputs, dimensions]."""
    entries = sorted(body["data"], key=lambda entry: entry["index"])
    return np.stack([_vector(entry["embedding"]) for entry in entries])


def read_model(body: JSON) -> Model:
    return Model(body["id"], body.get("root"), body.get("max_model_len"), body)


def read_health(serves: bool, body: JSON) -> Health:
    status = body.get("status") or ("ok" if serves else "not serving")
    return Health(serves, str(status), body.get("running", 0), body)


def read_file(body: JSON) -> StoredFile:
    return StoredFile(body["id"], body["filename"], body["bytes"], body["purpose"], body)


def read_batch(body: JSON) -> Batch:
    counts = body.get("request_counts") or {}
    return Batch(
        id=body["id"],
        status=body["status"],
        endpoint=body["endpoint"],
        input_file_id=body["input_file_id"],
        output_file_id=body.get("output_file_id"),
        error_file_id=body.get("error_file_id"),
        num_total=counts.get("total", 0),
        num_completed=counts.get("completed", 0),
        num_failed=counts.get("failed", 0),
        errors=tuple((body.get("errors") or {}).get("data") or ()),
        raw=body,
    )


def read_batch_result(line: JSON) -> BatchResult:
    """A line of a batch's output, or of its errors."""
    answer, error = None, None
    response, told = line.get("response"), line.get("error")
    if response is None:
        fields: JSON = told or {}
        error = _line_error(f"{fields.get('code')}: {fields.get('message')}")
    elif response["status_code"] != 200:
        error = error_of(
            response["status_code"], response["body"], request_id=response.get("request_id")
        )
    elif "choices" in response["body"] or "output_ids" in response["body"]:
        answer = read_answer(response["body"])
    return BatchResult(line["custom_id"], answer, error, line)


def read_cartridge(body: JSON) -> Cartridge:
    return Cartridge(
        id=body["id"],
        source=body["source"],
        tokens=body["tokens"],
        bytes=body["bytes"],
        digest=body["digest"],
        uploaded=body["uploaded"],
        users=body["users"],
        versions=tuple(body["versions"]),
        raw=body,
    )


def _line_error(message: str) -> TokasaurusError:
    return EngineError(f"this line has not run: {message}")


class _Fingerprint:
    """The ids and packed logprobs in ``system_fingerprint``; empty from other servers."""

    def __init__(self, body: JSON) -> None:
        self._fields: JSON = {}
        text = body.get("system_fingerprint")
        if isinstance(text, str) and text.startswith("{"):
            try:
                self._fields = msgspec.json.decode(text)
            except msgspec.DecodeError:  # somebody else's
                self._fields = {}

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        ids: Sequence[Sequence[int]] = self._fields.get("input_ids") or ()
        return ids[0] if ids else None

    def ids(self, position: int) -> Sequence[int] | None:
        """Of the choice in this position of the answer."""
        ids: Sequence[Sequence[int]] = self._fields.get("completion_ids") or ()
        return ids[position] if ids else None

    def logprobs(self, position: int) -> Logprobs | None:
        chosen = self._fields.get("packed_chosen_logprobs")
        if chosen is None:
            return None
        values = _unpacked(chosen[position], "<f4")
        num_tokens = len(values)
        top_ids, top = np.zeros((num_tokens, 0), np.int32), np.zeros((num_tokens, 0), np.float32)
        packed_ids = self._fields.get("packed_topk_indices")
        if packed_ids is not None and num_tokens:
            top_ids = _unpacked(packed_ids[position], "<i4").reshape(num_tokens, -1)
            top = _unpacked(self._fields["packed_topk_logprobs"][position], "<f4")
            top = top.reshape(num_tokens, -1)
        return Logprobs(values, top_ids, top)


def _ids(*told: Sequence[int] | None) -> NDArray[np.int32] | None:
    """The first that are told."""
    ids = next((each for each in told if each is not None), None)
    return None if ids is None else np.asarray(ids, np.int32)


def _token_ids(choice: JSON, fingerprint: _Fingerprint, position: int) -> NDArray[np.int32] | None:
    """The ids of a choice, or of its next piece. SGLang's chats have a name of their own."""
    return _ids(
        choice.get("token_ids"), choice.get("response_token_ids"), fingerprint.ids(position)
    )


def _prompt_ids(choice: JSON, fingerprint: _Fingerprint, body: JSON) -> NDArray[np.int32] | None:
    """The ids of its prompt, which some have in each choice and some beside them."""
    return _ids(
        choice.get("prompt_token_ids"), body.get("prompt_token_ids"), fingerprint.prompt_ids
    )


def _choice(choice: JSON, fingerprint: _Fingerprint, position: int, body: JSON) -> Choice:
    message: JSON = choice.get("message") or {}
    text = choice.get("text") if "text" in choice else message.get("content")
    return Choice(
        index=choice.get("index", position),
        text=text or "",
        finish_reason=choice.get("finish_reason"),
        token_ids=_token_ids(choice, fingerprint, position),
        logprobs=fingerprint.logprobs(position) or _written(choice.get("logprobs")),
        reasoning=message.get("reasoning_content"),
        tool_calls=tuple(_tool_call(each) for each in message.get("tool_calls") or ()),
        weights_versions=tuple(choice.get("weights_versions") or ()),
        prompt_ids=_prompt_ids(choice, fingerprint, body),
    )


def _native_choice(sample: JSON, prompt_ids: NDArray[np.int32] | None) -> Choice:
    return Choice(
        index=sample.get("index", 0),
        text=sample.get("text") or "",
        finish_reason=sample.get("finish_reason"),
        token_ids=np.asarray(sample["output_ids"], np.int32),
        logprobs=_columns(sample.get("logprobs")),
        weights_versions=tuple(sample.get("weights_versions") or ()),
        prompt_ids=prompt_ids,
    )


def _piece(choice: JSON, fingerprint: _Fingerprint, position: int, event: JSON) -> Piece:
    delta: JSON = choice.get("delta") or {}
    return Piece(
        index=choice.get("index", position),
        text=choice.get("text") or delta.get("content") or "",
        finish_reason=choice.get("finish_reason"),
        token_ids=_token_ids(choice, fingerprint, position),
        logprobs=fingerprint.logprobs(position) or _written(choice.get("logprobs")),
        reasoning=delta.get("reasoning_content") or "",
        prompt_ids=_prompt_ids(choice, fingerprint, event),
        raw=event,
    )


def _tool_call(call: JSON) -> ToolCall:
    function = call.get("function") or {}
    return ToolCall(call.get("id", ""), function.get("name", ""), function.get("arguments", ""))


def _columns(logprobs: JSON | None) -> Logprobs | None:
    """Logprobs as ``/generate`` writes them; nulls become nan, and the id -1."""
    if logprobs is None:
        return None
    chosen = [np.nan if each is None else each for each in logprobs["token_logprobs"]]
    num_tokens = len(chosen)
    rows_of_ids = [row or () for row in logprobs.get("top_ids") or [()] * num_tokens]
    rows = [row or () for row in logprobs.get("top_logprobs") or [()] * num_tokens]
    width = max(map(len, rows), default=0)
    top_ids = np.full((num_tokens, width), -1, np.int32)
    top = np.full((num_tokens, width), np.nan, np.float32)
    for position, (ids, values) in enumerate(zip(rows_of_ids, rows, strict=True)):
        top_ids[position, : len(ids)] = ids
        top[position, : len(values)] = values
    return Logprobs(np.asarray(chosen, np.float32), top_ids, top)


def _written(logprobs: JSON | None) -> Logprobs | None:
    """Those that OpenAI's shapes tell without ids: the tokens' own."""
    if logprobs is None:
        return None
    if logprobs.get("content") is not None:
        values = [entry["logprob"] for entry in logprobs["content"]]
    else:
        values = logprobs.get("token_logprobs") or []
    chosen = np.asarray([np.nan if each is None else each for each in values], np.float32)
    return Logprobs(
        chosen, np.zeros((len(chosen), 0), np.int32), np.zeros((len(chosen), 0), np.float32)
    )


def _vector(embedding: Any) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return _unpacked(embedding, "<f4")
    return np.asarray(embedding, np.float32)


def _unpacked(text: str, dtype: str) -> NDArray[Any]:
    array = np.frombuffer(base64.b64decode(text), dtype)
    return array.astype(array.dtype.newbyteorder("="))
