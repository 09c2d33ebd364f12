"""Products that overlap with what ranks exchange, in large batches: async tensor parallelism.

While such a batch runs the layers, each rank has some of its tokens between two products, and all
of them within::

    rank 0   tokens 0 1 2 3 │ gather and multiply: 0 .. 7 │ attend │ multiply and scatter │ 0 1 2 3
    rank 1   tokens 4 5 6 7 │                      0 .. 7 │        │                      │ 4 5 6 7

A rank multiplies by the tokens that it has while those of another one arrive. It sends results of
a part of the tokens while it multiplies by the next (Wang et al. 2023,
https://doi.org/10.1145/3567955.3567959). torch's operators on symmetric memory do this. Norms and
the residual stream are computed once for each token, not once at each rank.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.parallel.ranks import Ranks, naming_loss
from tokasaurus.rounding import ceil_div

__all__ = ["Overlap", "open_overlap", "why_not"]

log = logging.getLogger(__name__)


class Overlap:
    """Decides which batches overlap, and calls the operators.

    Args:
        group: the ranks that share each layer.
        threshold: tokens of a batch from which on it overlaps.

    Attributes:
        is_on: layers run that overlap.
    """

    def __init__(self, group: dist.ProcessGroup, threshold: int) -> None:
        self._group, self._threshold = group, threshold
        self._rank, self._size = group.rank(), group.size()
        self._num_rows = 0
        self.is_on = False

    def covers(self, num_rows: int) -> bool:
        """Whether a batch of so many rows overlaps: the same at every rank."""
        return num_rows >= self._threshold

    @contextlib.contextmanager
    def dealing(self, num_rows: int) -> Iterator[None]:
        """While the layers of a batch run, whose rows are dealt to ranks."""
        self.is_on, self._num_rows = True, num_rows
        try:
            yield
        finally:
            self.is_on = False

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of x, [rows, size]; zeros make up the number at the last ranks."""
        each = ceil_div(self._num_rows, self._size)
        return self._padded(x)[self._rank * each : (self._rank + 1) * each]

    def whole(self, own: Tensor) -> Tensor:
        """The rows of all ranks, from those of each."""
        every = own.new_empty(self._size * len(own), own.shape[1])
        with naming_loss():
            dist.all_gather(list(every.chunk(self._size)), own.contiguous(), self._group)
        return every[: self._num_rows]

    def gather_multiply(self, own: Tensor, weight: Tensor) -> Tensor:
        """Multiplies the rows of all ranks.

        Args:
            own: this rank's rows, [own rows, in].
            weight: [out, in].

        Returns:
            [rows, out].
        """
        with naming_loss():
            _, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(
                own.contiguous(), [weight.t()], 0, self._group.group_name, return_A=False
            )
        rows: Tensor = product[: self._num_rows]
        return rows

    def multiply_scatter(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiplies, and adds up the results of all ranks for this rank's rows.

        Args:
            x: [rows, in].
            weight: [out, in].

        Returns:
            [own rows, out].
        """
        with naming_loss():
            own: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(
                self._padded(x), weight.t(), "sum", 0, self._group.group_name
            )
        return own

    def _padded(self, x: Tensor) -> Tensor:
        """Rows of zeros at the end make their number a multiple of the ranks."""
        missing = -self._num_rows % self._size
        return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def open_overlap(ranks: Ranks, linear: str, threshold: int | None) -> Overlap | None:
    """Finds out whether large batches can overlap, and says so. All ranks call it together.

    Args:
        ranks: of the replica.
        linear: the linear method.
        threshold: the flag ``async_tp_threshold``.
    """
    if threshold is None or ranks.tp_group is None:
        return None
    reason = ranks.agreed(why_not(ranks.device, linear, ranks.tp_size))
    if reason is not None:
        log.warning(
            "async_tp_threshold=%d: %s; products and what ranks exchange come one after the other",
            threshold,
            reason,
        )
        return None
    # Defines the operators.
    import torch.distributed._symmetric_memory  # noqa: F401

    log.info("batches of %d tokens or more overlap products with what ranks exchange", threshold)
    return Overlap(ranks.tp_group, threshold)


def why_not(device: torch.device, linear: str, tp_size: int) -> str | None:
    """Why products cannot overlap on this machine; None if they can.

    Args:
        device: of this rank. Those that share layers with it are its neighbours.
        linear: the linear method.
        tp_size: their number.
    """
    if device.type != "cuda":
        return f"there is no symmetric memory on device={device.type}"
    if linear != "plain":
        return f"linear={linear} does not multiply by a whole weight"
    first = (device.index or 0) // tp_size * tp_size
    devices = range(first, first + tp_size)
    if devices.stop > torch.cuda.device_count():
        return "the devices are not on one machine"
    for one, other in itertools.permutations(devices, 2):
        if not torch.cuda.can_device_access_peer(one, other):
            return f"no NVLink joins the devices {one} and {other}"
    return None
