"""What devices can do: a table in ``devices.yaml``, and files of users in the same form.

A number knows where it comes from. One that was measured counts in full. Of one that a maker
promises, a plan takes the part that real programs get.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from tokasaurus.config.suggestions import nearest
from tokasaurus.errors import ConfigError

__all__ = ["Device", "Figure", "device_names", "find_device"]

_TABLE = Path(__file__).with_name("devices.yaml")

# Shares that an H200 was seen to sustain: 4.3 of 4.8 TB/s, and 790 of 989 TFLOP/s.
_MEMORY_SHARE = 0.9
_PRODUCTS_SHARE = 0.8
# Of large square products, the products of a model: an estimate.
_SHAPES_SHARE = 0.75


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number, and where it comes from: one of the three texts is set."""

    value: float
    measured: str = ""
    data_sheet: str = ""
    estimate: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.value < float("inf"):
            raise ValueError(f"must be above 0, not {self.value:g}")
        if [self.measured, self.data_sheet, self.estimate].count("") != 2:
            raise ValueError("needs one source: measured, data_sheet or estimate")

    @property
    def source(self) -> str:
        """Where the number comes from, in words."""
        if self.measured:
            return f"measured: {self.measured}"
        return f"data sheet: {self.data_sheet}" if self.data_sheet else f"estimate: {self.estimate}"

    def sustained(self, share: float) -> float:
        """What programs get of it: all if it was measured, otherwise this share."""
        return self.value if self.measured else share * self.value


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device in a file."""

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    memory_gb: Figure | float
    read_gb_per_s: Figure | float
    tflop_per_s: dict[str, Figure | float]
    link_gb_per_s: Figure | float | None = None
    link_us: Figure | float | None = None


@dataclass(frozen=True)
class Device:
    """One device of a machine.

    Attributes:
        key: what ``device=`` calls it.
        name: what people call it.
        kind: the engine's flag ``device`` for it: "cuda" or "cpu". One of "cpu" is a whole machine.
        figures: its numbers with their sources, by the names of ``devices.yaml``; products are
            ``tflop_per_s.bfloat16`` and so on.
    """

    key: str
    name: str
    kind: Literal["cuda", "cpu"]
    figures: Mapping[str, Figure]

    @property
    def memory_bytes(self) -> int:
        """Bytes of its memory."""
        return int(self.figures["memory_gb"].value * 1e9)

    @property
    def bytes_per_s(self) -> float:
        """The bytes of its memory that programs read in a second."""
        return self.figures["read_gb_per_s"].sustained(_MEMORY_SHARE) * 1e9

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes whose products it has numbers for."""
        names = (name.partition(".") for name in self.figures)
        return tuple(dtype for name, _, dtype in names if name == "tflop_per_s")

    def flops_per_s(self, dtype: str) -> float:
        """The operations of a model's products in a second.

        Raises:
            ConfigError: the table has no number for this dtype.
        """
        figure = self.figures.get(f"tflop_per_s.{dtype}")
        if figure is None:
            known = ", ".join(self.dtypes)
            raise ConfigError(
                f"device={self.key} has no rate of products in {dtype}; set dtype to one of {known}"
            )
        return figure.sustained(_PRODUCTS_SHARE) * _SHAPES_SHARE * 1e12

    @property
    def can_be_joined(self) -> bool:
        """Whether it is known how fast several of them exchange what they share."""
        return {"link_gb_per_s", "link_us"} <= set(self.figures)

    @property
    def link_bytes_per_s(self) -> float:
        """Bytes that it sends to the others of its machine in a second."""
        return self.figures["link_gb_per_s"].sustained(_PRODUCTS_SHARE) * 1e9

    @property
    def link_s(self) -> float:
        """The least seconds in which the devices of a machine add up a tensor."""
        return self.figures["link_us"].value * 1e-6


def device_names() -> tuple[str, ...]:
    """The names that ``device=`` knows."""
    return tuple(_table())


def find_device(name: str) -> Device:
    """The device of this name, or of a file ``NAME.yaml``.

    Raises:
        ConfigError: there is no such device or file, or the file is not a device.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return _device(name, _read(Path(name), f"device={name}"), f"device={name}")
    key = name.lower()
    if key not in _table():
        raise ConfigError(_unknown(name))
    return _device(key, _table()[key], f"{_TABLE.name}: {key}")


@functools.cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = _read(_TABLE, _TABLE.name)
    return table


def _read(path: Path, where: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None


def _unknown(name: str) -> str:
    known = ", ".join(device_names())
    # Names that begin in the same way come first: a100 is a100-80gb or a100-40gb.
    near = [each for each in device_names() if each.startswith(name.lower())]
    guess = " or ".join(near) or nearest(name.lower(), device_names())
    hint = f"; the nearest is {guess}" if guess else ""
    return (
        f"device={name} is not known{hint}. Known are {known}; describe another"
        " in a file, and name it with device=FILE.yaml"
    )


def _device(key: str, entry: Any, where: str) -> Device:
    try:
        read = msgspec.convert(entry, _Entry)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    figures: dict[str, Figure] = {}
    for name in ("memory_gb", "read_gb_per_s", "link_gb_per_s", "link_us"):
        value = getattr(read, name)
        if value is not None:
            figures[name] = _figure(value, where, name)
    if not read.tflop_per_s:
        raise ConfigError(f"{where}: tflop_per_s needs a rate for one dtype at least")
    for dtype, value in read.tflop_per_s.items():
        figures[f"tflop_per_s.{dtype}"] = _figure(value, where, f"tflop_per_s.{dtype}")
    return Device(key, read.name, read.kind, figures)


def _figure(value: Figure | float, where: str, name: str) -> Figure:
    if isinstance(value, Figure):
        return value
    try:
        return Figure(value=value, measured=f"by {where}")
    except ValueError as error:
        raise ConfigError(f"{where}: {name} {error}") from None
