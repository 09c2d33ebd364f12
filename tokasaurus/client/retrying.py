"""When a request is sent again, and after how long.

What may help is repeated: connections that fail, timeouts, and the statuses 408, 429 and 5xx.
Other statuses say that the request is wrong, which it would be again. An answer with
``X-Should-Retry: false`` is final, too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokasaurus.errors import ConfigError, TokasaurusError

__all__ = ["Attempts", "Failure", "RetryPolicy", "is_worth_retrying"]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a request is sent again, and how long the pauses are.

    The pause before the first retry is up to ``starting_delay_s``; each further one is
    ``backoff_factor`` times as long, up to ``max_delay_s``. A random share of up to a half is
    taken off, so that clients that failed together do not come back together. A ``Retry-After``
    of the engine is the least that is waited.

    Attributes:
        max_retries: after the first attempt; 0 never repeats.

    Raises:
        ConfigError: a number is out of range.
    """

    max_retries: int = 5
    starting_delay_s: float = 0.5
    backoff_factor: float = 2.0
    max_delay_s: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (
            ("max_retries", 0),
            ("starting_delay_s", 0),
            ("backoff_factor", 1),
            ("max_delay_s", 0),
        ):
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"{name}={value} must be at least {least}")

    def delay_s(self, retry: int, retry_after_s: float | None = None) -> float:
        """The pause before a retry.

        Args:
            retry: 1 for the first.
            retry_after_s: what the engine asks for, if it does.
        """
        try:
            longest = self.starting_delay_s * self.backoff_factor ** (retry - 1)
        except OverflowError:
            longest = self.max_delay_s
        delay = min(longest, self.max_delay_s) * random.uniform(0.5, 1.0)
        return delay if retry_after_s is None else max(retry_after_s, 0.0) + delay


class Failure(Exception):
    """One attempt has failed.

    Args:
        error: what the caller gets if no retry helps.
        is_final: a retry cannot help.
        retry_after_s: the least time before a retry.
        maybe_done: the engine may have carried the request out all the same.
    """

    def __init__(
        self,
        error: TokasaurusError,
        *,
        is_final: bool,
        retry_after_s: float | None = None,
        maybe_done: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.is_final = is_final
        self.retry_after_s = retry_after_s
        self.maybe_done = maybe_done


class Attempts:
    """The attempts of one request."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self.num_retries = 0
        self.maybe_done = False  # one of the attempts may have been carried out

    def delay_after(self, failure: Failure) -> float:
        """Seconds until the next attempt. Raises the failure's error if there is none."""
        self.maybe_done |= failure.maybe_done
        if failure.is_final or self.num_retries >= self._policy.max_retries:
            raise failure.error from failure.__cause__
        self.num_retries += 1
        return self._policy.delay_s(self.num_retries, failure.retry_after_s)


def is_worth_retrying(status: int) -> bool:
    """Whether an answer with this status may be another one the next time."""
    return status in (408, 429) or status >= 500
