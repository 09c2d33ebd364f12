"""New weights that a trainer broadcasts, under the names of SGLang and of vLLM.

The trainer is rank 0 of a process group of torch.distributed, and the workers are the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import RequestError
from tokasaurus.protocol.commands import AbortAll, JoinWeightsGroup
from tokasaurus.server.control.commands import CommandRunner
from tokasaurus.server.control.trainer_groups import Tensors, TrainerGroups
from tokasaurus.server.control.weights_updates import WeightsUpdates
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.bodies import read_optional_json
from tokasaurus.server.http.queries import read_query, truth
from tokasaurus.server.operations.schemas import RequestBody, parse
from tokasaurus.server.routes.control_bodies import (
    BodyRoute,
    ControlBody,
    Label,
    add_routes_with_bodies,
    read_body,
)
from tokasaurus.server.state import EngineState

__all__ = ["WEIGHTS_GROUP_SCHEMAS", "WeightsGroupRoutes"]

DEFAULT_GROUP = "weight_update_group"
"""SGLang's."""

_DEFAULT_TIMEOUT_S = 300.0
_LONGEST_S = 3600.0
_ANY = (True, False)

_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Seconds = Annotated[float, Field(gt=0, le=_LONGEST_S)]
_Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1)]
_Shape = list[Annotated[int, Field(ge=0, le=2**40)]]


class _GroupPlace(ControlBody):
    master_address: _Name
    """The trainer listens there: the name or address of its machine."""
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1, le=1_000_000)]
    """The rank of the engine's first worker in the group; the trainer has 0."""
    world_size: Annotated[int, Field(ge=2, le=1_000_000)]
    """Ranks of the group: the trainer, and all workers of all engines."""
    group_name: _Name | None = None
    """The same as the trainer's; default ``weight_update_group``."""
    backend: Literal["gloo", "nccl"] | None = None
    """Default: ``nccl`` on CUDA devices, else ``gloo``."""
    timeout_s: _Seconds | None = None
    """For all ranks to come; default 300."""


class InitWeightsUpdateGroup(_GroupPlace):
    """``POST /init_weights_update_group``."""


class DestroyWeightsUpdateGroup(ControlBody):
    """``POST /destroy_weights_update_group``."""

    group_name: _Name | None = None
    """Default ``weight_update_group``."""


class UpdateWeightsFromDistributed(ControlBody):
    """``POST /update_weights_from_distributed``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "flush_cache": _ANY,  # pages of other weights are never used
        "torch_empty_cache": _ANY,
    }

    names: _Names
    """Of the tensors, in the order in which they are broadcast."""
    dtypes: list[str]
    """As torch writes them, such as ``bfloat16``."""
    shapes: list[_Shape]
    group_name: _Name | None = None
    """Default ``weight_update_group``."""
    load_format: Literal["flattened_bucket"] | None = None
    """``flattened_bucket``: one broadcast of the bytes of all tensors, one behind the other."""
    abort_all_requests: bool | None = None
    """End all requests first, with the tokens that they have. Default false: they go on, with the
    new weights."""
    weight_version: Label | None = None
    """The label of the new version, the same in all messages of an update; default: its number."""
    timeout_s: _Seconds | None = None
    """For all of these tensors; default 300."""


class _InitInfo(_GroupPlace):
    packed: Literal[False] | None = None
    """Each tensor has a broadcast of its own."""
    packed_buffer_size_bytes: int | None = None
    """Changes nothing, and neither does ``packed_num_buffers``: they are about packed tensors."""
    packed_num_buffers: int | None = None


class InitWeightTransferEngine(ControlBody):
    """``POST /init_weight_transfer_engine``."""

    init_info: _InitInfo


class ShutdownWeightTransferEngine(ControlBody):
    """``POST /shutdown_weight_transfer_engine``."""

    group_name: _Name | None = None
    """Default ``weight_update_group``."""


class StartWeightUpdate(ControlBody):
    """``POST /start_weight_update``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {"is_checkpoint_format": (True,)}


