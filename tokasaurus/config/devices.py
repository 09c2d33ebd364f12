"""Which device each worker computes on."""

from __future__ import annotations

from math import prod

from tokasaurus.config.engine import EngineConfig

__all__ = ["choose_device", "device_index"]

_SIZES = ("dp_size", "pp_size", "tp_size")


def choose_device(config: EngineConfig, num_cuda_devices: int, problems: list[str]) -> str:
    """The kind of device, "cpu" or "cuda"; adds to the problems if there are too few devices.

    Args:
        config: the user's choices.
        num_cuda_devices: the CUDA devices that work and are visible.
        problems: one line for every conflict.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if num_cuda_devices else "cpu"
    if device == "cpu":
        return device
    sizes = {name: getattr(config, name) for name in _SIZES}
    num_needed = prod(sizes.values())
    if not num_cuda_devices:
        problems.append(
            "device=cuda: PyTorch finds no CUDA device here; leave device out, or set cpu"
            " (CUDA_VISIBLE_DEVICES may hide devices)"
        )
    elif num_needed > num_cuda_devices:
        flags = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        visible = "1 is" if num_cuda_devices == 1 else f"{num_cuda_devices} are"
        problems.append(
            f"{flags} needs {num_needed} CUDA devices, and {visible} visible; lower a size, or"
            " make more devices visible (CUDA_VISIBLE_DEVICES may hide some)"
        )
    return device


def device_index(config: EngineConfig, device: str, replica: int, rank: int) -> int | None:
    """The device of a worker among the visible ones; None on the CPU.

    Rank r of replica d takes the device d * pp_size * tp_size + r, so the workers of a replica are
    neighbours.
    """
    if device == "cpu":
        return None
    return replica * config.pp_size * config.tp_size + rank
