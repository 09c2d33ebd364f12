"""The workers of a replica, as one of them sees them: where it stands, and how they agree.

Ranks are dealt to stages of the pipeline, and within a stage to the shards of each layer::

    pp_size=2 tp_size=2      stage 0          stage 1
                             rank 0, 1   ──▶  rank 2, 3
                                              └ samples, and answers the manager

Every rank gets every batch and every control. What they decide together goes through ``agreed`` and
its siblings: then all of them have called it, in the same order.

They talk by torch.distributed: gloo for tensors of the host, NCCL for those of CUDA devices.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from tokasaurus.errors import EngineError

__all__ = ["Ranks", "naming_loss"]

# The supervisor ends a replica when one of its processes ends, and the manager tells when one
# hangs. So no rank gives up by itself.
_TIMEOUT = timedelta(days=365)

# Bytes of a reason that ranks tell one another.
_REASON_BYTES = 2048

# A rank that loses another one waits for this long before it ends: the supervisor first hears of
# the other's end, which is the cause.
_BEFORE_FAILING_S = 3.0


class Ranks:
    """One worker among those of its replica. Alone, it agrees with itself.

    Args:
        rank: of this worker: stage * tp_size + tp_rank.
        tp_size: workers of a stage.
        pp_size: stages.
        rendezvous: where the workers of this replica meet, as torch.distributed writes it:
            ``file://`` and a path that is not used twice, or ``tcp://`` and the address of rank 0,
            where ``?listener_fd=`` names the socket with which it listens there already. None for a
            worker that is alone.
        device: of the tensors that ranks exchange.

    Attributes:
        stage: number of its stage.
        tp_rank: its number within the stage.
        tp_group: the ranks of its stage; None if it is alone there.
        hidden_group: all ranks, for hidden states between stages; None without a pipeline.
        token_group: all ranks, for drawn tokens on their way back; None if it is alone.
    """

    def __init__(
        self,
        rank: int = 0,
        tp_size: int = 1,
        pp_size: int = 1,
        rendezvous: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.rank, self.tp_size, self.pp_size = rank, tp_size, pp_size
        self.stage, self.tp_rank = divmod(rank, tp_size)
        self.size = tp_size * pp_size
        self.device = device or torch.device("cpu")
        self.tp_group: dist.ProcessGroup | None = None
        self.hidden_group: dist.ProcessGroup | None = None
        self.token_group: dist.ProcessGroup | None = None
        if self.size > 1:
            if rendezvous is None:
                raise EngineError(f"a replica of {self.size} workers has no place to meet")
            self._connect(rendezvous)

    def _connect(self, rendezvous: str) -> None:
        if rendezvous.startswith("file:"):  # all ranks are on this machine
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=self._store(rendezvous),
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
            device_id=self.device if self.device.type == "cuda" else None,
        )
        # Each group is made by all ranks, in the same order.
        for stage in range(self.pp_size):
            ranks = range(stage * self.tp_size, (stage + 1) * self.tp_size)
            group = self._group(ranks) if self.tp_size > 1 else None
            if stage == self.stage:
                self.tp_group = group
        if self.pp_size > 1:
            self.hidden_group = self._group(range(self.size))
        self.token_group = self._group(range(self.size))

    def _store(self, rendezvous: str) -> Any:
        place = urlsplit(rendezvous)
        if place.scheme == "file":
            return dist.FileStore(place.path, self.size)  # type: ignore[attr-defined]
        listeners = parse_qs(place.query).get("listener_fd")
        return dist.TCPStore(  # type: ignore[attr-defined]
            place.hostname or "",
            place.port or 0,
            self.size,
            is_master=self.rank == 0,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=int(listeners[0]) if listeners else None,
        )

    def _group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=_TIMEOUT)
        return group

    # --- where it stands --------------------------------------------------------------------------

    @property
    def is_first_stage(self) -> bool:
        """Whether it turns ids into hidden states."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it has the head."""
        return self.stage == self.pp_size - 1

    @property
    def sampler(self) -> int:
        """The rank that samples and answers."""
        return (self.pp_size - 1) * self.tp_size

    @property
    def samples(self) -> bool:
        """Whether this is the rank that samples and answers."""
        return self.rank == self.sampler

    @property
    def others_of_first_stage(self) -> list[int]:
        """The ranks that need drawn tokens from the one that samples."""
        return [rank for rank in range(self.tp_size) if rank != self.sampler]

    # --- agreeing ---------------------------------------------------------------------------------

    def agreed(self, reason: str | None) -> str | None:
        """The reason of the first rank that has one, which all ranks get; None if none has.

        Waits until all ranks have called it.
        """
        if self.size == 1:
            return reason
        said = (reason or "").encode()[:_REASON_BYTES]
        own = torch.zeros(_REASON_BYTES, dtype=torch.uint8)
        own[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
        for each in self._gathered(own):
            text = bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore")
            if text:
                return text
        return None

    def all_agree(self, value: bool) -> bool:
        """Whether the value is true at every rank."""
        return self.largest(int(not value)) == 0

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        return max(int(each.item()) for each in self._gathered(torch.tensor([value])))

    def of_first(self, values: Sequence[float]) -> list[float]:
        """The values of rank 0, which has measured them. The others say how many."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        with naming_loss():
            dist.broadcast(shared, 0)
        result: list[float] = shared.tolist()
        return result

    def _gathered(self, own: Tensor) -> list[Tensor]:
        every = [torch.empty_like(own) for _ in range(self.size)]
        with naming_loss():
            dist.all_gather(every, own)
        return every


@contextmanager
def naming_loss() -> Iterator[None]:
    """Around what needs other ranks: says so if one of them is gone.

    Raises:
        EngineError: after a while, in which the supervisor usually ends this process.
    """
    try:
        yield
    except RuntimeError as error:
        time.sleep(_BEFORE_FAILING_S)
        raise EngineError(f"another worker of this replica is gone ({error})") from error
