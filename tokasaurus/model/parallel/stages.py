"""Which layers each stage of a pipeline runs. Knows costs, and nothing of tensors or processes."""

from __future__ import annotations

import math

from tokasaurus.errors import ConfigError

__all__ = ["divide_layers", "stage_costs"]


def divide_layers(
    num_layers: int,
    pp_size: int,
    layer_cost: float = 1.0,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
) -> list[range]:
    """Divides layers over the stages of a pipeline, so that the slowest stage is as fast as can be.

    The slowest stage sets the pace of all. Each stage gets consecutive layers, and at least one.
    Costs are times on any scale: only their ratios matter.

    All layers cost the same. So after one layer for each stage, it is best to give layer after
    layer to the stage that will cost least with it: no division has a lower maximum, and none that
    has the same one has a lower next one. Of stages that would cost the same, those between the
    first and the last come first, since they hold neither embeddings nor head.

    Args:
        num_layers: of the model.
        pp_size: stages.
        layer_cost: of one layer, more than 0.
        first_cost: what the first stage does besides: embeddings.
        last_cost: what the last stage does besides: the final norm, the head and sampling.

    Returns:
        [pp_size] the layers of each stage, in order.

    Raises:
        ConfigError: there are fewer layers than stages.
        ValueError: ``pp_size`` is not positive, or a cost is negative or not finite.
    """
    if pp_size < 1:
        raise ValueError(f"pp_size={pp_size}: a pipeline has at least one stage")
    if num_layers < pp_size:
        raise ConfigError(
            f"pp_size={pp_size}: the model has {num_layers} layers, and each stage needs one;"
            f" pass pp_size={max(1, num_layers)} or less"
        )
    costs = (layer_cost, first_cost, last_cost)
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs) or layer_cost == 0:
        raise ValueError(f"costs must be finite, and that of a layer more than 0: {costs}")
    counts = [1] * pp_size
    extra = [0.0] * pp_size
    extra[0] += first_cost
    extra[-1] += last_cost

    def cost_with_another(stage: int) -> tuple[float, bool, int]:
        is_end = stage in (0, pp_size - 1)
        return extra[stage] + (counts[stage] + 1) * layer_cost, is_end, stage

    for _ in range(num_layers - pp_size):
        counts[min(range(pp_size), key=cost_with_another)] += 1
    ends = [sum(counts[: stage + 1]) for stage in range(pp_size)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def stage_costs(
    stages: list[range],
    layer_cost: float = 1.0,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
) -> list[float]:
    """What each stage costs, on the scale of the arguments: those of :func:`divide_layers`."""
    costs = [len(stage) * layer_cost for stage in stages]
    costs[0] += first_cost
    costs[-1] += last_cost
    return costs
