"""The manager's simulation serves here too: it makes batches of every kind."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "manager"))
