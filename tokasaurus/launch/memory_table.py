"""The plan of a worker's memory as a table, for ``toka ... --show-memory``."""

from __future__ import annotations

from collections.abc import Iterator

from tokasaurus.config.memory import amount
from tokasaurus.config.slices import MemoryPlan

__all__ = ["memory_table"]


def memory_table(plan: MemoryPlan) -> str:
    """A row for each part: its name, its bytes, and what they follow from."""
    rows = [
        *((item.name, item.num_bytes, item.reason) for item in plan.items),
        *_sums(plan),
    ]
    names = max(len(name) for name, _, _ in rows)
    numbers = max(len(f"{num_bytes:,}") for _, num_bytes, _ in rows)
    sizes = max(len(amount(abs(num_bytes))) for _, num_bytes, _ in rows)
    lines = [
        f"{name:<{names}}  {num_bytes:>{numbers},}  {amount(num_bytes):>{sizes}}  {reason}"
        for name, num_bytes, reason in rows
    ]
    lines.insert(len(plan.items), "")
    return "\n".join(
        [f"memory of a worker on {plan.device}, in bytes", "", *lines, "", *_notes(plan)]
    )


def _sums(plan: MemoryPlan) -> Iterator[tuple[str, int, str]]:
    total = sum(item.num_bytes for item in plan.items)
    yield "total", total, "at most"
    if plan.free_bytes is not None:
        yield "free", plan.free_bytes, "of the device, for this worker"
        yield "reserve", plan.free_bytes - total, "free less total"


def _notes(plan: MemoryPlan) -> Iterator[str]:
    whole = plan.kv_tokens // plan.max_request_tokens
    yield (
        f"The KV cache holds {plan.kv_tokens:,} tokens: {whole:,} sequences of"
        f" {plan.max_request_tokens:,} tokens, the longest that a request may be."
    )
    if plan.device == "cpu":
        yield "All of this is arithmetic, from config.json and the flags."
        return
    yield (
        "All of this is arithmetic, from config.json and the flags. When it has loaded the weights,"
        " the worker runs its largest batches and measures."
    )
    if plan.most_kv_tokens > plan.kv_tokens:
        yield (
            "The KV cache then takes what is left, less a reserve: up to"
            f" {plan.most_kv_tokens:,} tokens."
        )
