"""Tensors of an update that has not all of them yet. They wait beside the weights that run.

A worker keeps its own part of each, in memory of the host.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from tokasaurus.errors import ModelError
from tokasaurus.model.checkpoint_headers import EMBEDDING, HEAD
from tokasaurus.model.weights.weights import Weights

__all__ = ["StagedWeights"]


class StagedWeights:
    """What has come of the next weights. Several threads may put tensors here.

    Args:
        weights: of the model, which get them.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._lock = threading.Lock()
        self._names: set[str] = set()  # that came, also of tensors that this worker does not use
        self._parts: dict[str, Tensor | None] = {}  # by the usual name
        self._update = 0  # counts the updates

    def begin(self, names: set[str], *, anew: bool) -> int:
        """Tensors of these names come next.

        Args:
            names: if one of them is here already, another update begins.
            anew: another update begins in any case, and what is here goes.

        Returns:
            The number of the update, for ``put``.
        """
        with self._lock:
            if anew or self._names & names:
                self._clear()
            return self._update

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises ModelError if a tensor cannot be part of the model's weights."""
        if self._weights.uses(name):
            self._weights.check(name, shape, dtype)
        elif not self._weights.ignores(name):
            raise ModelError(f"this architecture does not use a tensor {name}")

    def put(self, name: str, tensor: Tensor, update: int) -> None:
        """Keeps this worker's part of a tensor, which nothing else writes to any more.

        Args:
            name: of the tensor.
            tensor: that ``check`` has nothing against.
            update: that it is of. If another one has begun since, it is dropped.

        Raises:
            ModelError: it is the head of a model whose embedding is its head, and they differ.
        """
        if not self._weights.uses(name):
            with self._lock:
                if update == self._update:
                    self._names.add(name)
            return
        part = self._weights.own_part(name, tensor)
        if part is not None:
            is_whole = part.numel() == tensor.numel()
            part = part.cpu() if is_whole or part.device.type != "cpu" else part.clone()
        usual = self._weights.usual_name(name)
        with self._lock:
            if update != self._update:
                return
            before = self._parts.get(usual)
            if before is not None and part is not None and not torch.equal(before, part):
                raise ModelError(
                    f"{HEAD} differs from {EMBEDDING}, and this model shares one tensor between"
                    " them; start an engine with these weights instead"
                )
            self._names.add(name)
            self._parts[usual] = part

    @property
    def is_whole(self) -> bool:
        """Whether no tensor is missing that this worker uses."""
        with self._lock:
            return not self._missing()

    def missing(self) -> list[str]:
        """The tensors that have not come, in the order of the layers."""
        with self._lock:
            return self._missing()

    def fill(self) -> None:
        """Fills the model's weights with what is here, which is whole; nothing is here then."""
        with self._lock:
            parts = self._parts
            self._clear()
        for name in list(parts):
            self._weights.fill_own(name, parts.pop(name))
        self._weights.finish()

    def clear(self) -> None:
        """Drops what is here."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._names, self._parts = set(), {}
        self._update += 1

    def _missing(self) -> list[str]:
        return [name for name in self._weights.shapes if name not in self._parts]
