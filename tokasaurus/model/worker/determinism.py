"""Decides whether results are deterministic: the same bits whatever runs beside a request.

Attention says so of itself (``Backend.is_independent_of_batch``). Matrix products, element-wise
kernels, angles and draws are probed when the model is loaded: with the weights and the threads that
will serve. ``model/probe.py`` has the method.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokasaurus.errors import ConfigError
from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend.base import DRAW, Backend, SamplingKernels
from tokasaurus.model.layers.linear import Linear
from tokasaurus.model.layers.mlp import GatedMLP
from tokasaurus.model.layers.norm import RMSNorm
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.linear_methods.sharded import ShardedLinear
from tokasaurus.model.linear_methods.tiled import TiledLinear
from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.placement import Placement
from tokasaurus.model.probe import NUM_ROWS, SOME_COUNTS, counts_of, dependent_counts

__all__ = ["Determinism", "settle_determinism"]

log = logging.getLogger(__name__)

# Of products: the first tries all numbers of rows, the others some.
_NUM_SEEDS = 3

# Numbers of rows that products may run on, the cheapest first: at least, and of a tile.
_TILES: tuple[tuple[int, int | None], ...] = ((2, None), (16, 16), (64, 64))

# What was probed in this process: a kernel, with sizes and threads, and the numbers of rows at
# which its results depend on them. A second engine with the same model does not probe again.
_known: dict[tuple[object, ...], list[int]] = {}


@dataclass(frozen=True)
class Determinism:
    """Whether results are deterministic.

    Attributes:
        is_on: no result depends on the batch.
        reason: a line for users.
    """

    is_on: bool
    reason: str


def settle_determinism(
    asked: bool | None,
    model: LlamaModel,
    place: Placement,
    backend: type[Backend],
    sampling: SamplingKernels | None,
    ranks: Ranks,
) -> Determinism:
    """Probes the model. Puts products on fixed tiles if they need them and the user asks.

    All ranks of a replica decide together: one obstacle is an obstacle for all.

    Args:
        asked: the flag ``deterministic``.
        model: with its weights.
        place: of the model.
        backend: of the attention.
        sampling: the kernels of sampling; None if torch samples.
        ranks: of the replica.

    Raises:
        ConfigError: the user asks for what cannot be.
    """
    if asked is False:
        return Determinism(False, "not deterministic: deterministic=F")
    obstacle, summary = _obstacle(place, backend, sampling), ""
    if obstacle is None:
        started = time.perf_counter()
        probe = _Probe(model, place)
        obstacle = probe.other_kernels(sampling) or probe.products(may_tile=asked is True)
        summary = probe.summary
        log.info("probed in %.2f s whether results depend on the batch", _since(started))
    obstacle = ranks.agreed(obstacle)
    if obstacle is None:
        # The first rank's: a receipt says the same for all.
        return Determinism(True, f"deterministic: {ranks.agreed(summary)}")
    if asked:
        raise ConfigError(f"deterministic=T: {obstacle}, or leave deterministic out")
    return Determinism(False, f"not deterministic: {obstacle}")


def _obstacle(
    place: Placement, backend: type[Backend], sampling: SamplingKernels | None
) -> str | None:
    """What no probe needs to look at, and the remedy."""
    if place.device.type != "cpu":
        return f"results depend on the batch on device={place.device.type} for now; set device=cpu"
    if place.is_traced:
        return "torch_compile=T lets results depend on the batch; leave it out"
    if not backend.is_independent_of_batch or sampling is None:
        return (
            f"attention={backend.name} lets results depend on the batch; "
            "set attention=compiled, which needs g++"
        )
    return None


class _Probe:
    """Probes one model, with the threads that torch uses.

    Attributes:
        summary: of the products, once they are probed and none depends on the batch.
    """

    def __init__(self, model: LlamaModel, place: Placement) -> None:
        self._model, self._place = model, place
        self._num_threads = torch.get_num_threads()
        self.summary = ""

    def products(self, *, may_tile: bool) -> str | None:
        """Probes every distinct product. Returns what is wrong, and the remedy."""
        tiled: dict[tuple[object, ...], str] = {}
        keys = set()
        for layer in self._model.modules():
            if not isinstance(layer, Linear):
                continue
            # With several ranks, each probes its part: their sums do not depend on the batch.
            holder = layer.method if isinstance(layer.method, ShardedLinear) else layer
            spec = holder.spec
            key = (type(holder.method), spec.in_size, spec.out_size, spec.bias)
            keys.add(key)
            counts = self._dependence(holder.method, spec)
            if not counts:
                continue
            name = f"the product {spec.in_size}x{spec.out_size} of {type(holder.method).__name__}"
            trouble = f"{name} depends on the number of rows (with {_listed(counts)} of them)"
            if not may_tile:
                return (
                    f"{trouble}; deterministic=T runs it on fixed tiles, "
                    "and linear=packed needs none in fp32 and bf16"
                )
            tiles = self._tiled(holder)
            if tiles is None:
                return f"{trouble}, on fixed tiles too; set linear=packed"
            tiled[key] = f"{spec.in_size}x{spec.out_size} with {tiles}"
        self.summary = f"{len(keys)} kinds of products probed on {self._num_threads} threads"
        if tiled:
            self.summary += f"; on fixed tiles: {', '.join(tiled.values())}"
        return None

    def _tiled(self, holder: Linear | ShardedLinear) -> str | None:
        """Puts a product on the first tiles that help. Returns which."""
        for least, tile in _TILES:
            method = TiledLinear(holder.method, least, tile)
            if not self._dependence(method, holder.spec, (type(holder.method), least, tile)):
                holder.method = method
                return f"at least {least} rows" if tile is None else f"{tile} rows each"
        return None

    def _dependence(
        self, method: LinearMethod, spec: LinearSpec, kind: tuple[object, ...] = ()
    ) -> list[int]:
        """The numbers of rows at which a product depends on them."""

        def runs(seed: int) -> Callable[[Tensor], Tensor]:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(NUM_ROWS, spec.in_size, generator=generator).to(self._place.dtype)
            return lambda ids: method.apply(x[ids])

        key = (type(method), kind, spec.in_size, spec.out_size, spec.bias)
        work = spec.in_size * spec.out_size
        counts = [counts_of(work, spec.out_size, is_first=seed == 0) for seed in range(_NUM_SEEDS)]
        return self._failing(key, runs, counts)

    def other_kernels(self, sampling: SamplingKernels | None) -> str | None:
        """Probes the rest, which no tiles help. Returns what is wrong, and the remedy."""
        for name, size, runs in self._other_kernels(sampling):
            counts = self._failing((name, size), runs, [list(SOME_COUNTS)])
            if counts:
                return (
                    f"{name} depends on the number of rows (with {_listed(counts)} of them), "
                    "which is a fault of this build; please report it"
                )
        return None

    def _other_kernels(
        self, sampling: SamplingKernels | None
    ) -> Iterator[tuple[str, int, Callable[[int], Callable[[Tensor], Tensor]]]]:
        """The name and size of each, and what makes its batches from a seed."""
        model, place = self._model, self._place
        operators, rotary = place.operators, model.rotary
        norm = next(each for each in model.modules() if isinstance(each, RMSNorm))
        size, inner = norm.weight.numel(), _inner_size(model)

        def numbers(seed: int, width: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(NUM_ROWS, width, generator=generator).to(place.dtype)

        def norms(seed: int) -> Callable[[Tensor], Tensor]:
            x, added = numbers(seed, size), numbers(seed + 1, size)
            return lambda ids: operators.add_rms_norm(x[ids], added[ids], norm.weight, norm.eps)

        def gates(seed: int) -> Callable[[Tensor], Tensor]:
            x = numbers(seed, 2 * inner)
            return lambda ids: operators.silu_multiply(x[ids])

        def angles(seed: int) -> Callable[[Tensor], Tensor]:
            generator = torch.Generator().manual_seed(seed)
            positions = torch.randint(0, 1 << 17, (NUM_ROWS,), generator=generator)
            return lambda ids: torch.cat(rotary(positions[ids]), -1).flatten(1)

        yield "the norm", size, norms
        yield "the gate", inner, gates
        yield "the angle of a position", size, angles
        if sampling is None:
            return
        kernels, vocab = sampling, model.vocab_size

        def draws(seed: int) -> Callable[[Tensor], Tensor]:
            logits, plan = numbers(seed, vocab), torch.from_numpy(_draws(seed))
            return lambda ids: kernels.draw(logits[ids], plan[ids])[:, None]

        def sums(seed: int) -> Callable[[Tensor], Tensor]:
            logits = numbers(seed, vocab)
            return lambda ids: kernels.log_sums(logits[ids], None, None)[0][:, None]

        yield "the draw of a token", vocab, draws
        yield "the logprob of a token", vocab, sums

    def _failing(
        self,
        key: tuple[object, ...],
        runs: Callable[[int], Callable[[Tensor], Tensor]],
        counts_of_seeds: list[list[int]],
    ) -> list[int]:
        """The numbers of rows that the first seed finds for which there are any."""
        place = self._place
        key = (*key, place.dtype, place.instruction_set, self._num_threads)
        if key not in _known:
            found: list[int] = []
            for seed, counts in enumerate(counts_of_seeds):
                found = found or dependent_counts(runs(seed), counts, seed)
            _known[key] = found
        return _known[key]


def _draws(seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """[rows, bytes]: draws of all kinds."""
    chance = np.random.default_rng(seed)
    rows = np.zeros(NUM_ROWS, DRAW)
    rows["seed"], rows["temperature"] = chance.integers(0, 1 << 60, NUM_ROWS), 0.8
    rows["top_k"], rows["top_p"] = chance.choice((0, 5, 300), NUM_ROWS), 0.9
    rows["log_min_p"] = -np.inf
    return rows.view(np.uint8).reshape(NUM_ROWS, -1)


def _inner_size(model: LlamaModel) -> int:
    """Columns of the feed-forward part."""
    down = next(each.down for each in model.modules() if isinstance(each, GatedMLP))
    spec = down.method.spec if isinstance(down.method, ShardedLinear) else down.spec
    return spec.in_size


def _listed(counts: list[int]) -> str:
    """The first of some numbers, for users."""
    shown = ", ".join(map(str, counts[:4]))
    return f"{shown} and others" if len(counts) > 4 else shown


def _since(started: float) -> float:
    return time.perf_counter() - started
