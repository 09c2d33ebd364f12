"""A plan in words and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokasaurus.planner.candidates import Question
from tokasaurus.planner.demand import Demand
from tokasaurus.planner.explanation import why_slower
from tokasaurus.planner.search import Outcome, Plan

__all__ = ["PlanReport"]

_PARTS = {
    "host_s": "launches",
    "layers_s": "products of the layers",
    "exchange_s": "exchanges between devices",
    "attention_s": "attention",
    "head_s": "the head",
    "draws_s": "drawing",
}


@dataclass(frozen=True)
class PlanReport:
    """A plan, and what it was made for.

    Attributes:
        price_per_hour: of one device, in any currency; None if unknown.
        model: as the user wrote it; None for the bundled one.
    """

    plan: Plan
    question: Question
    demand: Demand
    model: str | None
    price_per_hour: float | None = None

    @property
    def command(self) -> str:
        """The line that starts the best configuration."""
        model = [] if self.model is None else [f"model={self.model}"]
        return " ".join(["toka", *model, *self.plan.best.candidate.words])

    def cost_per_million(self, outcome: Outcome) -> float | None:
        """The price of a million generated tokens."""
        if self.price_per_hour is None:
            return None
        hourly = self.price_per_hour * self.question.num_devices
        return hourly / 3600 / outcome.tokens_per_s * 1e6

    # --- words --------------------------------------------------------------------------------

    @property
    def premises(self) -> list[str]:
        """What was planned, a line each."""
        facts, device, demand = self.question.facts, self.question.device, self.demand
        when = "all there at the beginning"
        if not demand.arrives_at_once:
            when = f"the last one arrives after {demand.trace[-1].arrival_s:,.0f} s"
        figures = [
            f"{name} {each.value:g} ({each.source})" for name, each in device.figures.items()
        ]
        return [
            f"model: {facts.num_parameters:,} parameters in {facts.num_layers} layers",
            f"workload: {demand.num_requests:,} requests, {demand.num_sequences:,} samples,"
            f" {demand.num_prompt_tokens:,} prompt tokens, {demand.num_output_tokens:,} to"
            f" generate; {when}",
            f"devices: {self.question.num_devices} x {device.name}",
            *(f"  {line}" for line in figures),
        ]

    @property
    def heads(self) -> tuple[str, ...]:
        """Of the columns of :attr:`rows`."""
        heads = ("layout", "sequences", "tokens", "page", "KV tokens", "run", "tokens/s", "time")
        price = () if self.price_per_hour is None else ("a million",)
        return (*heads, *price, "why not")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The configurations, the best first. The last cells have the same width."""
        rows = [self._row(outcome) for outcome in self.plan.outcomes]
        width = max(len(row[-1]) for row in rows)
        return [(*row[:-1], row[-1].ljust(width)) for row in rows]

    @property
    def conclusion(self) -> list[str]:
        """About the best configuration, a line each."""
        best = self.plan.best
        parts = sorted(best.bound.parts._asdict().items(), key=lambda each: -each[1])
        shares = [
            f"{_PARTS[name]} {seconds / best.bound.batch_s:.0%}"
            for name, seconds in parts
            if seconds > 0.005 * best.bound.batch_s
        ]
        lines = [
            best.candidate.slices.memory_plan.line,
            f"a batch of {best.bound.num_running / best.candidate.manager.num_lanes:,.0f}"
            f" sequences takes {best.bound.batch_s * 1e3:.3g} ms: {', '.join(shares)}",
            f"what keeps more sequences from running: {best.bound.limit}",
            f"expect {best.tokens_per_s:,.0f} generated tokens/s and {_time(best.seconds)}, more or"
            f" less {best.cost.error:.0%}",
        ]
        if best.simulated is not None:
            share = best.simulated.report.peak_cache_use
            lines.insert(
                1,
                f"sequences held at most {share * best.candidate.kv_tokens:,.0f} tokens of a"
                f" replica's KV cache, {share:.1%}",
            )
        cost = self.cost_per_million(best)
        if cost is not None:
            lines.append(f"a million generated tokens cost {cost:.3g} at this price")
        return lines

    @property
    def notes(self) -> list[str]:
        """How the plan was made, a line each."""
        plan = self.plan
        simulated = [each for each in plan.outcomes if each.simulated is not None]
        lines = [f"{plan.num_bounds} configurations were ranked, and {len(simulated)} simulated"]
        if len(simulated) < len(plan.outcomes):
            lines.append("of the others, tokens/s are at most so many (<)")
        if plan.ran_out:
            lines.append("time ran out before the search had ended; raise max_s")
        shares = {each.simulated.share for each in simulated if each.simulated}
        if shares and min(shares) < 1:
            lines.append(
                f"at least {min(shares):.1%} of a replica's samples were simulated; the rest is"
                " taken to go on like them"
            )
        return lines

    def _row(self, outcome: Outcome) -> tuple[str, ...]:
        manager = outcome.candidate.manager
        sign = "" if outcome.simulated else "<"
        cost = self.cost_per_million(outcome)
        return (
            str(outcome.candidate.layout),
            f"{manager.max_seqs_per_forward:,}",
            f"{manager.max_tokens_per_forward:,}",
            str(manager.page_size),
            f"{outcome.candidate.kv_tokens:,}",
            f"{outcome.bound.num_running:,.0f}",
            f"{sign}{outcome.tokens_per_s:,.0f}",
            f"{'' if outcome.simulated else '>'}{_time(outcome.seconds)}",
            *(() if cost is None else (f"{cost:.3g}",)),
            why_slower(outcome, self.plan.best),
        )

    # --- JSON ---------------------------------------------------------------------------------

    @property
    def json(self) -> Mapping[str, Any]:
        """Everything, for programs."""
        question, demand = self.question, self.demand
        return {
            "command": self.command,
            "model": {
                "num_parameters": question.facts.num_parameters,
                "num_layers": question.facts.num_layers,
                "dtype": self.plan.best.candidate.dtype,
            },
            "workload": {
                "source": demand.source,
                "requests": demand.num_requests,
                "samples": demand.num_sequences,
                "prompt_tokens": demand.num_prompt_tokens,
                "output_tokens": demand.num_output_tokens,
            },
            "device": {
                "key": question.device.key,
                "count": question.num_devices,
                "figures": {
                    name: {"value": each.value, "source": each.source}
                    for name, each in question.device.figures.items()
                },
            },
            "configurations": [self._json(outcome) for outcome in self.plan.outcomes],
            "num_bounds": self.plan.num_bounds,
            "ran_out": self.plan.ran_out,
        }

    def _json(self, outcome: Outcome) -> dict[str, Any]:
        candidate, layout = outcome.candidate, outcome.candidate.layout
        manager, report = candidate.manager, outcome.simulated and outcome.simulated.report
        return {
            "dp_size": layout.dp_size,
            "tp_size": layout.tp_size,
            "pp_size": layout.pp_size,
            "page_size": manager.page_size,
            "max_seqs_per_forward": manager.max_seqs_per_forward,
            "max_tokens_per_forward": manager.max_tokens_per_forward,
            "kv_tokens": candidate.kv_tokens,
            "memory": candidate.slices.memory_plan.line,
            "tokens_per_s": outcome.tokens_per_s,
            "seconds": outcome.seconds,
            "cost_per_million_tokens": self.cost_per_million(outcome),
            "error": outcome.cost.error,
            "bound": {
                "tokens_per_s": layout.dp_size * outcome.bound.tokens_per_s,
                "seconds": outcome.bound.seconds,
                "num_running": outcome.bound.num_running,
                "limit": outcome.bound.limit,
                "batch_s": outcome.bound.parts._asdict(),
            },
            "simulated": report
            and {
                "share": outcome.simulated and outcome.simulated.share,
                "preemptions": report.num_preemptions,
                "device_idle": report.device_idle,
                "mean_batch_size": report.mean_batch_size,
                "mean_latency_s": report.mean_latency_s,
                "cached_tokens": report.num_cached_tokens,
                "peak_kv_tokens": round(report.peak_cache_use * candidate.kv_tokens),
            },
            "why": why_slower(outcome, self.plan.best),
        }


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"
