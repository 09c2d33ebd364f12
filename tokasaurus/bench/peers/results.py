"""What was measured: its file, its tables, its chart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tokasaurus.bench.machine import machine
from tokasaurus.bench.output import markdown_table
from tokasaurus.bench.peers.chart import Bar, Group, write_chart
from tokasaurus.errors import ConfigError

__all__ = ["Measurement", "Results"]

_OURS = "tokasaurus"
_TITLES = {
    "mixed": "mixed",
    "repeated": "repeated, n=32",
    "separate": "repeated, separate",
    "single": "one request alone",
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One workload in one dtype.

    Attributes:
        tokens: generated in each repetition.
        seconds: of each repetition, by engine.
        products_run_s: seconds of a run of ours.
        products_s: seconds of that run's products alone.
        flags: further flags of ours.
    """

    dtype: str
    workload: str
    size: float
    shape: str
    tokens: int
    seconds: Mapping[str, list[float]]
    products_s: float
    products_run_s: float
    flags: tuple[str, ...]
    date: str

    @property
    def title(self) -> str:
        return _TITLES[self.workload]

    @property
    def products_share(self) -> float:
        """The part of our time that the products alone take."""
        return self.products_s / self.products_run_s

    def rate(self, engine: str) -> float:
        """Tokens/s of an engine, the median of the repetitions."""
        return self.tokens / median(self.seconds[engine])

    def ratio(self, peer: str) -> float:
        """Our speed as a multiple of a peer's, the median of the repetitions."""
        pairs = zip(self.seconds[peer], self.seconds[_OURS], strict=True)
        return median(theirs / ours for theirs, ours in pairs)

    @property
    def peers(self) -> list[str]:
        return [engine for engine in self.seconds if engine != _OURS]


@dataclass
class Results:
    """Measurements, perhaps of several runs of the command.

    Attributes:
        versions: of the engines, by name.
        measurements: by dtype and workload.
    """

    versions: dict[str, str] = field(default_factory=dict)
    measurements: dict[tuple[str, str], Measurement] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Results:
        """The results of a file; none if there is no file or no path.

        Raises:
            ConfigError: the file cannot be read or written.
        """
        if not path:
            return cls()
        try:
            Path(path).open("ab").close()
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"output={path}: {error.strerror}") from None
        results = cls()
        if not text:
            return results
        try:
            values = json.loads(text)
            results.versions.update(values["versions"])
            for each in values["measurements"]:
                results.add(Measurement(**each))
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"output={path}: this is not a file of this command") from None
        return results

    def add(self, measurement: Measurement) -> None:
        """Adds a measurement in place of an earlier one of the same workload and dtype."""
        self.measurements[measurement.dtype, measurement.workload] = measurement

    def write(self, path: str) -> None:
        """Writes the file, if there is a path."""
        if path:
            Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def as_json(self) -> dict[str, Any]:
        measurements = [asdict(each) for each in self.measurements.values()]
        return {"machine": machine(), "versions": self.versions, "measurements": measurements}

    def tables(self) -> str:
        """The results in Markdown."""
        engines = list(self.versions)
        peers = [name for name in engines if name != _OURS]
        heads = (
            "workload",
            *(f"{name} {self.versions[name]}, tokens/s" for name in engines),
            *(f"times {name}" for name in peers),
            "products alone",
        )
        rows = []
        for each in self.measurements.values():
            rates = [f"{each.rate(name):,.0f}" if name in each.seconds else "-" for name in engines]
            ratios = [f"{each.ratio(name):.2f}" if name in each.seconds else "-" for name in peers]
            share = f"{each.products_share:.0%}"
            rows.append((f"{each.title}, {each.dtype}", *rates, *ratios, share))
        return markdown_table(heads, rows)

    def plot(self, path: str) -> None:
        """Draws the chart."""
        panels: dict[str, list[Group]] = {}
        for each in self.measurements.values():
            bars = [Bar(name, each.rate(name)) for name in each.seconds]
            alone = Bar("products alone", each.rate(_OURS) / each.products_share)
            panels.setdefault(each.dtype, []).append(Group(each.title, [*bars, alone]))
        write_chart(path, panels)
