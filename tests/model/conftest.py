"""Checkpoints that the model room's tests share. Each is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the directory of ``make_checkpoint(architecture, **options)``. Do not write to it."""
    made: dict[str, Path] = {}

    def get(architecture: str = "llama", **options: Any) -> Path:
        name = f"{architecture} {sorted(options.items(), key=str)}"
        if name not in made:
            made[name] = make_checkpoint(
                tmp_path_factory.mktemp(architecture), architecture, **options
            )
        return made[name]

    return get
