"""The table of linear methods."""

from __future__ import annotations

import logging
from dataclasses import replace

from tokasaurus.errors import ConfigError
from tokasaurus.model.linear_methods import fp8, int8, packed
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec, Sharding
from tokasaurus.model.linear_methods.fp8 import Fp8Linear
from tokasaurus.model.linear_methods.int8 import Int8Linear
from tokasaurus.model.linear_methods.opaque import OpaqueLinear
from tokasaurus.model.linear_methods.overlapped import OverlappedLinear
from tokasaurus.model.linear_methods.packed import PackedLinear
from tokasaurus.model.linear_methods.plain import PlainLinear
from tokasaurus.model.linear_methods.sharded import ShardedLinear, share_of
from tokasaurus.model.placement import Placement

__all__ = ["choose_linear", "make_linear"]

log = logging.getLogger(__name__)

_METHODS: dict[str, type[PlainLinear] | type[PackedLinear]] = {
    "plain": PlainLinear,
    "packed": PackedLinear,
}

_QUANTIZED: dict[str, type[Int8Linear] | type[Fp8Linear]] = {"int8": Int8Linear, "fp8": Fp8Linear}


def choose_linear(place: Placement) -> Placement:
    """The placement with a method that runs there in place of ``auto``.

    Raises:
        ConfigError: the method or the quantization that the placement names cannot run there.
    """
    if place.quantization == "int8":
        return _in_int8(place)
    if place.quantization == "fp8" and (reason := fp8.why_not(place)) is not None:
        raise ConfigError(f"quantization=fp8 cannot run here: {reason}, or leave quantization out")
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


def _in_int8(place: Placement) -> Placement:
    """The placement with the method for what is not quantized, which is packed, too."""
    reason = int8.why_not(place)
    if place.linear == "plain":
        reason = "linear=plain multiplies by weights in dtype"
    if reason is not None:
        raise ConfigError(f"quantization=int8 cannot run here: {reason}; leave it out")
    return replace(place, linear="packed")


def make_linear(spec: LinearSpec, place: Placement) -> LinearMethod:
    """The method of this placement for one product: with several ranks, for this one's part."""
    method: LinearMethod
    if place.parallel.size == 1:
        method, out_size, exchanges = _method(spec, place), spec.out_size, False
    else:
        method = shared = _shared_method(spec, place)
        exchanges = spec.sharding is not Sharding.OUTPUTS
        out_size = spec.out_size if exchanges else shared.spec.out_size
    if place.is_traced and (exchanges or place.linear == "packed"):
        return OpaqueLinear(method, spec.in_size, out_size, place.dtype)
    return method


def _shared_method(spec: LinearSpec, place: Placement) -> ShardedLinear:
    if place.overlap is not None and spec.sharding is not Sharding.VOCABULARY:
        return OverlappedLinear(spec, place, place.overlap)
    share = share_of(spec, place.parallel.rank, place.parallel.size)
    return ShardedLinear(share, _method(share.spec, place), place.parallel)


def _method(spec: LinearSpec, place: Placement) -> LinearMethod:
    # The head and the embedding keep the dtype, see docs/decisions/0020-int8.md.
    if place.quantization is not None and spec.sharding is not Sharding.VOCABULARY:
        return _QUANTIZED[place.quantization](spec, place)
    return _METHODS[place.linear](spec, place)