class _UpdateInfo(ControlBody):
    names: _Names
    dtype_names: list[str]
    shapes: list[_Shape]
    packed: Literal[False] | None = None
    group_name: _Name | None = None
    timeout_s: _Seconds | None = None


class UpdateWeightsOfGroup(ControlBody):
    """``POST /update_weights``."""

    update_info: _UpdateInfo


class FinishWeightUpdate(ControlBody):
    """``POST /finish_weight_update``."""

    weight_version: Label | None = None
    """The label of the new version; default: its number."""


WEIGHTS_GROUP_SCHEMAS: tuple[type[RequestBody], ...] = (
    InitWeightsUpdateGroup,
    DestroyWeightsUpdateGroup,
    UpdateWeightsFromDistributed,
    InitWeightTransferEngine,
    ShutdownWeightTransferEngine,
    StartWeightUpdate,
    UpdateWeightsOfGroup,
    FinishWeightUpdate,
)


class WeightsGroupRoutes:
    """The routes.

    Args:
        config: the server's slice.
        state: of the engine.
        updates: the weights that came over HTTP.
    """

    def __init__(self, config: ServerConfig, state: EngineState, updates: WeightsUpdates) -> None:
        self._config, self._state = config, state
        self._runner = CommandRunner(state)
        self._groups = TrainerGroups(self._runner, updates)

    def router(self) -> APIRouter:
        router = APIRouter()
        with_body: list[BodyRoute] = [
            ("/init_weights_update_group", self.init_group, InitWeightsUpdateGroup),
            ("/destroy_weights_update_group", self.destroy_group, DestroyWeightsUpdateGroup),
            (
                "/update_weights_from_distributed",
                self.update_from_distributed,
                UpdateWeightsFromDistributed,
            ),
            ("/init_weight_transfer_engine", self.init_transfer, InitWeightTransferEngine),
            (
                "/shutdown_weight_transfer_engine",
                self.shut_transfer_down,
                ShutdownWeightTransferEngine,
            ),
            ("/start_weight_update", self.start_update, StartWeightUpdate),
            ("/update_weights", self.update_weights, UpdateWeightsOfGroup),
            ("/finish_weight_update", self.finish_update, FinishWeightUpdate),
        ]
        add_routes_with_bodies(router, with_body)
        router.add_api_route(
            "/get_world_size", self.world_size, methods=["GET"], response_model=None
        )
        return router

    # --- SGLang's ---------------------------------------------------------------------------------

    async def init_group(self, request: Request) -> Response:
        """Lets all workers join a group of torch.distributed, in which the trainer is rank 0."""
        group = await self._join(await read_body(request, InitWeightsUpdateGroup))
        return json_answer(
            {"success": True, "message": f"Succeeded to initialize the group {group!r}."}
        )

    async def destroy_group(self, request: Request) -> Response:
        """Lets all workers leave a group; tensors of an unfinished update are dropped."""
        body = await read_body(request, DestroyWeightsUpdateGroup)
        group = body.group_name or DEFAULT_GROUP
        await self._groups.leave(group)
        return json_answer({"success": True, "message": f"The group {group!r} is left."})

    async def update_from_distributed(self, request: Request) -> Response:
        """Receives tensors of the next weights, which replace the present ones when all are there.

        A message that is refused ends the group: the trainer may have sent its tensors already.
        """
        self._state.check()
        body = await read_optional_json(request)
        try:
            message = parse(body, UpdateWeightsFromDistributed)
            tensors = _tensors(
                message.names, message.dtypes, message.shapes, "dtypes", bool(message.load_format)
            )
        except RequestError:
            await self._groups.leave(_group_of(body))
            raise
        if message.abort_all_requests:
            await self._runner.run(AbortAll())
        done = await self._groups.receive(
            message.group_name or DEFAULT_GROUP,
            tensors,
            message.weight_version,
            message.timeout_s or _DEFAULT_TIMEOUT_S,
        )
        label = self._runner.commands.weights.label(done.weights_version)
        said = f"Succeeded to update model weights. Weight version is {label}."
        return json_answer(
            {
                "success": True,
                "message": said if done.has_all_tensors else "These tensors are here.",
                "complete": done.has_all_tensors,
                "weight_version": label,
                "weights_version": done.weights_version,
            }
        )

    # --- vLLM's -----------------------------------------------------------------------------------

    async def init_transfer(self, request: Request) -> Response:
        """Lets all workers join a group of torch.distributed, in which the trainer is rank 0."""
        await self._join((await read_body(request, InitWeightTransferEngine)).init_info)
        return json_answer({"message": "Weight transfer initialized"})

    async def shut_transfer_down(self, request: Request) -> Response:
        """Lets all workers leave a group; tensors of an unfinished update are dropped."""
        body = await read_body(request, ShutdownWeightTransferEngine)
        await self._groups.leave(body.group_name or DEFAULT_GROUP)
        return json_answer({"message": "Weight transfer shut down"})

    async def start_update(self, request: Request) -> Response:
        """Begins an update, which /finish_weight_update ends."""
        self._state.check()
        await read_body(request, StartWeightUpdate)
        self._groups.begin()
        return json_answer({"message": "Weight update started"})

    async def update_weights(self, request: Request) -> Response:
        """Receives tensors of the next weights."""
        self._state.check()
        body = await read_optional_json(request)
        try:
            info = parse(body, UpdateWeightsOfGroup).update_info
            tensors = _tensors(info.names, info.dtype_names, info.shapes, "dtype_names", False)
        except RequestError:
            info_or_none = body.get("update_info") if isinstance(body, dict) else None
            await self._groups.leave(_group_of(info_or_none))
            raise
        await self._groups.receive(
            info.group_name or DEFAULT_GROUP, tensors, None, info.timeout_s or _DEFAULT_TIMEOUT_S
        )
        return json_answer({"message": "Weights updated"})

    async def finish_update(self, request: Request) -> Response:
        """Replaces the weights by those that have come since /start_weight_update."""
        self._state.check()
        body = await read_body(request, FinishWeightUpdate)
        done = await self._groups.finish(body.weight_version)
        label = self._runner.commands.weights.label(done.weights_version)
        return json_answer(
            {
                "message": "Weight update finished",
                "weight_version": label,
                "weights_version": done.weights_version,
            }
        )

    async def world_size(self, request: Request) -> Response:
        """How many ranks of a group the engine's workers take."""
        with_replicas = truth(read_query(request, ("include_dp",)), "include_dp", default=True)
        num_replicas = self._config.num_replicas if with_replicas else 1
        return json_answer({"world_size": num_replicas * self._config.num_workers})

    async def _join(self, place: _GroupPlace) -> str:
        self._state.check()
        own = self._config.num_replicas * self._config.num_workers
        if place.rank_offset + own > place.world_size:
            raise RequestError(
                f"world_size is {place.world_size}, and this engine's workers take the ranks"
                f" {place.rank_offset} to {place.rank_offset + own - 1}; GET /get_world_size says"
                " how many they are",
                "world_size",
            )
        group = place.group_name or DEFAULT_GROUP
        await self._groups.join(
            JoinWeightsGroup(
                group,
                place.master_address,
                place.master_port,
                place.rank_offset,
                place.world_size,
                place.backend or "",
                place.timeout_s or _DEFAULT_TIMEOUT_S,
            )
        )
        return group


def _tensors(
    names: list[str], dtypes: list[str], shapes: list[_Shape], dtypes_field: str, is_flat: bool
) -> Tensors:
    """Raises RequestError if there is not one dtype and one shape for each name."""
    for field, values in ((dtypes_field, dtypes), ("shapes", shapes)):
        if len(values) != len(names):
            raise RequestError(
                f"{field} has {len(values)} entries for {len(names)} names; each tensor needs one",
                field,
            )
    return Tensors(tuple(names), tuple(dtypes), tuple(tuple(each) for each in shapes), is_flat)


def _group_of(body: Any) -> str:
    """The group that a message is about, even if the message is wrong."""
    name = body.get("group_name") if isinstance(body, dict) else None
    return name if isinstance(name, str) and name else DEFAULT_GROUP
