"""Registers the rollout with veRL, as a side effect of the import.

veRL loads entry points without calling them, and tells nobody if one fails: the rollout would
merely be unknown. So a failure is logged as an error here, and raised again where somebody asks
veRL for the rollout.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["NAME", "register"]

NAME = "tokasaurus"
"""Of the rollout: ``actor_rollout_ref.rollout.name``."""
_ADAPTER = "tokasaurus.integrations.verl.adapter.ServerAdapter"

log = logging.getLogger(__name__)


def register() -> None:
    """Fills the tables in which veRL looks for rollouts.

    Raises:
        ImportError: this veRL has no such tables, or something that they need is missing.
    """
    try:
        from verl.workers.rollout.base import _ROLLOUT_REGISTRY
        from verl.workers.rollout.replica import RolloutReplicaRegistry
    except ImportError as error:
        raise ImportError(
            f"veRL {_version()} has no tables of rollouts that others can fill, or cannot import"
            f" them ({error}); the rollout {NAME!r} needs veRL 0.7.1 or later, with Ray"
        ) from error
    RolloutReplicaRegistry.register(NAME, _replica_class)
    _ROLLOUT_REGISTRY[NAME, "async"] = _ADAPTER


def _replica_class() -> type[Any]:
    from tokasaurus.integrations.verl.replica import TokasaurusReplica

    return TokasaurusReplica


def _version() -> str:
    try:
        return version("verl")
    except PackageNotFoundError:
        return "(not installed)"


def _tell(error: Exception) -> None:
    """Says where somebody sees it that the rollout cannot be used."""
    log.error("the rollout %r cannot be used: %s", NAME, error)
    try:
        from verl.workers.rollout.replica import RolloutReplicaRegistry
    except Exception:
        return  # nobody can ask for a rollout either

    def refuse() -> type[Any]:
        raise ImportError(f"the rollout {NAME!r} cannot be used: {error}") from error

    RolloutReplicaRegistry.register(NAME, refuse)


try:
    register()
except Exception as error:
    _tell(error)
    raise
