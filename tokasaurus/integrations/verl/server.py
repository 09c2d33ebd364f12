"""``TokasaurusHttpServer``: what veRL takes for a server, before an engine that runs elsewhere.

In veRL it is a Ray actor without a GPU. The class itself needs neither Ray nor veRL.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from tokasaurus.client.address import API_KEY_VARIABLE, first_key
from tokasaurus.errors import (
    AccessDenied,
    EngineError,
    NotFound,
    RequestError,
    RequestTooLong,
    TokasaurusError,
)
from tokasaurus.integrations.verl.cartridges import CartridgeUploads, shares_no_disk
from tokasaurus.integrations.verl.engine import Aborted, RemoteEngine
from tokasaurus.integrations.verl.forwarding import Forwarding
from tokasaurus.integrations.verl.gate import Flight, Gate
from tokasaurus.integrations.verl.generation import (
    Ask,
    RolloutDefaults,
    output_class,
    parse_completion,
    parse_prompt_logprobs,
    token_ids_of,
    token_output,
)
from tokasaurus.integrations.verl.options import checked_cartridges

__all__ = ["ADMIN_KEY_VARIABLE", "TokasaurusHttpServer", "key_from_environment"]

log = logging.getLogger(__name__)

ADMIN_KEY_VARIABLE = "TOKASAURUS_ADMIN_API_KEY"  # the engine reads it, too
_MEMORY = ("weights", "kv_cache")
_ABORT_EVERY_S = 0.1
_ABORT_LIMIT_S = 30.0  # for requests to end by themselves; what has not is dropped
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class TokasaurusHttpServer:
    """A server of the rollout. Its methods are those that veRL calls, in one event loop.

    Args:
        config: veRL's ``RolloutConfig``, or a mapping with some of its keys.
        tokasaurus_url: address of the engine.
        cartridges: ``{"id", "source", "force_redownload"}`` of each, before every prompt.
        max_retries: of a request, after its first attempt.
        base_timeout: seconds until a first attempt without an answer is looked into; of attempt k,
            1.5 ** k times as long.
        retry_delay: seconds before the first retry; before retry k, 2 ** (k - 1) times as long.
        startup_timeout: seconds that the engine may take to start, or to start again.
        cartridge_upload: "auto", "always" or "never", see ``RolloutOptions``.
        api_key: of the engine; default that of the environment.
        rollout_mode: "hybrid", "colocated" or "standalone", as veRL starts it. A standalone one
            keeps its memory.
        is_first_with_its_engine: false if another server gives the engine its commands.
        max_connections: requests under way at once.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        config: Any,
        tokasaurus_url: str,
        cartridges: Any = None,
        max_retries: int = 5,
        base_timeout: float = 120.0,
        retry_delay: float = 2.0,
        *,
        startup_timeout: float = 300.0,
        cartridge_upload: str = "auto",
        api_key: str | None = None,
        rollout_mode: str | None = None,
        is_first_with_its_engine: bool = True,
        max_connections: int = 1024,
    ) -> None:
        self._defaults = RolloutDefaults.of(config)
        self._mode = rollout_mode
        self._is_first = is_first_with_its_engine
        self._engine = RemoteEngine(
            tokasaurus_url,
            api_key=api_key or key_from_environment(),
            max_retries=max_retries,
            base_timeout_s=base_timeout,
            retry_delay_s=retry_delay,
            startup_timeout_s=startup_timeout,
            max_connections=max_connections,
        )
        self._cartridges = checked_cartridges(cartridges)
        # Positions of the cartridges that requests have now, once they are known.
        self._num_before: int | None = None
        self._uploads: CartridgeUploads | None = None
        if shares_no_disk(self._engine.url, cartridge_upload):
            self._uploads = CartridgeUploads(self._engine.cartridges)
        self._gate = Gate()
        self._global_steps: int | None = None
        self._engine_limit: int | None = None
        self._forwarding: Forwarding | None = None

    # --- its start --------------------------------------------------------------------------------

    async def launch_server(self, forward_on: str | None = None) -> str:
        """Waits for the engine, and makes sure that this server may use it.

        Args:
            forward_on: an address to open a port on, which leads to the engine; None opens none.

        Returns:
            ``host:port``, where the engine answers HTTP.

        Raises:
            EngineError: the engine does not serve in ``startup_timeout``.
            AccessDenied: it wants another key.
        """
        waiting = asyncio.ensure_future(self._engine.wait_until_ready())
        await asyncio.to_thread(output_class)  # imports veRL, which takes seconds
        await waiting
        self._engine_limit = await self._engine.max_model_len()
        await self._check_state()
        if forward_on is None:
            parts = urlsplit(self._engine.url)
            return f"{_bracketed(parts.hostname or 'localhost')}:{parts.port or 80}"
        self._forwarding = Forwarding(self._engine.url, forward_on)
        return f"{_bracketed(forward_on)}:{await self._forwarding.start()}"

    async def ping(self) -> bool:
        """Whether the engine serves now."""
        return await self._engine.serves()

    async def _check_state(self) -> None:
        """Looks what an earlier trainer may have left behind."""
        try:
            is_sleeping = (await self._engine.ask("/is_sleeping")).get("is_sleeping")
            is_paused = (await self._engine.ask("/is_paused")).get("is_paused")
        except AccessDenied as error:
            raise AccessDenied(
                f"{self._engine.url} lets this server give no commands, which veRL needs to abort"
                f" requests: {error}. Set {ADMIN_KEY_VARIABLE} to the engine's admin key where veRL"
                " starts"
            ) from None
        except NotFound:
            log.warning("%s takes no commands, so requests cannot be aborted", self._engine.url)
            return
        if is_sleeping and self._is_first:
            log.warning("%s sleeps, as an earlier trainer has left it: waking it", self._engine.url)
            await self._engine.command("/wake_up")
        elif is_paused:
            log.warning("%s is paused: requests wait for POST /resume", self._engine.url)

    # --- requests ---------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: Any,
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Any = None,
        **others: Any,
    ) -> Any:
        """Continues a prompt.

        Args:
            prompt_ids: a list of token ids, an array or a tensor.
            sampling_params: in veRL's words; it is not changed.
            request_id: by which the engine's log and commands know the request.
            image_data, video_data, audio_data, mm_processor_kwargs: refused unless empty.
            others: have no effect.

        Returns:
            A ``TokenOutput``. Of an aborted request it has the tokens so far, and the
            ``stop_reason`` "aborted". With ``prompt_logprobs`` among the parameters, its
            ``extra_fields`` have those of the prompt.

        Raises:
            RequestError: the request is wrong; names the field.
            EngineError: the engine cannot be reached, or cannot answer; retries did not help.
        """
        media = {
            "image_data": image_data,
            "video_data": video_data,
            "audio_data": audio_data,
            "mm_processor_kwargs": mm_processor_kwargs,
        }
        for name, value in media.items():
            if value is not None and len(value):
                raise RequestError(f"{name} must be empty: the engine reads text only", name)
        ids = token_ids_of(prompt_ids)
        return await self._through_gate(ids, sampling_params, request_id, has_cartridges=True)

    async def get_teacher_logprobs(
        self,
        prompt_ids: Any,
        response_ids: Any,
        document_ids: Any,
        request_id: str,
    ) -> list[float]:
        """Logprobs of an answer, for a model that has read the document instead of cartridges.

        Args:
            prompt_ids: of the prompt that was answered; may be empty.
            response_ids: of the answer.
            document_ids: of the text before the prompt; may be empty.
            request_id: as of :meth:`generate`.

        Returns:
            One logprob for each token of the answer, of the model's own distribution.

        Raises:
            RequestError, EngineError: as of :meth:`generate`.
        """
        before = [*_maybe_ids(document_ids), *_maybe_ids(prompt_ids)]
        answer = token_ids_of(response_ids)
        if not before:
            raise RequestError(
                "document_ids and prompt_ids are empty: the first token of an answer has a logprob"
                " only behind another token",
                "prompt_ids",
            )
        asked = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        output = await self._through_gate(
            [*before, *answer], asked, request_id, has_cartridges=False
        )
        rows = output.extra_fields.get("prompt_logprobs")
        if rows is None:
            raise EngineError("requests are turned away until this server is resumed")
        return [row[0] for row in rows[len(before) - 1 : -1]]

    async def _through_gate(
        self,
        ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        *,
        has_cartridges: bool,
    ) -> Any:
        """The output of a request, once it is let in. Prompt logprobs outlive an abort."""
        request_id = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        while await self._gate.admits():
            with self._gate.flight(request_id) as flight:
                try:
                    cartridges = self._cartridges if has_cartridges else ()
                    return await self._answer(ids, sampling_params, flight, cartridges)
                except Aborted:
                    if sampling_params.get("prompt_logprobs") is None:
                        break
        return token_output([], None, "aborted", global_steps=self._global_steps)

    async def _answer(
        self,
        ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        flight: Flight,
        cartridges: Sequence[Mapping[str, Any]],
    ) -> Any:
        """The output of a request that was let in; asks again where that may help."""
        num_before = (self._num_before or 0) if cartridges else 0
        try:
            ask, answer = await self._ask(ids, sampling_params, flight, cartridges, num_before)
        except RequestError as error:
            learnt = await self._learnt(error, cartridges, num_before) if cartridges else None
            if learnt is None:
                raise
            ask, answer = await self._ask(ids, sampling_params, flight, cartridges, learnt)
        if ask.num_prompt_logprobs is None:
            output = self._parse(answer, ask.has_logprobs)
        else:
            output = parse_prompt_logprobs(answer, ask)
        output.extra_fields.setdefault("global_steps", self._global_steps)
        return output

    async def _ask(
        self,
        ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        flight: Flight,
        cartridges: Sequence[Mapping[str, Any]],
        num_before: int,
    ) -> tuple[Ask, dict[str, Any]]:
        ask = self._defaults.ask(
            ids,
            sampling_params,
            request_id=flight.request_id,
            engine_limit=await self._limit(),
            num_before=num_before,
        )
        named = await self._named(cartridges)
        body = {**ask.body, "cartridges": named} if named else ask.body
        answer = await self._post(ask.path, body, request_id=flight.request_id, flight=flight)
        return ask, answer

    async def _post(
        self,
        endpoint: str,
        payload: Mapping[str, Any],
        *,
        request_id: str | None = None,
        flight: Flight | None = None,
    ) -> dict[str, Any]:
        """The JSON of an answer; see ``RemoteEngine.post``."""
        return await self._engine.post(endpoint, payload, request_id=request_id, flight=flight)

    @staticmethod
    def _parse(response: Mapping[str, Any], return_logprob: bool) -> Any:
        """The ``TokenOutput`` of an answer; see ``parse_completion``."""
        return parse_completion(response, return_logprob)

    async def _limit(self) -> int | None:
        """The engine's limit of tokens, which is asked for once."""
        if self._engine_limit is None and self._defaults.max_model_len is None:
            try:
                self._engine_limit = await self._engine.max_model_len()
            except TokasaurusError:
                return None  # the request itself will say what is wrong
        return self._engine_limit

    # --- cartridges -------------------------------------------------------------------------------

    async def update_cartridges(self, cartridges: Any) -> None:
        """Requests that come from now on have these cartridges, and no others.

        Raises:
            ConfigError: one of them is wrong; says which.
            RequestError, EngineError: one has to be uploaded, and cannot be.
        """
        checked = checked_cartridges(cartridges)
        await self._named(checked)
        self._cartridges, self._num_before = checked, None

    async def _named(self, cartridges: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if self._uploads is None:
            return [dict(each) for each in cartridges]
        return await self._uploads.named(cartridges)

    async def _learnt(
        self, error: RequestError, cartridges: Sequence[Mapping[str, Any]], num_before: int
    ) -> int | None:
        """The positions of the cartridges, if a refused request may be sent again with them.

        A request may be too long, since how long its cartridges are was not known, or they are
        others by now. And an engine that started anew has lost what was uploaded.
        """
        if isinstance(error, RequestTooLong):
            is_present = cartridges is self._cartridges  # not replaced meanwhile
            if is_present and self._num_before is not None and self._num_before != num_before:
                return self._num_before  # another request has found it out
            found = [
                await self._engine.cartridges.get(each["id"], source=each.get("source", "wandb"))
                for each in await self._named(cartridges)
            ]
            now = sum(each.tokens for each in found)
            if cartridges is self._cartridges:
                self._num_before = now
            return None if now == num_before else now
        if self._uploads is not None and (error.field or "").startswith("cartridges"):
            self._uploads.forget()
            return num_before
        return None

    # --- aborting ---------------------------------------------------------------------------------

    async def abort_all_requests(
        self, reset_prefix_cache: bool = True, reject_request: bool = False
    ) -> dict[str, Any]:
        """Ends this server's requests, each with the tokens so far, and lets none in.

        Other clients of the engine go on. Returns when no request is under way.

        Args:
            reset_prefix_cache: drop the prefix cache, too.
            reject_request: requests that come are told that they are aborted, instead of waiting
                for :meth:`resume_generation`.

        Returns:
            ``aborted_count`` and ``request_ids``.

        Raises:
            RequestError, EngineError: the engine refuses the command, or cannot be reached.
        """
        self._gate.close(turn_away=reject_request)
        request_ids = sorted({flight.request_id for flight in self._gate.flights})
        await self._end_flights()
        if reset_prefix_cache:
            await self.clear_kv_cache()
        log.info("aborted %d requests", len(request_ids))
        return {"aborted_count": len(request_ids), "request_ids": request_ids}

    async def _end_flights(self) -> None:
        """Aborts until none is under way: a request may still be on its way to the engine."""
        drops_at = time.monotonic() + _ABORT_LIMIT_S
        while flights := [*self._gate.flights]:
            for flight in flights:
                flight.is_aborted.set()
            if time.monotonic() > drops_at:
                log.warning("%d requests did not end, and are dropped", len(flights))
                for flight in flights:
                    flight.is_dropped.set()
            try:
                ids = [flight.request_id for flight in flights]
                await self._engine.command(
                    "/abort_requests", {"request_ids": ids}, limit_s=_ABORT_LIMIT_S / 3
                )
            except EngineError as error:
                log.warning("requests cannot be aborted now: %s", error)
            overs = [asyncio.ensure_future(flight.is_over.wait()) for flight in flights]
            await asyncio.wait(overs, timeout=_ABORT_EVERY_S)
            for over in overs:
                over.cancel()

    async def resume_generation(self) -> None:
        """Lets requests in again, and those that wait."""
        self._gate.open()

    # --- memory -----------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Releases the engine's weights and KV cache, if ``free_cache_engine`` says so."""
        if self._mode != "standalone":
            await self._release(_MEMORY)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Restores what ``tags`` names of "weights" and "kv_cache"; default both."""
        if self._mode != "standalone":
            await self._restore(_MEMORY if tags is None else tags)

    async def release_kv_cache(self) -> None:
        """Releases the engine's KV cache, if ``free_cache_engine`` says so."""
        if self._mode != "colocated":
            await self._release(("kv_cache",))

    async def resume_kv_cache(self) -> None:
        """Restores the engine's KV cache."""
        if self._mode != "colocated":
            await self._restore(("kv_cache",))

    async def clear_kv_cache(self) -> None:
        """Drops what the engine has cached of prompts."""
        await self._engine.command("/flush_cache")

    async def _release(self, tags: Sequence[str]) -> None:
        if self._is_first and self._defaults.free_cache_engine:
            await self._engine.command("/release_memory_occupation", {"tags": [*tags]})

    async def _restore(self, tags: Sequence[str]) -> None:
        known = [tag for tag in tags if tag in _MEMORY]
        if not (self._is_first and self._defaults.free_cache_engine and known):
            return
        answer = await self._engine.command("/resume_memory_occupation", {"tags": known})
        if answer.get("message"):
            log.warning("%s: %s", self._engine.url, answer["message"])

    # --- the rest of what veRL calls --------------------------------------------------------------

    async def set_global_steps(self, global_steps: int) -> None:
        """Which of the trainer's steps the weights are from."""
        self._global_steps = global_steps

    async def start_profile(self, **options: Any) -> None:
        """Says that the engine is not profiled from here."""
        log.warning(
            "veRL's profiler does not reach the engine at %s; its /metrics say what it does",
            self._engine.url,
        )

    async def stop_profile(self) -> None:
        """Ends what :meth:`start_profile` has begun, which is nothing."""

    def engine_access(self) -> tuple[str, str | None]:
        """Address and key of the engine, for those that send it weights."""
        return self._engine.url, self._engine.address.api_key

    async def close(self) -> None:
        """Closes all connections; requests under way fail."""
        if self._forwarding is not None:
            await self._forwarding.close()
        await self._engine.close()


def key_from_environment() -> str | None:
    """The key for the engine: an admin key is good for everything."""
    for name in (ADMIN_KEY_VARIABLE, API_KEY_VARIABLE):
        key = first_key(os.environ.get(name, ""))
        if key:
            return key
    return None


def _maybe_ids(ids: Any) -> list[int]:
    return token_ids_of(ids) if ids is not None and len(ids) else []


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
