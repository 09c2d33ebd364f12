"""Attention backends, and the choice between them.

Each kind of device may have kernels of its own; ``reference`` runs on all of them.
"""

from __future__ import annotations

import logging

import torch

from tokasaurus.errors import ConfigError
from tokasaurus.model.backend.base import Backend
from tokasaurus.model.backend.cpu.build import BuildError
from tokasaurus.model.backend.cpu.compiled import CompiledBackend
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.kv_cache import KVCache

__all__ = ["make_backend"]

log = logging.getLogger(__name__)


def make_backend(attention: str, cache: KVCache, num_heads: int, device: torch.device) -> Backend:
    """Chooses the backend.

    Args:
        attention: "compiled" is the CPU's kernel, "reference" is plain torch on any device, "auto"
            is the former where it can be built, else the latter.
        cache: the pages to attend over.
        num_heads: query heads.
        device: of the cache.

    Raises:
        ConfigError: the compiled kernel was asked for and cannot be built.
    """
    if attention != "reference":
        try:
            if device.type != "cpu":
                raise BuildError(f"there is none for {device.type}")
            return CompiledBackend(cache, num_heads)
        except BuildError as error:
            if attention == "compiled":
                raise ConfigError(
                    f"attention=compiled: no kernel can be built: {error}; "
                    "install g++ or set attention=auto"
                ) from error
            log.warning("attention runs in plain torch, slowly; no kernel can be built: %s", error)
    return ReferenceBackend(cache)
