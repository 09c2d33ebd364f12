"""What checkpoint engines of veRL take for a replica's worker. It imports no veRL, to be quick."""

from __future__ import annotations

from typing import Any

__all__ = ["IdleWorker"]


class IdleWorker:
    """A worker of the rollout to which a trainer sends nothing, since engines get the weights."""

    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Takes part in what checkpoint engines do before and after they send."""
        return {}

    def update_weights(self, global_steps: int | None = None) -> None:
        """Receives nothing."""
