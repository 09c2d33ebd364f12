"""What a configuration would do at best, by the cost of one batch of its steady state.

A plan ranks configurations by this before it simulates a few. All sequences are taken for the mean
one, batches are alike, and the device never waits::

    sequences that run  = the least of seats, what there is, and what pages hold
    a batch             = a token of each, and of prompts what makes up for those that end
    tokens per second   = sequences that run / seconds of the batch

Replicas and the lanes of a pipeline divide the sequences among themselves.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.planner.cost_model import NO_GROUPS, BatchWork, CostModel, GroupWork, Parts
from tokasaurus.planner.demand import Demand
from tokasaurus.planner.pipeline import Stages
from tokasaurus.protocol.messages import Sampling
from tokasaurus.rounding import ceil_div

__all__ = ["Bound", "Means", "bound"]


@dataclass(frozen=True)
class Means:
    """The mean sequence of a demand. Tokens are not rounded to pages.

    Attributes:
        num_sequences: that there are.
        samples: of a request.
        prompt: tokens that a sequence attends to before its own. Long answers weigh more.
        prefix: of these, the ones that many requests share.
        computed: tokens of prompts that are computed, for each sequence.
        output: tokens that a sequence generates.
        age: tokens that a running sequence has generated, at a random moment.
        longest: tokens that the longest answer has.
    """

    num_sequences: int
    samples: float
    prompt: float
    prefix: float
    computed: float
    output: float
    age: float
    longest: int

    @staticmethod
    def of(demand: Demand) -> Means:
        """The mean sequence of a demand."""
        trace = demand.trace
        counts = np.array([len(request.output_tokens) for request in trace])
        prompts = np.array([request.prompt_tokens for request in trace])
        prefixes = np.array([request.prefix_tokens for request in trace])
        outputs = np.concatenate([request.output_tokens for request in trace]).astype(np.float64)
        firsts = np.cumsum(counts) - counts
        tokens = np.add.reduceat(outputs, firsts)  # of each request
        once = {request.prefix_id: request.prefix_tokens for request in trace}
        num_sequences = int(counts.sum())
        return Means(
            num_sequences=num_sequences,
            samples=float(np.average(counts, weights=counts)),
            prompt=float(np.average(prompts, weights=tokens)),
            prefix=float(np.average(prefixes, weights=tokens)),
            computed=(int((prompts - prefixes).sum()) + sum(once.values())) / num_sequences,
            output=float(outputs.mean()),
            age=float((outputs**2).sum() / outputs.sum() / 2),
            longest=int(outputs.max()),
        )

    def dealt(self, count: int) -> Means:
        """The same for one of this number of replicas."""
        num_sequences = ceil_div(self.num_sequences, count)
        return dataclasses.replace(
            self, num_sequences=num_sequences, samples=min(self.samples, num_sequences)
        )

    def num_held(self, kv_tokens: int, page_size: int) -> float:
        """Running sequences whose pages hold this number of tokens, in all."""
        own = self.age + page_size / 2  # the last page is half full
        a_sequence = (self.prompt - self.prefix) / self.samples + own
        num_running = (kv_tokens - self.prefix) / a_sequence
        if num_running < self.samples:
            # A single request holds its whole prompt, however few of its samples run.
            num_running = (kv_tokens - self.prompt) / own
        return num_running


@dataclass(frozen=True)
class Bound:
    """A steady state.

    Attributes:
        num_running: sequences of a replica.
        limit: what keeps it from more: "seats", "pages", "tokens of a batch" or "the workload".
        parts: the seconds of a batch.
        tokens_per_s: of a replica.
        seconds: until a replica's part of the demand is done, at least.
    """

    num_running: float
    limit: str
    parts: Parts
    tokens_per_s: float
    seconds: float

    @property
    def batch_s(self) -> float:
        """The seconds of a batch, over all stages."""
        return sum(self.parts)


def bound(means: Means, manager: ManagerConfig, cost: CostModel, stages: Stages) -> Bound:
    """The best that a replica can do.

    Args:
        means: of the replica's part of the demand.
        manager: its limits.
        cost: of a batch in all stages together.
        stages: of the device.
    """
    num_running, limit = _num_running(means, manager)
    num_lanes = min(manager.num_lanes, num_running)
    work = _work(means, manager, num_running / num_lanes, cost)
    parts = cost.parts(work)
    batch_s = sum(parts)
    # A lane's next batch waits for the ids of the one before, and each stage runs all lanes.
    way_s = batch_s + (stages.count * stages.hop_s if stages.count > 1 else 0.0)
    round_s = max(num_lanes * batch_s * max(stages.shares), way_s)
    tokens_per_s = num_running / round_s
    alone_s = cost.batch_s(_work(means, manager, 1.0, cost))
    return Bound(
        num_running=num_running,
        limit=limit,
        parts=parts,
        tokens_per_s=tokens_per_s,
        seconds=max(means.num_sequences * means.output / tokens_per_s, means.longest * alone_s),
    )


def _num_running(means: Means, manager: ManagerConfig) -> tuple[float, str]:
    """The sequences that run at a time, and what limits them."""
    for_pages = means.num_held(manager.num_pages * manager.page_size, manager.page_size)
    # Each running sequence brings tokens of the prompts that come after it.
    for_rows = manager.max_tokens_per_forward / (1 + means.computed / means.output)
    limits = {
        "the workload": float(means.num_sequences),
        "seats": float(manager.max_running),
        "pages": for_pages,
        "tokens of a batch": for_rows * manager.num_lanes,
    }
    limit = min(limits, key=lambda name: limits[name])
    return max(limits[limit], 1.0), limit


def _work(means: Means, manager: ManagerConfig, num_running: float, cost: CostModel) -> BatchWork:
    """The mean batch of this number of sequences that decode."""
    num_rows = max(round(num_running), 1)
    num_fed = round(num_rows * means.computed / means.output)
    num_chunks = ceil_div(num_fed, max(round(means.prompt), 1))
    lengths = np.array(_equal(num_fed, num_chunks), np.int32)
    num_ended = round(num_rows / means.output)
    return BatchWork(
        num_decodes=num_rows,
        num_decode_positions=round(num_rows * (means.prompt + means.age)),
        chunk_lengths=lengths,
        chunk_ends=np.maximum(lengths, np.int32(means.prompt)),
        num_draws=num_rows + num_ended,
        draw_s=(num_rows + num_ended) * cost.draws.of(Sampling(), -1),
        groups=_groups(means, manager, num_rows),
    )


def _groups(means: Means, manager: ManagerConfig, num_rows: int) -> GroupWork:
    """A group for each request that runs, and one around them for what requests share."""
    if not manager.use_groups:
        return NO_GROUPS
    num_requests = max(round(num_rows / means.samples), 1)
    groups = [(num_rows, round(means.prefix))]
    groups += [
        (size, round(means.prompt - means.prefix)) for size in _equal(num_rows, num_requests)
    ]
    worthwhile = [
        group
        for group in groups
        if group[0] >= manager.min_group_size and group[1] >= manager.min_prefix_len
    ]
    if not worthwhile:
        return NO_GROUPS
    num_decodes, num_tokens = np.array(worthwhile, np.int32).T
    nothing = np.zeros_like(num_decodes)
    return GroupWork(num_decodes, num_tokens, nothing, nothing)


def _equal(total: int, count: int) -> list[int]:
    """Whole numbers that add up to a total and differ by one at most."""
    return [(total + index) // count for index in range(count)]
