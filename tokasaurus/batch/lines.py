"""The lines of a batch: requests on the way in, answers and errors on the way out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import msgspec

from tokasaurus import untrusted_json
from tokasaurus.batch.records import Usage, new_id

__all__ = [
    "MAX_LINE_BYTES",
    "BadLine",
    "Line",
    "Request",
    "answer_line",
    "error_line",
    "line_name",
    "lines_in",
    "parse_line",
    "read_lines",
    "usage_of",
    "window_seconds",
]

MAX_LINE_BYTES = 32 << 20

_MAX_ID_CHARS = 512
_FIELDS = ("custom_id", "method", "url", "body")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Request:
    """A line that can be answered."""

    line: int  # its number in the file, from 1
    custom_id: str
    url: str
    body: dict[str, Any]
    num_bytes: int

    @property
    def name(self) -> str:
        """What its result is called."""
        return self.custom_id

    @property
    def num_samples(self) -> int:
        """About how many samples the body asks for. The body is not validated yet."""
        n, prompt = self.body.get("n"), self.body.get("prompt")
        samples = n if type(n) is int and n > 0 else 1
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return samples * len(prompt)
        return samples


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be answered."""

    line: int
    custom_id: str | None  # None if the line has none that is valid
    code: str
    message: str

    @property
    def name(self) -> str:
        """What its result is called."""
        return line_name(self.line) if self.custom_id is None else self.custom_id


Line: TypeAlias = Request | BadLine


def line_name(number: int) -> str:
    """What the result of a line without a custom_id is called.

    Args:
        number: of the line, from 1; blank lines count, as they do in an editor.
    """
    return f"line-{number}"


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yields the number, from 1, and the content of each line that is not blank.

    The content is None if the line is too long.
    """
    with path.open("rb") as file:
        yield from lines_in(file)


def lines_in(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yields what ``read_lines`` yields, from an open file."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif line := line.strip():
            yield number, line


def parse_line(
    number: int, line: bytes | None, endpoint: str | None, urls: Collection[str]
) -> Line:
    """Parses one line.

    Args:
        number: its number.
        line: its content; None if it is too long.
        endpoint: the url that it must have; None for any.
        urls: the urls that requests may have.
    """
    if line is None:
        message = f"a line may have at most {MAX_LINE_BYTES} bytes"
        return BadLine(number, None, "line_too_long", message)
    try:
        fields = untrusted_json.decode(line)
    except ValueError as error:
        return BadLine(number, None, "invalid_json_line", f"the line is not valid JSON: {error}")
    if not isinstance(fields, dict):
        return BadLine(number, None, "invalid_json_line", "the line is not a JSON object")
    custom_id = fields.get("custom_id")
    if custom_id is None and "body" not in fields:
        message = f"the line is not a request: it must have {', '.join(_FIELDS)}"
        if endpoint is None:
            message += ", or be a body with prompt or messages"
        return BadLine(number, None, "missing_custom_id", message)
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _MAX_ID_CHARS:
        message = (
            f"custom_id must be a string of 1 to {_MAX_ID_CHARS} characters, unique in the file"
        )
        return BadLine(number, None, "missing_custom_id", message)
    wrong = _what_is_wrong(fields, endpoint, urls)
    if wrong is not None:
        return BadLine(number, custom_id, *wrong)
    return Request(number, custom_id, fields["url"], fields["body"], len(line))


def _what_is_wrong(
    fields: dict[str, Any], endpoint: str | None, urls: Collection[str]
) -> tuple[str, str] | None:
    """The code and message of the first error, or None."""
    for name, value in fields.items():
        if name not in _FIELDS and value is not None:
            known = ", ".join(_FIELDS)
            return "unknown_field", f"{name} is not a field of a line; the fields are {known}"
    if fields.get("method") != "POST":
        return (
            "invalid_method",
            f"method must be POST, not {untrusted_json.shown(fields.get('method'))}",
        )
    url = fields.get("url")
    if endpoint is not None and url != endpoint:
        return (
            "mismatched_endpoint",
            f"url must be the batch's endpoint, {endpoint}, not {untrusted_json.shown(url)}",
        )
    if url not in urls:
        return (
            "invalid_url",
            f"url must be one of {', '.join(urls)}, not {untrusted_json.shown(url)}",
        )
    if not isinstance(fields.get("body"), dict):
        return "invalid_body", "body must be a JSON object, the request to send to url"
    return None


# --- results --------------------------------------------------------------------------------------


def answer_line(custom_id: str, status: int, body: bytes, request_id: str | None = None) -> bytes:
    """The result line of a request that was answered, possibly with an error.

    Args:
        custom_id: the request's.
        status: the HTTP status of the answer.
        body: the answer, JSON.
        request_id: what the request was called in the log; None makes one up.
    """
    response = {
        "status_code": status,
        "request_id": request_id or new_id("req"),
        "body": msgspec.Raw(body),
    }
    return _result_line(custom_id, response, None)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """The result line of a request that never ran."""
    return _result_line(custom_id, None, {"code": code, "message": message})


def _result_line(custom_id: str, response: Any, error: Any) -> bytes:
    line = {
        "id": new_id("batch_req").replace("-", "_"),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return msgspec.json.encode(line) + b"\n"


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _AnyUsage(msgspec.Struct):
    """The usage of an answer, under all the names that the routes use."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _MetaInfo(msgspec.Struct):
    """What ``/generate`` says of one sample in SGLang's shape. ``id`` is that of its prompt."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class _Answer(msgspec.Struct):
    usage: _AnyUsage | None = None
    meta_info: _MetaInfo | None = None


_answer_decoder = msgspec.json.Decoder(_Answer | list[_Answer])
_NO_DETAILS = _Details()


def usage_of(body: bytes) -> Usage:
    """The number of tokens that an answer states. Nothing else of the answer is read."""
    try:
        answer = _answer_decoder.decode(body)
    except msgspec.DecodeError:
        return Usage()
    answers = answer if isinstance(answer, list) else [answer]
    samples = [each.meta_info for each in answers if each.meta_info is not None]
    if samples:
        prompts = {sample.id: sample for sample in samples}.values()  # each prompt counts once
        return Usage.of(
            sum(prompt.prompt_tokens for prompt in prompts),
            sum(prompt.cached_tokens for prompt in prompts),
            sum(sample.completion_tokens for sample in samples),
            0,
        )
    usage = answers[0].usage if answers else None
    if usage is None:
        return Usage()
    given = usage.prompt_tokens_details or usage.input_tokens_details or _NO_DETAILS
    made = usage.completion_tokens_details or usage.output_tokens_details or _NO_DETAILS
    return Usage.of(
        usage.prompt_tokens or usage.input_tokens or 0,
        given.cached_tokens or 0,
        usage.completion_tokens or usage.output_tokens or 0,
        made.reasoning_tokens or 0,
    )


_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_WINDOW_S = 30 * 86400


def window_seconds(window: str) -> int | None:
    """The length of a completion window such as "24h"; None if the text is not one."""
    match = _WINDOW.fullmatch(window)
    if match is None:
        return None
    seconds = int(match[1]) * _SECONDS[match[2]]
    return seconds if seconds <= _MAX_WINDOW_S else None
