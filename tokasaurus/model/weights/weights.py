"""A model's weights under the checkpoint's names: what fills them, and what is still missing.

A checkpoint, dummy weights and a trainer's stream are sources of (name, tensor). All of them come
through here. Owns the errors about tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from tokasaurus.errors import ModelError
from tokasaurus.listing import listing
from tokasaurus.model.checkpoint_headers import EMBEDDING, HEAD
from tokasaurus.model.layers.fillable import Fillable

__all__ = ["Weights"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Tensors that old checkpoints contain and that we compute.
_DERIVED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclass(frozen=True)
class _Target:
    """The destination of one of the checkpoint's tensors."""

    layer: Fillable
    part: str
    kind: str
    shape: tuple[int, ...]


class Weights:
    """The weights of one model, or of a stage of it.

    A round of filling begins with the first ``fill`` and ends with ``finish``. Each round fills
    every tensor: a linear method may have packed the former ones beyond recognition.

    Args:
        model: its layers are filled.
        names: our layers -> the checkpoint's, see ``LlamaModel.WEIGHTS``.
        num_layers: of the whole model; their numbers replace ``{}`` in the names.
        stage: the numbers of the model's layers; None if it has all.
    """

    def __init__(
        self,
        model: nn.Module,
        names: dict[str, str | dict[str, str]],
        num_layers: int,
        stage: range | None = None,
    ) -> None:
        self._layers: list[Fillable] = []
        self._targets: dict[str, _Target] = {}
        self._other_names: dict[str, str] = {}
        self._elsewhere: set[str] = set()  # names of other stages' tensors
        stage = range(num_layers) if stage is None else stage
        modules = dict(model.named_modules())
        for pattern, sources in names.items():
            parts = {"": sources} if isinstance(sources, str) else sources
            for number in stage if "{}" in pattern else range(1):
                layer = modules.get(pattern.format(number))
                if layer is None:  # most models have no norms on queries and keys
                    continue
                assert isinstance(layer, Fillable)
                self._layers.append(layer)
                for (part, kind), shape in layer.tensors().items():
                    name = f"{parts[part].format(number)}.{kind}"
                    self._targets[name] = _Target(layer, part, kind, shape)
            self._elsewhere |= _names_elsewhere(modules, pattern, parts, num_layers, stage)
        self._unfilled = set(self._targets)
        self.has_tied_head = bool(getattr(model, "has_tied_head", False))
        if self.has_tied_head and EMBEDDING in self._targets:
            # A tied model has one tensor, and its checkpoint may have it under either name.
            self._other_names[HEAD] = EMBEDDING

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: target.shape for name, target in self._targets.items()}

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(target.shape) for target in self._targets.values())

    def uses(self, name: str) -> bool:
        """Whether there is a place for a tensor of this name."""
        return self._other_names.get(name, name) in self._targets

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may have this tensor although there is no place for it.

        The model computes it by itself, another stage has it, or it is the head of a tied model: a
        duplicate.
        """
        is_derived = _DERIVED.search(name) is not None
        is_duplicate = name == HEAD and self.has_tied_head
        return is_duplicate or is_derived or name in self._elsewhere

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises ModelError where ``fill`` would, before there is a tensor to fill."""
        target = self._targets[self._other_names.get(name, name)]
        if dtype not in _FLOATS:
            raise ModelError(f"tensor {name} is {dtype}: quantized checkpoints are not supported")
        padded = target.layer.is_vocabulary and shape[:1] > target.shape[:1]
        if shape[1:] != target.shape[1:] or (shape[:1] != target.shape[:1] and not padded):
            raise ModelError(
                f"tensor {name} has shape {list(shape)}; config.json asks for {list(target.shape)}"
            )

    def check_names(self, names: Collection[str], source: str) -> None:
        """Checks that these tensors are all, and that each is used or may be ignored.

        Args:
            names: of tensors.
            source: where they come from, for errors.

        Raises:
            ModelError: names the tensors that are unknown or missing.
        """
        if unknown := [name for name in names if not (self.uses(name) or self.ignores(name))]:
            raise ModelError(
                f"{source} has tensors that this architecture does not use: {listing(unknown)}"
            )
        found = {self._other_names.get(name, name) for name in names}
        if missing := [name for name in self._targets if name not in found]:
            raise ModelError(f"{source} lacks tensors: {listing(missing)}")

    def fill(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor that the model uses.

        Raises:
            ModelError: it has another shape, or it is quantized.
        """
        self.check(name, tuple(tensor.shape), tensor.dtype)
        name = self._other_names.get(name, name)
        target = self._targets[name]
        # Rows beyond the vocabulary are padding. Without them, their ids cannot be sampled.
        with torch.inference_mode():
            target.layer.fill(target.part, target.kind, tensor[: target.shape[0]])
        self._unfilled.discard(name)

    def usual_name(self, name: str) -> str:
        """The name of a tensor that the model uses; a tied head has that of the embedding."""
        return self._other_names.get(name, name)

    def own_part(self, name: str, tensor: Tensor) -> Tensor | None:
        """What ``fill`` takes of a tensor: a view, for ``fill_own``; None if it takes nothing.

        Args:
            name: of a tensor that the model uses.
            tensor: that ``check`` has nothing against.
        """
        target = self._targets[self.usual_name(name)]
        return target.layer.own_part(target.part, target.kind, tensor[: target.shape[0]])

    def fill_own(self, name: str, own: Tensor | None) -> None:
        """Does what ``fill`` does, with an ``own_part``."""
        name = self.usual_name(name)
        target = self._targets[name]
        if own is not None:
            with torch.inference_mode():
                target.layer.fill_own(target.part, target.kind, own)
        self._unfilled.discard(name)

    def missing(self) -> list[str]:
        """The names of tensors that were not filled in this round, in the order of the layers."""
        return [name for name in self._targets if name in self._unfilled]

    def finish(self) -> None:
        """Ends a round of filling, in which no tensor is missing: the model runs with these."""
        if self._unfilled:
            raise ModelError(f"the weights lack tensors: {listing(self.missing())}")
        with torch.inference_mode():
            for layer in self._layers:
                layer.finish()
        self._unfilled = set(self._targets)

    def release(self) -> None:
        """Frees the memory of all tensors. A round of filling must come before the model runs."""
        for layer in self._layers:
            layer.release()
        self._unfilled = set(self._targets)

    def restore(self) -> None:
        """Allocates what was released; comes before the first ``fill``."""
        for layer in self._layers:
            layer.restore()


def _names_elsewhere(
    modules: dict[str, nn.Module],
    pattern: str,
    parts: dict[str, str],
    num_layers: int,
    stage: range,
) -> set[str]:
    """The checkpoint's names of what other stages have of one of our layers."""
    if "{}" not in pattern:  # the embedding, or the last norm
        is_here = pattern in modules or len(stage) == num_layers
        return set() if is_here else {f"{source}.weight" for source in parts.values()}
    layer = modules.get(pattern.format(stage.start))
    if not isinstance(layer, Fillable):
        return set()
    return {
        f"{parts[part].format(number)}.{kind}"
        for number in set(range(num_layers)).difference(stage)
        for part, kind in layer.tensors()
    }
