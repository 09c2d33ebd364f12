"""The language model that a Tokasaurus engine, or another server with OpenAI's routes, serves.

    call(system, user) ──▶ Prompt ──▶ attempts ──▶ Answer ──▶ text, metrics, log, totals

Owns the calls: for threads, for event loops, and for many prompts together.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypedDict, overload

import httpx2 as httpx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tokasaurus.client.certificates import trusted
from tokasaurus.client.failures import failed_connection, failed_time, refusal
from tokasaurus.client.lm.config import LMConfig, TokasaurusConfig
from tokasaurus.client.lm.exchange import Message, Prompt, Reply, post_of, read_reply
from tokasaurus.client.lm.language_model import LanguageModel, LLMResponseMetrics
from tokasaurus.client.lm.totals import Totals, TotalUsage
from tokasaurus.client.requests import CartridgeLike, encoded
from tokasaurus.client.results import Usage
from tokasaurus.client.retrying import Attempts, Failure
from tokasaurus.errors import EngineError, GenerationTruncatedError, RequestTooLong, TokasaurusError

__all__ = ["LMReply", "TokasaurusClient"]

_CONNECT_S = 10.0
_PING_S = 5.0
# Shorter than servers keep a connection without requests, so that none is used as it closes.
_KEEP_ALIVE_S = 4.0


class LMReply(TypedDict):
    """The answer to a list of messages.

    Attributes:
        text: empty after a failure.
        metrics: the fields of :class:`LLMResponseMetrics`.
        logprobs: of the generated tokens, float32 [tokens]; None without ``top_logprobs``.
        output_ids: the generated token ids; None if the server does not say.
        topk_logprobs, topk_token_ids: float32 and int32 [tokens, k]; None without a k above 0.
        finish_reason: ``stop``, ``length`` or another; None after a failure.
    """

    text: str
    metrics: dict[str, Any]
    logprobs: NDArray[np.float32] | None
    output_ids: list[int] | None
    topk_logprobs: NDArray[np.float32] | None
    topk_token_ids: NDArray[np.int32] | None
    finish_reason: str | None


class TokasaurusClient(LanguageModel):
    """Calls a served model. Hundreds of threads may share one client.

    It keeps as many connections as there are calls at a time.

    Args:
        config: a :class:`TokasaurusConfig`, or what can be read as one.
        logger: default is the logger named ``language_model``.

    Attributes:
        config, cfg: the configuration.

    Raises:
        ValueError: the configuration has a key or value that is wrong.
    """

    def __init__(
        self, config: LMConfig | Mapping[str, Any], logger: logging.Logger | None = None
    ) -> None:
        self.cfg = TokasaurusConfig.of(config)
        super().__init__(self.cfg, logger)
        self._totals = Totals()
        self._options = _http_options(self.cfg)
        self._http = httpx.Client(**self._options)
        # Connections belong to the event loop that made them.
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._must_ping = self.cfg.enable_health_check
        self._has_warned = False
        self._lock = threading.Lock()

    def __enter__(self) -> TokasaurusClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> TokasaurusClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @property
    def totals(self) -> TotalUsage:
        """What all calls so far have cost together."""
        return self._totals.now()

    def close(self) -> None:
        """Closes the connections of threads."""
        self._http.close()

    async def aclose(self) -> None:
        """Closes the connections of this event loop, and those of threads."""
        with self._lock:
            client = self._loops.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()
        self.close()

    @overload
    def call(self, system_prompt: str, user_prompt: str) -> str: ...

    @overload
    def call(
        self,
        messages: Sequence[Message],
        cartridges: Sequence[CartridgeLike] | None = None,
    ) -> LMReply: ...

    def call(self, *args: Any, **kwargs: Any) -> str | LMReply:
        """Answers a prompt.

        Args:
            system_prompt, user_prompt: two texts. The result is a text.
            messages, cartridges: a conversation, and what comes before it. The result is an
                :class:`LMReply`. A text in the place of a cartridge is a local one.

        Raises:
            RequestError: the protocol has no place for the messages.
            TokasaurusError: with ``on_failure="raise"``, no attempt brought an answer: an
                ``EngineError``, a ``RequestError``, or a ``GenerationTruncatedError``. Otherwise
                the error is logged and the text is empty.
        """
        running = self._begin(*args, **kwargs)
        try:
            while True:
                try:
                    return running.succeeded(self._attempt(running))
                except Failure as failure:
                    wait_s = running.attempts.delay_after(failure)
                time.sleep(wait_s)
        except TokasaurusError as error:
            return running.failed(error)
        except BaseException as error:
            running.interrupted(error)
            raise

    @overload
    async def acall(self, system_prompt: str, user_prompt: str) -> str: ...

    @overload
    async def acall(
        self,
        messages: Sequence[Message],
        cartridges: Sequence[CartridgeLike] | None = None,
    ) -> LMReply: ...

    async def acall(self, *args: Any, **kwargs: Any) -> str | LMReply:
        """As :meth:`call`, in an event loop."""
        running = self._begin(*args, **kwargs)
        try:
            while True:
                try:
                    return running.succeeded(await self._attempt_in_loop(running))
                except Failure as failure:
                    wait_s = running.attempts.delay_after(failure)
                await asyncio.sleep(wait_s)
        except TokasaurusError as error:
            return running.failed(error)
        except BaseException as error:
            running.interrupted(error)
            raise

    @overload
    def call_many(
        self,
        prompts: Sequence[tuple[str, str]],
        *,
        num_threads: int = 128,
        progress: bool = False,
    ) -> list[str]: ...

    @overload
    def call_many(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        cartridges: Sequence[CartridgeLike] | None = None,
        num_threads: int = 128,
        progress: bool = False,
    ) -> list[LMReply]: ...

    def call_many(
        self,
        prompts: Sequence[Any],
        *,
        cartridges: Sequence[CartridgeLike] | None = None,
        num_threads: int = 128,
        progress: bool = False,
    ) -> list[Any]:
        """Answers many prompts at the same time.

        Args:
            prompts: pairs of a system's and a user's prompt, or conversations.
            cartridges: that come before conversations.
            num_threads: how many at a time.
            progress: show a bar.

        Returns:
            What :meth:`call` returns for each, in their order.

        Raises:
            TokasaurusError: with ``on_failure="raise"``; prompts that have not begun are left out.
        """
        is_pair = [len(each) == 2 and isinstance(each[0], str) for each in prompts]
        with ThreadPoolExecutor(max(1, min(num_threads, len(prompts)))) as pool:
            futures = [
                pool.submit(
                    contextvars.copy_context().run,
                    self.call,
                    *(prompt if pair else (prompt, cartridges)),
                )
                for prompt, pair in zip(prompts, is_pair, strict=True)
            ]
            try:
                shown = tqdm(futures, unit="call", disable=not progress)
                return [future.result() for future in shown]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def ping(self) -> bool:
        """Whether the server answers ``/ping`` as an engine does, within five seconds."""
        try:
            answer = self._http.get("/ping", timeout=_PING_S)
            return bool(answer.json().get("message") == "pong")
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            self.logger.debug("no pong from %s: %s", self.cfg.address.url, error)
            return False

    def _begin(self, *args: Any, **kwargs: Any) -> _RunningCall:
        with self._lock:
            must_ping, self._must_ping = self._must_ping, False
        if must_ping:
            self.ping()
        asked = _asked(args, kwargs)
        cartridges = self.cfg.cartridges if asked.cartridges is None else asked.cartridges
        prompt = Prompt(
            asked.messages, self.cfg.temperature_now(), cartridges, wants_logprobs=not asked.is_pair
        )
        return _RunningCall(self, prompt, is_pair=asked.is_pair)

    def _attempt(self, running: _RunningCall) -> Reply:
        try:
            response = self._http.post(**running.request())
            if running.fits_only_without_limit(response):
                response = self._http.post(**running.request())
        except httpx.HTTPError as error:
            raise _broken(error, self.cfg) from error
        return running.read(response)

    async def _attempt_in_loop(self, running: _RunningCall) -> Reply:
        http = self._http_in_loop()
        try:
            response = await http.post(**running.request())
            if running.fits_only_without_limit(response):
                response = await http.post(**running.request())
        except httpx.HTTPError as error:
            raise _broken(error, self.cfg) from error
        return running.read(response)

    def _say_once(self, warning: str) -> None:
        with self._lock:
            is_new, self._has_warned = not self._has_warned, True
        if is_new:
            self.logger.warning("%s", warning)

    def _http_in_loop(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._loops:
                self._loops[loop] = httpx.AsyncClient(**self._options)
            return self._loops[loop]


class _RunningCall:
    """One call from its beginning to its end, whatever sends its requests."""

    def __init__(self, owner: TokasaurusClient, prompt: Prompt, *, is_pair: bool) -> None:
        self.post = post_of(prompt, owner.cfg)
        self.attempts = Attempts(owner.cfg.retry)
        self._owner = owner
        self._cfg = owner.cfg
        self._prompt = prompt
        self._is_pair = is_pair
        self._request_id = f"lm_{uuid.uuid4().hex}"
        self._started = time.perf_counter()
        texts = {message.get("role"): str(message.get("content")) for message in prompt.messages}
        self._log_id = owner._begin_call(
            texts.get("system", ""), texts.get("user", ""), None if is_pair else prompt.messages
        )

    def request(self) -> dict[str, Any]:
        """The arguments of a POST. All attempts have the same request id, which servers log.

        Raises:
            RequestError: a prompt is no text that UTF-8 can write.
        """
        return {
            "url": self.post.path,
            "content": encoded(self.post.body),
            "headers": {"Content-Type": "application/json", "X-Request-Id": self._request_id},
        }

    def fits_only_without_limit(self, response: httpx.Response) -> bool:
        """Whether the server refuses the limit of tokens, which the request then has no more.

        ``max_output_tokens`` may be more than the context of a model leaves behind a prompt. An
        answer without a limit ends with the context, which is before this one.
        """
        if response.status_code != httpx.codes.BAD_REQUEST or "max_tokens" not in self.post.body:
            return False
        failure = refusal(response.status_code, response.headers, response.content)
        if not isinstance(failure.error, RequestTooLong):
            return False
        del self.post.body["max_tokens"]
        self._owner._say_once(
            f"max_output_tokens={self._cfg.max_output_tokens} does not fit the model's context, so"
            f" answers end with it: {failure.error}"
        )
        return True

    def read(self, response: httpx.Response) -> Reply:
        """The reply of an attempt.

        Raises:
            Failure: it is a refusal, is truncated, or cannot be read.
        """
        if not response.is_success:
            raise refusal(response.status_code, response.headers, response.content)
        try:
            reply = read_reply(response.json(), self._cfg.protocol)
        except (ValueError, EngineError) as error:
            said = error if isinstance(error, EngineError) else "the answer is not JSON"
            raise Failure(EngineError(f"{response.request.url}: {said}"), is_final=True) from error
        if self._cfg.on_truncation != "return" and reply.is_truncated(self._cfg.max_output_tokens):
            message = (
                f"the answer reached max_output_tokens={self._cfg.max_output_tokens}, or the end of"
                " the model's context, before its own; on_truncation: return returns it"
            )
            helps = self._cfg.on_truncation == "retry" and self._may_differ()
            raise Failure(GenerationTruncatedError(message), is_final=not helps)
        return reply

    def _may_differ(self) -> bool:
        return self._prompt.temperature > 0 and self._cfg.seed is None

    def succeeded(self, reply: Reply) -> str | LMReply:
        metrics = self._metrics(reply.usage)
        self._owner._totals.add(metrics)
        self._owner._end_call(self._log_id, reply.text, {"metrics": metrics.model_dump()})
        return self._result(reply, metrics)

    def failed(self, error: TokasaurusError) -> str | LMReply:
        self.interrupted(error)
        if self._cfg.on_failure == "raise":
            raise error
        self._owner.logger.error("a call of %s has no answer: %s", self._cfg.address.url, error)
        nothing = Reply("", None, Usage())
        return self._result(nothing, self._metrics(nothing.usage))

    def interrupted(self, error: BaseException) -> None:
        """Counts and logs a call without an answer, such as one whose task was cancelled."""
        self._owner._totals.add_failure(self.attempts.num_retries)
        said = f"{type(error).__name__}: {error}"
        self._owner._end_call(self._log_id, "", {"error": said})

    def _metrics(self, usage: Usage) -> LLMResponseMetrics:
        duration = time.perf_counter() - self._started
        return LLMResponseMetrics(
            duration=duration,
            input_tokens=usage.prompt_tokens,
            thinking_tokens=usage.reasoning_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens or usage.prompt_tokens + usage.completion_tokens,
            retries=self.attempts.num_retries,
            throughput=usage.completion_tokens / duration if duration > 0 else 0.0,
            temperature=self._prompt.temperature,
        )

    def _result(self, reply: Reply, metrics: LLMResponseMetrics) -> str | LMReply:
        if self._is_pair:
            return reply.text
        logprobs = reply.logprobs
        has_top = logprobs is not None and logprobs.top.shape[1] > 0
        return LMReply(
            text=reply.text,
            metrics=metrics.model_dump(),
            logprobs=None if logprobs is None else logprobs.chosen,
            output_ids=None if reply.token_ids is None else reply.token_ids.tolist(),
            topk_logprobs=logprobs.top if logprobs is not None and has_top else None,
            topk_token_ids=logprobs.top_ids if logprobs is not None and has_top else None,
            finish_reason=reply.finish_reason,
        )


@dataclass(frozen=True)
class _Asked:
    """The arguments of a call, in whichever of the two shapes."""

    messages: Sequence[Message]
    cartridges: Sequence[CartridgeLike] | None
    is_pair: bool


def _asked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Asked:
    is_pair = "messages" not in kwargs and not (args and not isinstance(args[0], str))
    shape = _pair if is_pair else _conversation
    return shape(*args, **kwargs)


def _pair(system_prompt: str, user_prompt: str) -> _Asked:
    # The system message is sent even where it is empty: some templates have one of their own.
    messages = [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": user_prompt},
    ]
    return _Asked(messages, None, is_pair=True)


def _conversation(
    messages: Sequence[Message], cartridges: Sequence[CartridgeLike] | None = None
) -> _Asked:
    return _Asked(messages, cartridges, is_pair=False)


def _http_options(config: TokasaurusConfig) -> dict[str, Any]:
    """What clients of threads and of event loops have in common."""
    address = config.address
    return {
        "base_url": address.url,
        "headers": {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {},
        "timeout": httpx.Timeout(config.timeout_s, connect=min(_CONNECT_S, config.timeout_s)),
        # No limit: a call that waited for a connection of another would be counted as slow.
        "limits": httpx.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE_S
        ),
        "proxy": address.proxy,
        "verify": trusted(address.url, config.ca_file),
        "trust_env": False,  # the address has read it
    }


def _broken(error: httpx.HTTPError, config: TokasaurusConfig) -> Failure:
    """An attempt that had no answer, or none that can be read."""
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
        return failed_time(config.address.url, config.timeout_s)
    if isinstance(error, httpx.TransportError):
        return failed_connection(error, config.address.url)
    return Failure(EngineError(f"{config.address.url}: {error}"), is_final=True)
