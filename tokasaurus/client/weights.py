"""New weights for an engine, in buckets that are safetensors files.

``tokasaurus.integrations.trainer`` makes buckets of a trainer's tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from tokasaurus.client.batches import deleted
from tokasaurus.client.connection import Connection
from tokasaurus.client.requests import Call, path
from tokasaurus.client.results import WeightsVersion

__all__ = ["AsyncWeights"]

_CHECKSUM = "X-Checksum-SHA256"
_ANSWER_S = 90.0


class AsyncWeights:
    """The weights of the engine. These routes need an admin key where the engine has one."""

    def __init__(self, connection: Connection, timeout_s: float | None) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    async def version(self) -> WeightsVersion:
        """The weights that run now."""
        return _version(await self._connection.json(self._call("GET", path("weight_info"))))

    async def begin(self, label: str | None = None, *, replace: bool = False) -> str:
        """Begins an update, once, however often the connection breaks.

        Args:
            label: of the new version; None is its number.
            replace: drops another update that was begun and not committed.

        Returns:
            The id of the update.

        Raises:
            Conflict: another update is unfinished.
        """
        body: dict[str, Any] = {"replace": replace}
        if label is not None:
            body["weight_version"] = label
        call = self._call("POST", path("v1", "weights", "updates"), body=body)
        update_id: str = (await self._connection.json(call))["id"]
        return update_id

    async def send(self, update_id: str, number: int, bucket: bytes) -> None:
        """Sends one bucket, in the place of an earlier one with this number.

        Args:
            update_id: of an update that was begun.
            number: of the bucket, from 0 on.
            bucket: a safetensors file.
        """
        checksum = {_CHECKSUM: hashlib.sha256(bucket).hexdigest()}
        where = path("v1", "weights", "updates", update_id, "buckets", str(number))
        await self._connection.json(self._call("PUT", where, content=bucket, headers=checksum))

    async def commit(self, update_id: str, num_buckets: int) -> WeightsVersion:
        """Lets the engine run the weights of all buckets. Requests that run go on with them.

        Raises:
            RequestError: the engine refuses them, and nothing has changed.
        """
        where = path("v1", "weights", "updates", update_id)

        async def committed() -> Any | None:
            update = await self._connection.json(self._call("GET", where))
            return update if update["status"] == "committed" else None

        call = self._call("POST", f"{where}/commit", body={"num_buckets": num_buckets})
        return _version(await self._connection.json(call, already=committed))

    async def discard(self, update_id: str) -> None:
        """Drops an update that is not committed. Raises NotFound."""
        where = path("v1", "weights", "updates", update_id)

        async def gone() -> Any | None:
            return await deleted(self._connection.json(self._call("GET", where)))

        await self._connection.json(self._call("DELETE", where), already=gone)

    # --- from a process group of torch.distributed, in which a trainer is rank 0 ------------------

    async def world_size(self) -> int:
        """How many ranks of a group the engine's workers take."""
        answer = await self._connection.json(self._call("GET", path("get_world_size")))
        size: int = answer["world_size"]
        return size

    async def join_group(
        self,
        group: str,
        address: str,
        port: int,
        *,
        first_rank: int,
        world_size: int,
        backend: str,
        timeout_s: float,
    ) -> None:
        """Lets the engine's workers join a group, in which all ranks are then.

        Args:
            group: its name.
            address, port: where the trainer listens.
            first_rank: of the engine's first worker.
            world_size: ranks of the group.
            backend: "gloo" or "nccl".
            timeout_s: for all ranks to come.
        """
        body = {
            "group_name": group,
            "master_address": address,
            "master_port": port,
            "rank_offset": first_rank,
            "world_size": world_size,
            "backend": backend,
            "timeout_s": timeout_s,
        }
        await self._connection.json(self._once("init_weights_update_group", body, timeout_s))

    async def start(self) -> None:
        """Begins an update by broadcasts, which ``finish`` ends."""
        await self._connection.json(self._call("POST", path("start_weight_update")))

    async def receive(
        self,
        group: str,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        timeout_s: float,
    ) -> None:
        """Lets the engine receive one broadcast of these tensors, each behind the other as bytes.

        It returns when the engine has them, so the broadcast goes on meanwhile. A message that is
        refused ends the group.
        """
        body = {
            "group_name": group,
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "load_format": "flattened_bucket",
            "timeout_s": timeout_s,
        }
        await self._connection.json(self._once("update_weights_from_distributed", body, timeout_s))

    async def finish(self, label: str | None = None) -> WeightsVersion:
        """Lets the engine run the weights that have come since ``start``.

        Raises:
            Conflict: tensors are missing; names them.
        """
        body = {} if label is None else {"weight_version": label}
        call = self._call("POST", path("finish_weight_update"), body=body, is_repeatable=False)
        return _version(await self._connection.json(call))

    async def leave_group(self, group: str) -> None:
        """Lets the engine's workers leave a group; harmless if they are in none."""
        where = path("destroy_weights_update_group")
        await self._connection.json(self._call("POST", where, body={"group_name": group}))

    def _once(self, where: str, body: dict[str, Any], timeout_s: float) -> Call:
        """A call that the engine answers after this time at the latest, or about."""
        limit = 2 * timeout_s + _ANSWER_S
        return Call("POST", path(where), body, timeout_s=limit, is_repeatable=False)

    def _call(self, method: str, where: str, **more: Any) -> Call:
        return Call(method, where, timeout_s=self._timeout_s, **more)


def _version(answer: Any) -> WeightsVersion:
    number = answer["weights_version"]
    return WeightsVersion(number, answer["weight_version"] or str(number))
