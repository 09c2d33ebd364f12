"""Names the row of a table, or the seed, of a check that fails inside a loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def named(row: Any) -> Iterator[None]:
    try:
        yield
    except (AssertionError, pytest.fail.Exception) as error:
        raise AssertionError(f"{row}: {error}") from error
