"""Rotary position embeddings as a checkpoint describes them: the kind and its numbers. No torch.

``config.json`` spells them in two ways::

    transformers 4      "rope_theta": 500000.0,
                        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}
    transformers 5      "rope_parameters": {"rope_theta": 500000.0,
                                            "rope_type": "llama3", "factor": 8.0, ...}

Older files say "type" for "rope_type". Where a file has both objects, "rope_scaling" wins, as in
transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tokasaurus.model.json_fields import JsonFields

__all__ = [
    "DefaultRope",
    "LinearRope",
    "Llama3Rope",
    "RopeConfig",
    "YarnRope",
    "parse_rope",
]

_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True)
class DefaultRope:
    """Su et al. 2021, https://arxiv.org/abs/2104.09864."""

    theta: float


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation, Chen et al. 2023, https://arxiv.org/abs/2306.15595."""

    theta: float
    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1: stretches long wavelengths by ``factor``, keeps short ones, and ramps between."""

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnRope:
    """YaRN, Peng et al. 2023, https://arxiv.org/abs/2309.00071."""

    theta: float
    factor: float
    original_max_position: int
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None
    beta_fast: float
    beta_slow: float
    truncate: bool


RopeConfig: TypeAlias = DefaultRope | LinearRope | Llama3Rope | YarnRope


def parse_rope(
    fields: JsonFields, max_position: int, override: JsonFields | None
) -> tuple[RopeConfig, int]:
    """Reads the embedding's description.

    Args:
        fields: the whole ``config.json``.
        max_position: its ``max_position_embeddings``.
        override: replaces the checkpoint's object. The checkpoint's ``rope_theta`` stays unless the
            override has one. Its scaling stretches the positions that the model had before the
            checkpoint's own scaling.

    Returns:
        The embedding, and the positions that the model has with it.

    Raises:
        ModelError: names the field that is missing, malformed or of an unsupported kind.
    """
    own = fields.nested("rope_scaling" if fields.raw("rope_scaling") else "rope_parameters")
    theta = own.positive("rope_theta", fields.positive("rope_theta", _DEFAULT_THETA))
    chosen = own if override is None else override
    theta = chosen.positive("rope_theta", theta)
    _refuse_partial(fields, chosen)
    name = "original_max_position_embeddings"
    original = own.integer(name, fields.integer(name, max_position))
    rope = _of_kind(chosen, theta, original)
    if override is None:
        return rope, _own_positions(rope, original, max_position)
    positions = _stretched_positions(rope, original)
    return rope, max(max_position, positions) if isinstance(rope, Llama3Rope) else positions


def _own_positions(rope: RopeConfig, original: int, max_position: int) -> int:
    """Positions under the checkpoint's own scaling, as transformers and vLLM count them.

    ``max_position_embeddings`` may count them before the scaling or after it. Of Llama 3's scaling
    it always counts them after it, and they are fewer than factor times original ones.
    """
    if isinstance(rope, LinearRope | YarnRope):
        return max(max_position, _stretched_positions(rope, original))
    return max_position


def _stretched_positions(rope: RopeConfig, original: int) -> int:
    """The positions that a scaling makes of ``original`` ones."""
    if isinstance(rope, YarnRope | Llama3Rope):
        return max(original, int(rope.factor * rope.original_max_position))
    if isinstance(rope, LinearRope):
        return int(rope.factor * original)
    return original


def _of_kind(fields: JsonFields, theta: float, original: int) -> RopeConfig:
    name = "type" if "rope_type" not in fields and "type" in fields else "rope_type"
    kind = fields.text(name, "default")
    if name not in fields and "factor" in fields:
        raise fields.error(name, "is missing, and factor alone does not say how positions scale")
    if kind == "default":
        return DefaultRope(theta)
    if kind == "linear":
        return LinearRope(theta, fields.positive("factor"))
    if kind == "llama3":
        return _llama3(fields, theta, original)
    if kind == "yarn":
        return _yarn(fields, theta, original)
    raise fields.error(name, f"is {kind!r}; supported: default, linear, llama3, yarn")


def _llama3(fields: JsonFields, theta: float, original: int) -> Llama3Rope:
    rope = Llama3Rope(
        theta=theta,
        factor=fields.positive("factor"),
        low_freq_factor=fields.positive("low_freq_factor"),
        high_freq_factor=fields.positive("high_freq_factor"),
        original_max_position=fields.integer("original_max_position_embeddings", original),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise fields.error(
            "high_freq_factor", f"must be above low_freq_factor, {rope.low_freq_factor}"
        )
    return rope


def _yarn(fields: JsonFields, theta: float, original: int) -> YarnRope:
    def optional(name: str) -> float | None:
        return fields.positive(name) if name in fields else None

    return YarnRope(
        theta=theta,
        factor=fields.positive("factor"),
        original_max_position=fields.integer("original_max_position_embeddings", original),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        beta_fast=fields.positive("beta_fast", 32.0),
        beta_slow=fields.positive("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
    )


def _refuse_partial(fields: JsonFields, rope: JsonFields) -> None:
    for place in (fields, rope):
        share = place.number("partial_rotary_factor", 1.0)
        if share != 1.0:
            raise place.error("partial_rotary_factor", f"is {share}; only 1.0 is supported")
    # Models with sliding windows have one object for each type of layer.
    for name in rope.names():
        if isinstance(rope.raw(name), dict):
            raise rope.error(
                name, "is an object: embeddings that differ by layer are not supported"
            )
