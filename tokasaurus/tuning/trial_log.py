"""What trials have found, in a file: an interrupted search goes on where it was.

The first line holds the premises. Measurements under other premises do not count, and are replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokasaurus.errors import ConfigError
from tokasaurus.tuning.trial_process import Measured

__all__ = ["TrialLog"]


class TrialLog:
    """The file of one search.

    Args:
        path: of the file, which is created if it is not there, or holds other premises.
        premises: what measurements depend on besides the flags of a trial.
        fresh: forget what is there.

    Attributes:
        num_found: measurements that were there already.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, premises: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._path = path
        self._measured: dict[str, Measured] = {}
        lines = [] if fresh else _lines(path)
        if lines and lines[0] == {"premises": json.loads(json.dumps(premises))}:
            for line in lines[1:]:
                self._measured[line["trial"]] = _measured(line["measured"])
        # Written anew in any case: the last line may have been cut off.
        self._write({"premises": premises}, "w")
        for name, measured in self._measured.items():
            self._write({"trial": name, "measured": asdict(measured)}, "a")
        self.num_found = len(self._measured)

    @staticmethod
    def premises_of(path: Path) -> Mapping[str, Any]:
        """The premises of a file; none if it is not there, or is no log."""
        lines = _lines(path)
        return lines[0].get("premises", {}) if lines else {}

    def get(self, name: str) -> Measured | None:
        """What a trial has found; None if it has not run."""
        return self._measured.get(name)

    def add(self, name: str, measured: Measured) -> None:
        """Keeps what a trial has found."""
        self._measured[name] = measured
        self._write({"trial": name, "measured": asdict(measured)}, "a")

    def _write(self, line: Mapping[str, Any], mode: str) -> None:
        try:
            with self._path.open(mode) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{self._path}: {error.strerror}; set another file with out="
            ) from None


def _measured(fields: Mapping[str, Any]) -> Measured:
    return Measured(**{**fields, "seconds": tuple(fields["seconds"])})


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; none if it is not there, or is no log."""
    try:
        whole, _, _ = path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]
    except (OSError, ValueError):
        return []
