"""The table of linear methods."""

from __future__ import annotations

import logging
from dataclasses import replace

from tokasaurus.errors import ConfigError
from tokasaurus.model.linear_methods import packed
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.linear_methods.opaque import OpaqueLinear
from tokasaurus.model.linear_methods.packed import PackedLinear
from tokasaurus.model.linear_methods.plain import PlainLinear
from tokasaurus.model.placement import Placement

__all__ = ["choose_linear", "make_linear"]

log = logging.getLogger(__name__)

_METHODS: dict[str, type[PlainLinear] | type[PackedLinear]] = {
    "plain": PlainLinear,
    "packed": PackedLinear,
}


def choose_linear(place: Placement) -> Placement:
    """The placement with a method that runs there in place of ``auto``.

    Raises:
        ConfigError: the method that the placement names cannot run there.
    """
    if place.linear == "plain":
        return place
    reason = packed.why_not(place)
    if place.linear == "packed":
        if reason is not None:
            raise ConfigError(f"linear=packed cannot run here: {reason}; linear=plain can")
        return place
    if reason is not None and place.device.type == "cpu":
        log.warning("linear=packed cannot run, and linear=plain is slower: %s", reason)
    return replace(place, linear="plain" if reason else "packed")


def make_linear(spec: LinearSpec, place: Placement) -> LinearMethod:
    """The method of this placement for one product."""
    method = _METHODS[place.linear](spec, place)
    if place.is_traced and place.linear == "packed":
        return OpaqueLinear(method, spec.in_size, spec.out_size, place.dtype)
    return method
