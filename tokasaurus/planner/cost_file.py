"""Cost models in files of YAML, beside what they were measured on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tokasaurus.errors import ConfigError
from tokasaurus.planner.cost_model import CostModel

__all__ = ["CostFile", "check_cost_file", "read_cost", "write_cost"]


class CostFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file holds.

    Attributes:
        about: what was measured, where and when; for people.
        cost: the constants.
    """

    about: dict[str, str | int | float]
    cost: CostModel


def check_cost_file(path: str) -> None:
    """Raises ConfigError if the file cannot be written, before a calibration takes its time."""
    try:
        Path(path).open("ab").close()
    except OSError as error:
        raise _unwritable(path, error) from None


def write_cost(path: str, file: CostFile) -> None:
    """Writes the file. Raises ConfigError if it cannot."""
    try:
        Path(path).write_bytes(msgspec.yaml.encode(file))
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"out={path}: {error.strerror}; set another file with out=")


def read_cost(path: str) -> CostModel:
    """The cost model of a file.

    Raises:
        ConfigError: the file cannot be read, or is not a cost model; names the field.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cost={path}: {error.strerror}") from None
    try:
        return msgspec.yaml.decode(content, type=CostFile).cost
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"cost={path}: {error}; write it anew with toka-bench calibrate"
        ) from None
