"""What a CUDA device is too old for."""

from __future__ import annotations

import torch

__all__ = ["why_too_old"]


def why_too_old(
    oldest: tuple[int, int], need: str, device: torch.device | None = None
) -> str | None:
    """Why a device is too old, without the remedy; None if it is not.

    Args:
        oldest: the compute capability of the first devices that will do.
        need: what needs it, and the verb, such as "the kernels need".
        device: None for the current one.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability >= oldest:
        return None
    found, least = (".".join(map(str, each)) for each in (capability, oldest))
    return f"this device has compute capability {found}, and {need} {least}"
