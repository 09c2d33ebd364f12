"""How many prompts may be in flight, and who still gets in when there are too many."""

from __future__ import annotations

from collections.abc import Callable

from tokasaurus.errors import EngineOverloaded

__all__ = ["check_queue"]


def check_queue(
    limit: int,
    *,
    num_prompts: int,
    num_clients: int,
    num_of_client: int,
    retry_after_s: Callable[[], int],
) -> None:
    """Raises EngineOverloaded if there is no room for a request of a client.

    Args:
        limit: prompts that the queue should hold.
        num_prompts: in flight.
        num_clients: with prompts in flight, and this one.
        num_of_client: those of ``num_prompts`` that are this client's.
        retry_after_s: when to come again.
    """
    if num_prompts < limit:
        return
    if num_prompts < 2 * limit and num_of_client * num_clients < limit:
        return
    raise EngineOverloaded(
        f"{num_prompts} prompts are in flight, and max_queued_requests={limit}; try again later",
        retry_after_s(),
    )
