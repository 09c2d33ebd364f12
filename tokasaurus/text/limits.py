"""What limits throughput, in one sentence with its remedy.

The statistics line, ``/metrics`` and the page all say what ``find_limit`` says of two statistics,
so they never contradict each other. It knows neither clocks nor managers: the seconds that it
compares are in the statistics.

The manager counts for each batch what kept more sequences from running. The reason of most batches
counts, unless the device had to wait: then none of these reasons does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokasaurus.protocol.messages import Statistics

__all__ = ["KINDS", "Limit", "find_limit", "kv_use"]

KINDS = (
    "idle",
    "paused",
    "requests",
    "kv_cache",
    "seats",
    "device",
    "host",
    "stages",
    "server",
)
"""Everything that can limit throughput; docs/page.md explains them."""

_BUSY = 0.8  # share of the time with batches in flight; a device that computes less is kept waiting
_HALF_BUSY = 0.5  # the same, while twice as many sequences would run if there were room
_BUBBLE = 0.25  # share of the computing time; stages that wait for more are a limit
_SERVER_BUSY = 0.9  # share of one processor
_ROOM = 1.05  # more is worth a change of a flag


@dataclass(frozen=True)
class Limit:
    """What limits throughput.

    Attributes:
        kind: one of ``KINDS``.
        sentence: what it is, and what helps.
        flag: that helps; None if no flag does.
        value: for the flag; None if there is no good guess.
    """

    kind: str
    sentence: str
    flag: str | None = None
    value: int | None = None


def kv_use(statistics: Statistics) -> float:
    """The share of the KV cache's pages that sequences hold; 0 while there are no pages."""
    if not statistics.num_pages:
        return 0.0
    unused = statistics.num_free_pages + statistics.num_evictable_pages
    return 1 - unused / statistics.num_pages


def find_limit(
    before: Statistics, now: Statistics, *, num_held: int = 0, server_busy: float = 0.0
) -> Limit:
    """What limited throughput between two statistics of the same engine.

    Args:
        before: the earlier ones.
        now: the later ones.
        num_held: sequences that the server holds back from the manager.
        server_busy: the share of the time in which the server's thread computed.
    """
    num_waiting = now.num_waiting + num_held
    if now.paused:
        return Limit("paused", "paused: requests wait for a command (resume, or new weights)")
    if not now.num_running and not num_waiting:
        return Limit("idle", "idle: no request is in flight")
    batches = {
        "requests": 0,
        "device": now.num_full_batches - before.num_full_batches,
        "seats": now.num_seat_bound_batches - before.num_seat_bound_batches,
        "kv_cache": now.num_page_bound_batches - before.num_page_bound_batches,
    }
    batches["requests"] = now.num_batches - before.num_batches - sum(batches.values())
    if not num_waiting:  # what kept sequences waiting a moment ago is over
        del batches["seats"], batches["kv_cache"]
    kind = max(batches, key=lambda each: batches[each])
    if kind == "requests" and server_busy >= _SERVER_BUSY:
        return _server(server_busy)
    # Where few sequences run, further ones cost the host little, and the device less.
    is_loaded = kind != "requests" or 2 * now.num_running >= now.num_seats
    active_s = now.active_s - before.active_s
    device_s = now.device_s - before.device_s
    # Where twice as many could run, that counts for more than a device that waits now and then.
    could_run = now.num_running + num_waiting
    if kind == "kv_cache":
        could_run = min(could_run, now.num_seats)
    enough = _HALF_BUSY if could_run >= 2 * now.num_running else _BUSY
    if is_loaded and device_s < enough * active_s:
        return _host(device_s / active_s)
    waited_s = now.waited_s - before.waited_s
    if is_loaded and waited_s > _BUBBLE * device_s:
        return _stages(waited_s / device_s)
    if kind == "device":
        return _device(before, now)
    if kind == "seats":
        return _seats(now, num_waiting)
    if kind == "kv_cache":
        return _kv_cache(now, num_waiting)
    return _requests(now, num_waiting)


def _requests(now: Statistics, num_waiting: int) -> Limit:
    # Those that wait came a moment ago: in most batches none did.
    waiting = f"{num_waiting} have just come" if num_waiting else "none waits"
    room = f"{now.num_running} of {now.num_seats} sequences run and {waiting}"
    return Limit("requests", f"too few requests: {room}; send more at once")


def _kv_cache(now: Statistics, num_waiting: int) -> Limit:
    replicas = max(1, now.num_replicas)
    present = now.num_pages * now.page_size // replicas
    wanted = min(now.num_running + num_waiting, max(now.num_seats, now.num_running))
    needed = _two_digits(present * max(_ROOM, wanted / max(1, now.num_running)))
    what = f"{now.num_running} sequences run, {num_waiting} wait and {now.num_seats} could run"
    remedy = f"raise kv_cache_num_tokens from {present} to {needed} if there is memory for it"
    return Limit("kv_cache", f"KV cache full: {what}; {remedy}", "kv_cache_num_tokens", needed)


def _seats(now: Statistics, num_waiting: int) -> Limit:
    replicas = max(1, now.num_replicas)
    use = kv_use(now)
    # As many as there are, or as many as fit the KV cache.
    wanted = min(now.num_running + num_waiting, now.num_seats / max(use, 0.01))
    what = f"{num_waiting} sequences wait and the KV cache is {use:.0%} full"
    reached = f"max_seqs_per_forward={now.num_seats // replicas} reached: {what}"
    if wanted < _ROOM * now.num_seats:
        remedy = "raise it together with kv_cache_num_tokens if there is memory for both"
        return Limit("seats", f"{reached}; {remedy}", "max_seqs_per_forward")
    value = _two_digits(wanted / replicas)
    return Limit("seats", f"{reached}; raise it to {value}", "max_seqs_per_forward", value)


def _device(before: Statistics, now: Statistics) -> Limit:
    computed = now.num_prefill_tokens - before.num_prefill_tokens
    cached = now.num_cached_tokens - before.num_cached_tokens
    decoded = now.num_decode_tokens - before.num_decode_tokens
    share = computed / max(1, computed + decoded)
    hits = cached / max(1, computed + cached)
    what = f"batches are as large as max_tokens_per_forward allows, {share:.0%} of them prompts"
    remedy = "let prompts begin alike, or add replicas (dp_size)"
    return Limit("device", f"device: {what} ({hits:.0%} are found in the cache); {remedy}")


def _host(busy: float) -> Limit:
    what = f"the device computes {busy:.0%} of the time and waits for the manager otherwise"
    remedy = "give the engine's processes more cores, or raise scheduling_steps_ahead"
    return Limit("host", f"host: {what}; {remedy}", "scheduling_steps_ahead")


def _stages(bubble: float) -> Limit:
    what = f"the last of the workers waits {bubble:.0%} of its time for the others"
    remedy = "send more requests at once, or lower pp_size or tp_size in favour of dp_size"
    return Limit("stages", f"stages: {what}; {remedy}", "dp_size")


def _server(busy: float) -> Limit:
    what = f"the server's process computes {busy:.0%} of the time and the manager waits for it"
    return Limit("server", f"server: {what}; raise server_processes", "server_processes")


def _two_digits(number: float) -> int:
    """The number, rounded up to two digits."""
    unit: int = 10 ** max(0, len(str(int(number))) - 2)
    return math.ceil(number / unit) * unit
