"""Sizes of the KV cache and of batches: those that were asked for, the others adapted to memory."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.memory import Memory
from tokasaurus.config.slices import MemoryPlan
from tokasaurus.rounding import ceil_div, round_up

__all__ = ["Limits", "plan_limits", "plan_memory"]

DEFAULT_KV_TOKENS = 131072
DEFAULT_PAGE_SIZE = 16
DEFAULT_MAX_SEQS = 1024
DEFAULT_MAX_TOKENS = 8192
LEAST_MAX_TOKENS = 256  # where memory is short and the user set none


@dataclass(frozen=True)
class Limits:
    """Sizes that are consistent with one another.

    Attributes:
        num_pages: as planned.
        least_pages: without them the engine would not be what it says: a KV cache of this size was
            asked for, or requests may be this long.
        most_pages: that sequences can fill, and that have room beside the weights.
        max_request_tokens: prompt and completion together.
        max_seqs: that run together.
        max_tokens: of a batch.
    """

    page_size: int
    num_pages: int
    least_pages: int
    most_pages: int
    max_request_tokens: int
    max_seqs: int
    max_tokens: int


def plan_limits(
    config: EngineConfig, max_positions: int, memory: Memory, problems: list[str]
) -> Limits:
    """Decides sizes of the KV cache and of a batch.

    Args:
        config: the user's choices.
        max_positions: of the model.
        memory: of the device.
        problems: gets one line for every conflict.
    """
    page_size = _page_size(config, problems)
    asked = config.max_num_tokens_per_request
    batch = _batch_size(config, memory, problems)
    kv_tokens, most = _kv_tokens(config, page_size, asked or max_positions, batch, memory, problems)
    if asked is not None and asked > max_positions:
        problems.append(
            f"max_num_tokens_per_request={asked}: the model has {max_positions} positions; "
            "lower it, or stretch the model with rope_scaling"
        )
    longest = asked or min(max_positions, kv_tokens)
    is_fixed = isinstance(config.kv_cache_num_tokens, int)
    return Limits(
        page_size=page_size,
        num_pages=kv_tokens // page_size,
        least_pages=ceil_div(kv_tokens if is_fixed else longest, page_size),
        most_pages=most // page_size,
        max_request_tokens=longest,
        max_seqs=batch.max_seqs,
        max_tokens=batch.max_tokens,
    )


def _page_size(config: EngineConfig, problems: list[str]) -> int:
    kv_tokens, page_size = config.kv_cache_num_tokens, config.page_size
    if page_size is not None and isinstance(kv_tokens, int) and kv_tokens % page_size:
        below = kv_tokens // page_size * page_size
        nearby = f"{below} or {below + page_size}" if below else f"{page_size}"
        problems.append(
            f"kv_cache_num_tokens={kv_tokens} is not a multiple of page_size={page_size}; "
            f"set kv_cache_num_tokens={nearby}, or leave page_size out"
        )
    return page_size or DEFAULT_PAGE_SIZE


def _kv_tokens(
    config: EngineConfig,
    page_size: int,
    longest: int,
    batch: _BatchSize,
    memory: Memory,
    problems: list[str],
) -> tuple[int, int]:
    """Tokens in the KV cache, whole numbers of pages: as planned, and at most.

    Args:
        longest: tokens of the longest request, if the cache does not limit it.
    """
    tokens, asked = config.kv_cache_num_tokens, config.max_num_tokens_per_request
    room = memory.room(batch.max_tokens) if memory.has_room_for_weights else None
    if tokens is None or tokens == "auto":
        flag = f"max_num_tokens_per_request={asked}" if asked else f"page_size={page_size}"
        remedy = "lower it, or free memory"
        most = DEFAULT_KV_TOKENS
        if tokens == "auto" and room is not None:
            # Sequences that run together fill no more.
            most = batch.max_seqs * round_up(longest, page_size)
        least = round_up(asked or 1, page_size)
        tokens = _whole_pages(most, memory.usual_room(batch.max_tokens), page_size, least)
        most = _whole_pages(most, memory.most_room, page_size, tokens)
    else:
        if asked is not None and asked > tokens:
            problems.append(
                f"max_num_tokens_per_request={asked} does not fit into "
                f"kv_cache_num_tokens={tokens}; raise the second, or leave the first out"
            )
        most = tokens = round_up(tokens, page_size)
        flag = f"kv_cache_num_tokens={config.kv_cache_num_tokens}"
        fitting = (room or 0) // page_size * page_size
        remedy = "auto takes what fits, less a tenth of the free memory"
        if fitting:
            remedy = f"kv_cache_num_tokens={fitting} fits, and {remedy}"
    if room is not None and tokens > room and memory.batch_fits(batch.max_tokens):
        problems.append(f"{flag} {memory.kv_does_not_fit(tokens, batch.max_tokens)}; {remedy}")
    return tokens, most


def _whole_pages(most: int, room: int | None, page_size: int, least: int) -> int:
    """Tokens in whole pages: the most for which there is room, and no fewer than the least."""
    tokens = most if room is None else min(most, room)
    return max(tokens // page_size * page_size, least)


def plan_memory(memory: Memory, limits: Limits) -> MemoryPlan:
    """What takes how much of the device."""
    kv_tokens = limits.num_pages * limits.page_size
    return MemoryPlan(
        line=memory.plan(kv_tokens, limits.max_tokens),
        device=memory.device,
        free_bytes=memory.free_bytes,
        items=tuple(memory.items(kv_tokens, limits.max_tokens)),
        kv_tokens=kv_tokens,
        most_kv_tokens=limits.most_pages * limits.page_size,
        max_request_tokens=limits.max_request_tokens,
    )


@dataclass(frozen=True)
class _BatchSize:
    """Sequences that run together, and tokens of a batch, which has at least one per sequence."""

    max_seqs: int
    max_tokens: int


def _batch_size(config: EngineConfig, memory: Memory, problems: list[str]) -> _BatchSize:
    seqs, tokens = config.max_seqs_per_forward, config.max_tokens_per_forward
    if seqs is not None and tokens is not None and seqs > tokens:
        problems.append(
            f"max_seqs_per_forward={seqs} exceeds max_tokens_per_forward={tokens}, and each"
            " running sequence takes a token of every step; lower the first, or leave one of"
            " them out"
        )
    flag = f"max_tokens_per_forward={tokens}"
    if tokens is None:
        flag = f"max_seqs_per_forward={seqs}" if seqs else "the smallest batch"
        tokens = memory.usual_batch(DEFAULT_MAX_TOKENS, LEAST_MAX_TOKENS)
        tokens = max(tokens, seqs or 0)
    if memory.has_room_for_weights and not memory.batch_fits(tokens):
        problems.append(f"{flag} {memory.batch_does_not_fit(tokens)}")
    return _BatchSize(seqs or min(DEFAULT_MAX_SEQS, tokens), tokens)
