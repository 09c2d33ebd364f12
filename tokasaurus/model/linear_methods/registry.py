"""The table of linear methods."""

from __future__ import annotations

from torch import Tensor

from tokasaurus.errors import ConfigError
from tokasaurus.model.linear_methods import packed
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.linear_methods.packed import PackedLinear
from tokasaurus.model.linear_methods.plain import PlainLinear
from tokasaurus.model.placement import Placement

__all__ = ["check_linear", "make_linear"]

_METHODS: dict[str, type[PlainLinear] | type[PackedLinear]] = {
    "plain": PlainLinear,
    "packed": PackedLinear,
}


def check_linear(place: Placement) -> None:
    """Raises ConfigError where the method of this placement cannot run here; says why."""
    if place.linear == "packed" and (reason := packed.why_not(place)):
        raise ConfigError(f"linear=packed cannot run here: {reason}; linear=plain can")


def make_linear(spec: LinearSpec, place: Placement, tied: Tensor | None = None) -> LinearMethod:
    """The method of this placement for one product; see ``PlainLinear`` for the arguments."""
    return _METHODS[place.linear](spec, place, tied)
