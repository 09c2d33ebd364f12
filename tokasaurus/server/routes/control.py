"""Control of a running engine, under the names of vLLM and of SGLang.

Pausing, aborting, releasing memory, and new weights from files. ``routes.weights`` takes new
weights over HTTP, and ``routes.weights_groups`` takes them from the process group of a trainer.
All these routes need an admin key; see ``http.access``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tokasaurus.errors import Conflict, RequestError, TokasaurusError
from tokasaurus.protocol.commands import (
    AbortAll,
    CommandDone,
    FlushCache,
    Pause,
    PauseMode,
    ReleaseMemory,
    RestoreMemory,
    Resume,
)
from tokasaurus.server.control.commands import CommandRunner
from tokasaurus.server.control.weight_files import weight_files
from tokasaurus.server.control.weights_updates import WeightsUpdates
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.queries import choice, choices, read_query, truth, whole_number
from tokasaurus.server.operations.schemas import RequestBody
from tokasaurus.server.routes.control_bodies import (
    BodyRoute,
    ControlBody,
    Label,
    add_routes_with_bodies,
    read_body,
)
from tokasaurus.server.state import EngineState
from tokasaurus.text.commands import MEMORY_KINDS, PAUSE_MODES
from tokasaurus.text.params import renamed

__all__ = ["CONTROL_SCHEMAS", "ControlRoutes"]

_SGLANG_MODES = {
    "abort": PauseMode.ABORT,
    "retract": PauseMode.KEEP,
    "in_place": PauseMode.KEEP,
}
_ANY = (True, False)


class PauseGeneration(ControlBody):
    """``POST /pause_generation``."""

    mode: Literal["abort", "retract", "in_place"] | None = None
    """``abort`` (default) ends all requests with the tokens that they have. ``retract`` and
    ``in_place`` keep them: they go on after /continue_generation, with their KV computed again."""


class ContinueGeneration(ControlBody):
    """``POST /continue_generation``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {"torch_empty_cache": _ANY}


class AbortRequestBody(ControlBody):
    """``POST /abort_request``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {"abort_message": (str,)}

    rid: str | None = None
    """The ``rid`` of a request to /generate, or the ``request_id`` or ``X-Request-Id`` of any
    request."""
    abort_all: bool | None = None

    def check(self) -> None:
        super().check()
        if not self.rid and not self.abort_all:
            raise RequestError("rid is required unless abort_all is true", "rid")


class AbortRequests(ControlBody):
    """``POST /abort_requests``."""

    request_ids: list[str] | None = None
    """The ``request_id`` of each request, its ``rid`` or its ``X-Request-Id``; without any, all
    requests."""


class MemoryBody(ControlBody):
    """``POST /release_memory_occupation`` and ``POST /resume_memory_occupation``."""

    tags: list[Literal["weights", "kv_cache", "cuda_graph"]] | None = None
    """Default: all. ``cuda_graph`` changes nothing."""

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(MEMORY_KINDS if self.tags is None else self.tags) & {*MEMORY_KINDS}


class UpdateWeightsFromDisk(ControlBody):
    """``POST /update_weights_from_disk``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "flush_cache": _ANY,  # pages of other weights are never used
        "is_async": _ANY,
        "keep_pause": (False,),
        "manifest": (),
        "recapture_cuda_graph": _ANY,
        "token_step": (int,),
        "torch_empty_cache": _ANY,
    }

    model_path: Annotated[str, Field(min_length=1)]
    """A directory on the engine's machine with safetensors files, or one such file."""
    load_format: Literal["auto", "safetensors"] | None = None
    abort_all_requests: bool | None = None
    """End all requests first, with the tokens that they have. Default false: they go on, with the
    new weights."""
    weight_version: Label | None = None
    """The label of the new version; default: its number."""


class UpdateWeightVersion(ControlBody):
    """``POST /update_weight_version``."""

    new_version: Label
    """The label of the present weights."""
    abort_all_requests: bool | None = None
    """Default false."""


CONTROL_SCHEMAS: tuple[type[RequestBody], ...] = (
    PauseGeneration,
    ContinueGeneration,
    AbortRequestBody,
    AbortRequests,
    MemoryBody,
    UpdateWeightsFromDisk,
    UpdateWeightVersion,
)


