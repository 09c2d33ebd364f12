"""Sorts the rows of a batch by what their sampling takes, on the host, before the batch runs.

Rows of one kind are sampled together, and pay for nothing that only other kinds need. A kernel
(``draw_rows``) looks at each row by itself and takes no kinds::

    kind      rows                                   what is done
    ────────────────────────────────────────────────────────────────────────────────────
    GREEDY    temperature 0                          the highest logit is found
    WHOLE     no filter, or min_p alone              probabilities are summed up by blocks
    LISTED    a small top_k, perhaps top_p, min_p    the first k tokens are found, and drawn from
    NUCLEUS   top_p without top_k, perhaps min_p     as WHOLE, and as LISTED if few tokens hold p
    SORTED    a large top_k, perhaps top_p, min_p    the logits are sorted, to find the last of k
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokasaurus.model.backend.base import DRAW
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.randomness import uniforms
from tokasaurus.model.sampling.ranking import most_ranked
from tokasaurus.model.upload import Staged, Staging

__all__ = ["Kind", "RowsOfKind", "draw_rows", "plan_rows"]

# At lower temperatures logits could overflow. The draw is an argmax long before.
_MIN_TEMPERATURE = 1e-20
# Rows whose top_k is smaller are listed together.
_MIN_DEPTH = 16


class Kind(enum.IntEnum):
    """What sampling a row takes."""

    GREEDY = 0
    WHOLE = 1
    LISTED = 2
    NUCLEUS = 3
    SORTED = 4


@dataclass(frozen=True, eq=False)
class RowsOfKind:
    """Rows of one kind, and their numbers on the device.

    Attributes:
        kind: of all of them.
        index: [rows] int64, among the rows of the logits; None if they are all rows.
        depth: of the ranking, for LISTED rows.
        temperature: [rows, 1] fp32; None if all are 1.
        top_k: [rows, 1] int64, of LISTED and SORTED rows, all of which have one.
        top_p: [rows, 1] float64; None if all are 1.
        min_p: [rows, 1] fp32; None if all are 0.
        numbers: [rows, 1] float64, the random number of each draw; None if they do not draw.
    """

    kind: Kind
    index: Staged | None
    depth: int = 0
    temperature: Staged | None = None
    top_k: Staged | None = None
    top_p: Staged | None = None
    min_p: Staged | None = None
    numbers: Staged | None = None

    @property
    def is_neutral(self) -> bool:
        """Whether the scores of the rows are their logits."""
        return self.is_unfiltered and self.temperature is None

    @property
    def is_unfiltered(self) -> bool:
        """Whether the scores of the rows are their logits, divided by the temperature."""
        return self.kind is Kind.WHOLE and self.min_p is None


def plan_rows(
    parameters: SamplingParameters, vocab_size: int, staging: Staging, *, draws: bool
) -> list[RowsOfKind]:
    """Sorts rows by kind.

    Args:
        parameters: of the rows.
        vocab_size: of the logits.
        staging: sends the numbers.
        draws: whether tokens are drawn. If not, the scores are wanted, and rows at temperature 0
            count as rows at temperature 1.
    """
    if not len(parameters):
        return []
    if draws and parameters.greedy.all():
        return [RowsOfKind(Kind.GREEDY, None)]
    kinds, depths = _kinds(parameters, vocab_size, draws)
    classes = kinds + (depths << 8)
    is_one = bool((classes == classes[0]).all())
    planned = []
    for each in classes[:1].tolist() if is_one else np.unique(classes).tolist():
        rows = np.flatnonzero(classes == each)
        index, chosen = None, parameters
        if len(rows) < len(parameters):
            index, chosen = staging.add_indices(rows), parameters.take(rows)
        kind = Kind(each & 255)
        if kind is Kind.GREEDY:
            planned.append(RowsOfKind(kind, index))
        else:
            numbers = _numbers(kind, chosen, staging, draws)
            planned.append(RowsOfKind(kind, index, each >> 8, **numbers))
    return planned


def _kinds(
    parameters: SamplingParameters, vocab_size: int, draws: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each row's kind, and the depth of its ranking."""
    top_k = parameters["top_k"].astype(np.int64)
    kinds = np.full(len(parameters), Kind.WHOLE, np.int64)
    depths = np.zeros(len(parameters), np.int64)
    kinds[parameters["top_p"] < 1] = Kind.NUCLEUS
    is_limited = (top_k > 0) & (top_k < vocab_size)
    if is_limited.any():
        kinds[is_limited] = Kind.SORTED
        # The next power of 2, so that there are few kinds.
        powers = 1 << np.ceil(np.log2(top_k.clip(_MIN_DEPTH))).astype(np.int64)
        is_listed = is_limited & (powers <= most_ranked(vocab_size))
        kinds[is_listed] = Kind.LISTED
        depths[is_listed] = powers[is_listed]
    if draws:
        is_greedy = parameters.greedy
        kinds[is_greedy] = Kind.GREEDY
        depths[is_greedy] = 0
    return kinds, depths


def _numbers(
    kind: Kind, parameters: SamplingParameters, staging: Staging, draws: bool
) -> dict[str, Staged | None]:
    """The columns that are not the same for all rows, or off."""

    def column(values: NDArray[Any], off: float) -> Staged | None:
        return staging.add(values[:, None]) if (values != off).any() else None

    temperature = np.where(parameters.greedy, 1, parameters["temperature"].clip(_MIN_TEMPERATURE))
    columns = {
        "temperature": column(temperature.astype(np.float32), 1),
        "min_p": column(parameters["min_p"], 0),
    }
    if kind is not Kind.WHOLE:
        columns["top_p"] = column(parameters["top_p"].astype(np.float64), 1)
    if kind in (Kind.LISTED, Kind.SORTED):
        columns["top_k"] = staging.add_indices(parameters["top_k"][:, None])
    if draws:
        drawn = uniforms(
            parameters["seed"], parameters["sample_index"], parameters["num_generated"]
        )
        columns["numbers"] = staging.add(drawn[:, None])
    return columns


def draw_rows(parameters: SamplingParameters) -> NDArray[np.void]:
    """[rows] of ``DRAW``: what a kernel needs to draw a token for each row."""
    rows = np.zeros(len(parameters), DRAW)
    temperature = parameters["temperature"]
    if not temperature.any():
        return rows
    for name in ("seed", "sample_index", "top_k", "top_p"):
        rows[name] = parameters[name]
    rows["position"] = parameters["num_generated"]
    rows["temperature"] = temperature
    is_low = (temperature > 0) & (temperature < _MIN_TEMPERATURE)
    if is_low.any():
        rows["temperature"][is_low] = _MIN_TEMPERATURE
    rows["log_min_p"] = -np.inf
    if parameters["min_p"].any():
        # By torch, whose logarithm may differ from numpy's in the last bit.
        shares = torch.from_numpy(np.ascontiguousarray(parameters["min_p"]))
        rows["log_min_p"] = shares.log().numpy()
    return rows
