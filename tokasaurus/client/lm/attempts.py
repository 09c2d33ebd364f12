"""The attempts of one call: which failures are worth another one, and after what wait.

Sends nothing and does not sleep, so that calls of threads and of event loops share it.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import httpx2 as httpx

from tokasaurus.client.lm.config import TokasaurusConfig
from tokasaurus.errors import CallFailed, GenerationTruncatedError

__all__ = ["AttemptFailed", "Attempts", "refusal", "unreachable"]

_PASSING = frozenset({408, 429})
_LONGEST_QUOTE = 2000


@dataclass
class AttemptFailed(Exception):
    """One attempt brought no answer.

    Attributes:
        reason: for people.
        may_pass: whether the same request may succeed later.
        status: of the server's answer, if there was one.
        retry_after_s: how long the server asks to wait.
        is_truncated: whether there was an answer, which reached the limit of tokens.
    """

    reason: str
    may_pass: bool
    status: int | None = None
    retry_after_s: float = 0.0
    is_truncated: bool = False


class Attempts:
    """Counts the attempts of one call.

    Attributes:
        num_failed: so far.
    """

    def __init__(self, config: TokasaurusConfig) -> None:
        self._config = config
        self.num_failed = 0

    def wait_after(self, failure: AttemptFailed) -> float:
        """Seconds to wait before the next attempt.

        The delays are ``starting_delay`` and then ``backoff_factor`` times longer each, up to
        ``max_delay``, and at random up to half as long, so that clients that failed together do
        not come again together. A server that says how long to wait is obeyed, up to
        ``timeout_s``.

        Raises:
            CallFailed: no attempt is left, or another would fail as this one did.
        """
        self.num_failed += 1
        config = self._config
        if not failure.may_pass or self.num_failed > config.max_retries:
            kind = GenerationTruncatedError if failure.is_truncated else CallFailed
            raise kind(self._message(failure), self.num_failed, failure.status) from failure
        # Not a power: a large one is an OverflowError.
        delay = config.starting_delay
        for _ in range(self.num_failed - 1):
            delay = min(delay * config.backoff_factor, config.max_delay)
        delay = min(delay, config.max_delay) * random.uniform(0.5, 1.0)
        asked = min(failure.retry_after_s, config.timeout_s) * random.uniform(1.0, 1.1)
        return max(delay, asked)

    def _message(self, failure: AttemptFailed) -> str:
        if self.num_failed == 1:
            return failure.reason
        return f"{failure.reason} (attempt {self.num_failed} of {self._config.max_retries + 1})"


def unreachable(error: httpx.HTTPError, config: TokasaurusConfig) -> AttemptFailed:
    """An attempt that had no answer, or none that can be read."""
    url = config.root_url
    if isinstance(error, httpx.ConnectError):
        reason = (
            f"nothing answers at {url} ({error}); start an engine with `toka port=...`, or set"
            " base_url; an engine without port= listens on port 10210"
        )
    elif isinstance(error, httpx.TimeoutException):
        reason = f"{url} has not answered within timeout_s={config.timeout_s:g}"
    else:
        reason = f"the connection to {url} failed: {str(error) or type(error).__name__}"
    never = isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError))
    return AttemptFailed(reason, may_pass=isinstance(error, httpx.TransportError) and not never)


def refusal(response: httpx.Response) -> AttemptFailed:
    """An attempt whose answer has a status other than success."""
    status = response.status_code
    may_pass = status in _PASSING or status >= 500
    if response.headers.get("x-should-retry", "").lower() == "false":
        may_pass = False
    reason = f"{response.request.url} answered with status {status}: {_message_of(response)}"
    if status == 401:
        reason += "; set api_key, or TOKASAURUS_API_KEY, to one of the server's keys"
    return AttemptFailed(reason, may_pass, status, _retry_after_s(response))


def _message_of(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError):
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str) and message:
            return message[:_LONGEST_QUOTE]
    return response.text[:_LONGEST_QUOTE] or response.reason_phrase


def _retry_after_s(response: httpx.Response) -> float:
    """What the header ``Retry-After`` says, in seconds or as a date."""
    said = response.headers.get("retry-after", "").strip()
    if not said:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(said)) if float(said) < float("inf") else 0.0
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(timezone.utc)).total_seconds())
    return 0.0
