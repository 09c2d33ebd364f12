"""Attention backends, and the choice between them."""

from __future__ import annotations

import logging

import torch

from tokasaurus.model.backend.base import Attention, Backend, SequenceRows
from tokasaurus.model.backend.cpu.reference import ReferenceBackend
from tokasaurus.model.kv_cache import KVCache

__all__ = ["Attention", "Backend", "SequenceRows", "make_backend"]

log = logging.getLogger(__name__)


def make_backend(attention: str, cache: KVCache, device: torch.device) -> Backend:
    """Chooses the kernels."""
    return ReferenceBackend(cache)
