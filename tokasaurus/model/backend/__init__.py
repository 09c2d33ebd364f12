"""Backends, and the choice between them.

Each kind of device may have kernels of its own; ``reference`` runs on all of them.
"""

from __future__ import annotations

import logging

import torch

from tokasaurus.errors import ConfigError
from tokasaurus.model.backend.base import DEFAULT_OPTIONS, Backend, BackendOptions, ModelHeads
from tokasaurus.model.backend.cpu.compiled import CompiledBackend
from tokasaurus.model.backend.flashinfer.backend import FlashInferBackend
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.backend.triton.backend import TritonBackend, is_interpreted

__all__ = ["backend_named", "choose_backend", "usable_backends"]

log = logging.getLogger(__name__)

# By kind of device, the best first. The last runs everywhere. The order of those for "cuda" is what
# others have measured of such kernels. Ours have not been measured on a device yet.
_BACKENDS: dict[str, tuple[type[Backend], ...]] = {
    "cpu": (CompiledBackend, ReferenceBackend),
    "cuda": (FlashInferBackend, TritonBackend, ReferenceBackend),
}


def choose_backend(
    attention: str,
    device: torch.device,
    options: BackendOptions = DEFAULT_OPTIONS,
    heads: ModelHeads | None = None,
) -> type[Backend]:
    """Chooses the backend.

    Args:
        attention: the name of a backend, or "auto" for the best one that runs on this machine.
        device: of the model.
        options: that the backend will get.
        heads: of the model; None for one that every backend can run.

    Raises:
        ConfigError: the backend or the options cannot run on this device or machine, or the backend
            cannot run the model.
    """
    if attention == "auto":
        return _best(_BACKENDS[device.type], options, heads)
    backend = backend_named(attention, device)
    if reason := _why_not(backend, options, heads):
        raise ConfigError(f"attention={attention}: {reason}, or set attention=auto")
    return backend


def backend_named(attention: str, device: torch.device) -> type[Backend]:
    """The backend of this name, whether it runs on this machine or not.

    Args:
        attention: the name of a backend.
        device: of the model.

    Raises:
        ConfigError: the backend does not run on this kind of device.
    """
    backends = _BACKENDS[device.type]
    if is_interpreted():
        # For tests: auto does not take it.
        backends = (*backends, TritonBackend)
    for backend in backends:
        if backend.name == attention:
            return backend
    names = " or ".join(backend.name for backend in backends)
    raise ConfigError(f"attention={attention} does not run on device={device.type}: set {names}")


def usable_backends(
    device: torch.device,
    options: BackendOptions = DEFAULT_OPTIONS,
    heads: ModelHeads | None = None,
) -> tuple[type[Backend], ...]:
    """The backends of a kind of device that run on this machine, the best first.

    Args:
        device: of the model.
        options: as for ``choose_backend``.
        heads: as for ``choose_backend``.

    Raises:
        ConfigError: the options cannot run on this machine.
    """
    return tuple(
        backend for backend in _BACKENDS[device.type] if _why_not(backend, options, heads) is None
    )


def _best(
    backends: tuple[type[Backend], ...], options: BackendOptions, heads: ModelHeads | None
) -> type[Backend]:
    for backend in backends[:-1]:
        reason = _why_not(backend, options, heads)
        if reason is None:
            log.info("attention=%s", backend.name)
            return backend
        log.warning("attention=%s cannot run, and others are slower: %s", backend.name, reason)
    return backends[-1]


def _why_not(
    backend: type[Backend], options: BackendOptions, heads: ModelHeads | None
) -> str | None:
    reason = backend.why_not(options)
    if reason is None and heads is not None:
        reason = backend.why_not_model(heads)
    return reason
