"""What an engine asks of a Ray cluster: bundles of resources, and which process is in which.

A bundle is always on one node. So it holds the workers that must be close to one another: those of
a whole replica if a node has room for them, otherwise those of one stage, which share each layer.
Bundles are spread over the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch.remote.launcher import Place
from tokasaurus.protocol.role import Role

__all__ = ["Bundles", "plan_bundles"]


@dataclass(frozen=True)
class Bundles:
    """A plan for an engine.

    Attributes:
        resource: "GPU" or "CPU".
        amount: of the resource in each bundle.
        count: bundles.
        workers: of the engine in each bundle.
        places: of each manager and worker; outpost k is in bundle k.
    """

    resource: str
    amount: int
    count: int
    workers: int
    places: Mapping[Role, Place]

    def room_in(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many of the bundles nodes with these resources could hold, were they empty."""
        return min(
            self.count, sum(int(each.get(self.resource, 0) // self.amount) for each in nodes)
        )

    def __str__(self) -> str:
        return f"{self.count} x {self.amount} {self.resource}"


def plan_bundles(config: EngineConfig, nodes: Sequence[Mapping[str, float]]) -> Bundles:
    """Divides an engine's workers into bundles.

    Args:
        config: the user's choices.
        nodes: the resources of each node, in Ray's words.
    """
    resource = "CPU"
    if config.device == "cuda" or (
        config.device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes)
    ):
        resource = "GPU"
    each = 1 if resource == "GPU" else config.cpu_threads or 1
    largest = max((int(node.get(resource, 0) // each) for node in nodes), default=0)
    size = config.pp_size * config.tp_size
    # Where not even a stage fits, nodes are still to come.
    num_together = config.tp_size if config.tp_size <= largest < size else size
    count = config.dp_size * size // num_together
    places = {}
    for replica in range(config.dp_size):
        for rank in range(size):
            number = replica * size + rank
            num_threads = each if resource == "CPU" else None
            place = Place(number // num_together, number % num_together, num_threads)
            places[Role("worker", replica, rank)] = place
        places[Role("manager", replica)] = Place(replica * size // num_together)
    return Bundles(resource, each * num_together, count, num_together, places)
