"""Why a plan prefers one configuration to another, in a few words."""

from __future__ import annotations

from tokasaurus.planner.cost_model import Parts
from tokasaurus.planner.search import Outcome

__all__ = ["why_slower"]

_CLEARLY = 1.02  # bounds that differ by less do not explain anything


def why_slower(outcome: Outcome, best: Outcome) -> str:
    """Why an outcome is slower than the best one; "" for the best one itself."""
    if outcome is best:
        return ""
    own = "the engine's defaults: " if outcome.is_default else ""
    return own + _why(outcome, best)


def _why(outcome: Outcome, best: Outcome) -> str:
    if outcome.bound.seconds > _CLEARLY * best.bound.seconds:
        return _by_bounds(outcome, best)
    return _by_simulations(outcome, best)


def _by_bounds(outcome: Outcome, best: Outcome) -> str:
    """What takes more time for a generated token than in the best configuration."""
    mine, theirs = _per_token(outcome), _per_token(best)
    more = {name: getattr(mine, name) - getattr(theirs, name) for name in Parts._fields}
    part = max(more, key=lambda name: more[name])
    rows = f"{_rows(outcome):,.0f} sequences"
    share = getattr(outcome.bound.parts, part) / outcome.bound.batch_s
    reasons = {
        "host_s": f"a batch is launched for {rows}",
        "layers_s": f"the weights are read for {rows}",
        "head_s": f"the head's weights are read for {rows}",
        "exchange_s": f"{share:.0%} of the time goes to exchanges between devices",
        "attention_s": f"attention takes {share:.0%} of the time",
        "draws_s": f"drawing takes {share:.0%} of the time",
    }
    if more[part] <= 0:
        return "stages wait for one another"
    return f"{reasons[part]}{_limit(outcome, best)}"


def _by_simulations(outcome: Outcome, best: Outcome) -> str:
    """What happened, if bounds are alike."""
    if outcome.simulated is None:
        return "not simulated; its bound is as good"
    if outcome.seconds <= best.seconds * 1.005:
        return "as fast"
    mine, theirs = outcome.simulated.report, best.simulated.report if best.simulated else None
    if (
        theirs is not None
        and mine.num_preemptions > theirs.num_preemptions + mine.num_sequences / 50
    ):
        return f"preempts {mine.num_preemptions:,} of {mine.num_sequences:,} sequences"
    if theirs is not None and mine.device_idle > theirs.device_idle + 0.02:
        return f"the device waits {mine.device_idle:.0%} of the time"
    return f"batches are smaller: {mine.mean_batch_size:,.0f} tokens drawn in each"


def _per_token(outcome: Outcome) -> Parts:
    """The seconds of all devices for a generated token."""
    rows = _rows(outcome) / outcome.candidate.layout.pp_size * outcome.candidate.layout.dp_size
    return Parts(*(seconds / rows for seconds in outcome.bound.parts))


def _rows(outcome: Outcome) -> float:
    """Sequences in a batch."""
    return outcome.bound.num_running / outcome.candidate.manager.num_lanes


def _limit(outcome: Outcome, best: Outcome) -> str:
    if outcome.bound.num_running >= best.bound.num_running:
        return ""
    return {
        "pages": ", which is what pages hold",
        "seats": ", which have a seat",
        "tokens of a batch": ", which is what a batch holds",
        "the workload": ", which is all there is",
    }[outcome.bound.limit]
