"""Which batches run as CUDA graphs."""

from __future__ import annotations

from tokasaurus.config.engine import EngineConfig
from tokasaurus.rounding import round_up

__all__ = ["check_graphs", "graph_sizes"]

# Modes of torch.compile that make CUDA graphs of their own.
_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


def check_graphs(config: EngineConfig, device: str, problems: list[str]) -> None:
    """Adds a line for every conflict."""
    if config.use_cudagraphs is False:
        return
    largest, step = config.cudagraph_max_size, config.cudagraph_step
    if largest % step:
        remedy = f"set it to {round_up(largest, step)}"
        if largest < step:
            remedy += f", or cudagraph_step to {largest}"
        problems.append(
            f"cudagraph_max_size={largest} is not a multiple of cudagraph_step={step}; {remedy}"
        )
    mode = (config.torch_compile_config or {}).get("mode")
    if device == "cuda" and config.torch_compile and mode in _MODES_WITH_GRAPHS:
        problems.append(
            f"torch_compile_config.mode={mode} makes CUDA graphs of its own; set"
            " use_cudagraphs=F, or another mode"
        )


def graph_sizes(config: EngineConfig, device: str, max_seqs: int) -> tuple[int, ...]:
    """Rows of each graph, ascending; () if there are none.

    Args:
        config: without conflicts.
        device: "cpu" or "cuda".
        max_seqs: of a batch. No graph is larger than the one that has room for all of these.
    """
    if device != "cuda" or config.use_cudagraphs is False:
        return ()
    step = config.cudagraph_step
    largest = min(config.cudagraph_max_size, round_up(max_seqs, step))
    return tuple(range(step, largest + 1, step))
