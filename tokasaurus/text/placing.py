"""How the samples of a request are dealt out to replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import GenerateRequest, Progress
from tokasaurus.text.routes import Replica

__all__ = ["as_int32", "progress_of", "shares_of"]

# A replica with this share more of work than another is hardly busier.
_SLACK = 0.5


def shares_of(
    request: GenerateRequest, num_samples: int, choice: Sequence[Replica], cached: Mapping[int, int]
) -> list[tuple[Replica, int]]:
    """How many samples each replica gets, without those that get none.

    ``tokasaurus.text.replicas`` says by which rules.

    Args:
        request: of the samples.
        num_samples: to be placed.
        choice: the replicas that may get some.
        cached: prompt tokens that are probably in a replica's cache, by its number.
    """
    best = _best(num_samples, choice, cached)
    if best.room >= num_samples or len(choice) == 1:
        return [(best, num_samples)]
    rooms = {replica: max(0, replica.room) for replica in choice}
    must_wait = sum(rooms.values()) < num_samples <= best.num_seats
    if must_wait or not _may_be_split(request):
        return [(best, num_samples)]
    shares, left = dict.fromkeys(rooms, 0), num_samples
    for replica in sorted(rooms, key=lambda replica: -rooms[replica]):
        shares[replica] = min(left, rooms[replica])
        left -= shares[replica]
    each, more = divmod(left, len(shares))
    for index, replica in enumerate(shares):
        shares[replica] += each + (index < more)
    return [(replica, count) for replica, count in shares.items() if count]


def _best(num_samples: int, choice: Sequence[Replica], cached: Mapping[int, int]) -> Replica:
    """The replica for samples, of those with enough seats or, if none has, of all.

    That is the one that would have the least work with the request. But one that has more of the
    prompt gets it as long as it is hardly busier: a difference in work passes, and the cache of a
    replica that computes what another has drops something else.
    """
    # One pass without calls: there may be many replicas.
    best = holder = choice[0]  # holder: of the most cached tokens
    best_fits, least, most = False, 0, 0
    for replica in choice:
        fits = replica.num_seats - replica.num_open >= num_samples
        if best_fits and not fits:
            continue
        num_cached = cached.get(replica.number, 0) if cached else 0
        work = replica.work - num_cached
        if replica is choice[0] or fits is not best_fits:
            best = holder = replica
            best_fits, least, most = fits, work, num_cached
            continue
        if work < least:
            best, least = replica, work
        if num_cached > most or (num_cached == most and replica.work < holder.work):
            holder, most = replica, num_cached
    return holder if holder.work - most <= least + _SLACK * best.work else best


def _may_be_split(request: GenerateRequest) -> bool:
    """Whether samples may run apart.

    With prompt logprobs, which sample 0 brings, and ``first_k``, samples elsewhere could end the
    request before the logprobs have come.
    """
    return request.num_prompt_logprobs < 0 or not request.first_k


def progress_of(
    indices: Sequence[int], generated: Mapping[int, Sequence[int]], num_finished: int
) -> Progress:
    tokens = [generated.get(index, ()) for index in indices]
    return Progress(
        sample_indices=as_int32(indices),
        num_generated=as_int32([len(ids) for ids in tokens]),
        generated_ids=as_int32([token for ids in tokens for token in ids]),
        num_finished=num_finished,
    )


def as_int32(values: Iterable[int]) -> Int32Array:
    return np.array(list(values), np.int32)
