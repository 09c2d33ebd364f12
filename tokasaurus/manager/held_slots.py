"""Finds the slots of sequences by their names, many at once, without Python per sequence."""

from __future__ import annotations

import numpy as np

from tokasaurus.manager.slots import IndexArray, SlotTable
from tokasaurus.protocol.arrays import Int32Array, Int64Array

__all__ = ["find_holding_slots"]

_HASH_FACTOR = 0x5851F42D4C957F2D  # odd: names collide only if their request ids are far apart


def find_holding_slots(
    slots: SlotTable, request_ids: Int64Array, sample_indices: Int32Array
) -> IndexArray:
    """The slot of each named sequence that holds for acknowledgements.

    Names are hashed to one integer each, and looked up among the sorted hashes of all holding
    slots. A hit is compared with the name itself.

    Returns:
        [names] slots; -1 where the sequence is not in a slot, does not hold for acknowledgements,
        or is hidden by another name with the same hash.
    """
    holding = slots.holding.nonzero()[0]
    if not holding.size:
        return np.full(len(request_ids), -1, np.intp)
    hashes = _hash(slots.request_id[holding], slots.sample_index[holding])
    by_hash = np.argsort(hashes)
    at = np.searchsorted(hashes, _hash(request_ids, sample_indices), sorter=by_hash)
    found = holding[by_hash[np.minimum(at, holding.size - 1)]]
    is_named = (slots.request_id[found] == request_ids) & (
        slots.sample_index[found] == sample_indices
    )
    return np.where(is_named, found, -1)


def _hash(request_ids: Int64Array, sample_indices: Int32Array) -> Int64Array:
    return request_ids * _HASH_FACTOR + sample_indices  # wraps around