class ControlRoutes:
    """The routes.

    Args:
        state: of the engine.
        updates: the weights that came over HTTP; their files go when others replace them.
    """

    def __init__(self, state: EngineState, updates: WeightsUpdates) -> None:
        self._state = state
        self._runner = CommandRunner(state)
        self._updates = updates

    def router(self) -> APIRouter:
        router = APIRouter()
        with_body: list[BodyRoute] = [
            ("/pause_generation", self.pause_generation, PauseGeneration),
            ("/continue_generation", self.continue_generation, ContinueGeneration),
            ("/abort_request", self.abort_request, AbortRequestBody),
            ("/abort_requests", self.abort_requests, AbortRequests),
            ("/release_memory_occupation", self.release_memory, MemoryBody),
            ("/resume_memory_occupation", self.restore_memory, MemoryBody),
            ("/update_weights_from_disk", self.update_from_disk, UpdateWeightsFromDisk),
            ("/update_weight_version", self.rename_version, UpdateWeightVersion),
        ]
        add_routes_with_bodies(router, with_body)
        without_body: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
            ("POST", "/pause", self.pause),
            ("POST", "/resume", self.resume),
            ("GET", "/is_paused", self.is_paused),
            ("POST", "/sleep", self.sleep),
            ("POST", "/wake_up", self.wake_up),
            ("GET", "/is_sleeping", self.is_sleeping),
            ("GET", "/weight_info", self.weight_version),
            ("GET", "/get_weight_version", self.weight_version),
            ("POST", "/update_weights_from_tensor", self.update_otherwise),
            ("POST", "/update_weights_from_ipc", self.update_otherwise),
        ]
        for method, path, simple in without_body:
            router.add_api_route(path, simple, methods=[method], response_model=None, name=path)
        return router

    # --- pausing ----------------------------------------------------------------------------------

    async def pause(self, request: Request) -> Response:
        """Plans no more batches, as vLLM does; requests are accepted and wait."""
        query = read_query(request, ("mode", "clear_cache", "wait_for_inflight_requests"))
        mode = PAUSE_MODES[choice(query, "mode", (*PAUSE_MODES,))]
        if truth(query, "wait_for_inflight_requests", default=False):
            mode = PauseMode.DRAIN
        flush = (FlushCache(),) if truth(query, "clear_cache", default=True) else ()
        await self._runner.run(Pause(mode), *flush)
        return json_answer({"status": "paused"})

    async def resume(self) -> Response:
        """Plans batches again."""
        await self._resume()
        return json_answer({"status": "resumed"})

    async def is_paused(self) -> Response:
        """Whether the engine is paused."""
        return json_answer({"is_paused": self._runner.commands.is_paused})

    async def pause_generation(self, request: Request) -> Response:
        """Plans no more batches, as SGLang does; requests are accepted and wait."""
        body = await read_body(request, PauseGeneration)
        await self._runner.run(Pause(_SGLANG_MODES[body.mode or "abort"]))
        return json_answer({"status": "ok", "message": "Generation paused successfully."})

    async def continue_generation(self, request: Request) -> Response:
        """Plans batches again."""
        await read_body(request, ContinueGeneration)
        await self._resume()
        return json_answer({"status": "ok", "message": "Generation continued successfully."})

    async def _resume(self) -> None:
        await self._runner.run(Resume())

    # --- aborting ---------------------------------------------------------------------------------

    async def abort_request(self, request: Request) -> Response:
        """Ends one request, or all; each is answered with the tokens that it has."""
        body = await read_body(request, AbortRequestBody)
        names = None if body.abort_all else [body.rid or ""]
        return json_answer({"status": "aborted", "aborted": await self._abort(names)})

    async def abort_requests(self, request: Request) -> Response:
        """Ends requests; each is answered with the tokens that it has."""
        body = await read_body(request, AbortRequests)
        return json_answer({"status": "aborted", "aborted": await self._abort(body.request_ids)})

    async def _abort(self, names: Sequence[str] | None) -> int:
        """Ends the requests with these names, or all; returns the number of sequences."""
        if not names:
            (done,) = await self._runner.run(AbortAll())
            return done.num_sequences
        generations = self._state.engine().generations
        found = {each.request_id: each for name in names for each in generations.named(name)}
        for generation in found.values():
            generations.cut_short(generation)
        return sum(len(each.samples) for each in found.values())

    # --- memory -----------------------------------------------------------------------------------

    async def sleep(self, request: Request) -> Response:
        """Pauses and, above level 0, releases the memory of weights and KV cache."""
        query = read_query(request, ("level", "mode"))
        level = whole_number(query, "level", 1, 0, 2)
        mode = PAUSE_MODES[choice(query, "mode", (*PAUSE_MODES,))]
        release = (ReleaseMemory(weights=True, kv_cache=True),) if level else ()
        with self._runner.commands.falling_asleep():
            await self._runner.run(Pause(mode), *release)
        return json_answer({"status": "sleeping"})

    async def wake_up(self, request: Request) -> Response:
        """Restores memory; once all is restored, the engine runs again if a sleep paused it."""
        tags = choices(request, "tags", (*MEMORY_KINDS, "scheduling"))
        await self._restore(frozenset(MEMORY_KINDS if tags is None else tags) & {*MEMORY_KINDS})
        commands = self._runner.commands
        if commands.wake_resumes and not commands.released:
            if commands.lacks_weights:
                raise Conflict(
                    "the memory is restored, but the files of the weights are gone or have changed:"
                    " update the weights, then POST /resume"
                )
            await self._resume()
        return json_answer({"status": "sleeping" if commands.released else "awake"})

    async def is_sleeping(self) -> Response:
        """Whether memory is released, or a sleep has paused the engine."""
        commands = self._runner.commands
        paused = commands.wake_resumes and commands.is_paused
        return json_answer({"is_sleeping": bool(commands.released) or paused})

    async def release_memory(self, request: Request) -> Response:
        """Releases memory; requests wait until it is restored."""
        kinds = (await read_body(request, MemoryBody)).kinds
        if kinds - self._runner.commands.released:
            await self._runner.run(ReleaseMemory("weights" in kinds, "kv_cache" in kinds))
        return json_answer({"status": "ok"})

    async def restore_memory(self, request: Request) -> Response:
        """Restores released memory."""
        await self._restore((await read_body(request, MemoryBody)).kinds)
        if self._runner.commands.lacks_weights:
            waits = "requests wait for an update: the files of the weights are gone or have changed"
            return json_answer({"status": "ok", "message": waits})
        return json_answer({"status": "ok"})

    async def _restore(self, kinds: frozenset[str]) -> None:
        kinds &= self._runner.commands.released
        if kinds:
            await self._runner.run(RestoreMemory("weights" in kinds, "kv_cache" in kinds))

    # --- weights ----------------------------------------------------------------------------------

    async def update_from_disk(self, request: Request) -> Response:
        """Replaces the weights by those of a directory on the engine's machine."""
        body = await read_body(request, UpdateWeightsFromDisk)
        files = await asyncio.to_thread(weight_files, body.model_path)
        if body.abort_all_requests:
            await self._runner.run(AbortAll())

        def on_done(result: CommandDone | TokasaurusError) -> None:
            if isinstance(result, CommandDone):
                self._updates.replaced()

        try:
            done = await self._runner.update_weights(files, on_done, label=body.weight_version)
        except RequestError as error:
            raise renamed(error, {"files": "model_path", "checksums": "model_path"}) from None
        label = self._runner.commands.weights.label(done.weights_version)
        return json_answer(
            {
                "success": True,
                "message": f"Succeeded to update model weights. Weight version is {label}.",
                "num_paused_requests": 0,
                "weight_version": label,
                "weights_version": done.weights_version,
            }
        )

    async def update_otherwise(self) -> Response:
        """Refused: says which routes take new weights."""
        raise RequestError(
            "this engine unpickles nothing: send tensors as safetensors to POST"
            " /v1/weights/updates, broadcast them with POST /update_weights_from_distributed, or"
            " name a directory to POST /update_weights_from_disk"
        )

    async def rename_version(self, request: Request) -> Response:
        """Gives the present weights another label."""
        body = await read_body(request, UpdateWeightVersion)
        if body.abort_all_requests:
            await self._runner.run(AbortAll())
        self._runner.commands.weights.rename(body.new_version)
        message = f"Weight version updated to {body.new_version}"
        return json_answer({"success": True, "message": message, "new_version": body.new_version})

    async def weight_version(self) -> Response:
        """The version of the weights that run now."""
        weights = self._runner.commands.weights
        return json_answer({"weight_version": weights.label(), "weights_version": weights.version})
