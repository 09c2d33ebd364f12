"""Writes dashboard.json, the dashboard for Grafana. A test compares the two.

    python deploy/monitoring/make_dashboard.py > deploy/monitoring/dashboard.json

Only the standard library is needed. ``make test-monitoring`` runs every query of the file on a
Prometheus that has scraped an engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_ENGINE = '{instance=~"$instance"}'
_WIDTH = 24  # of Grafana's grid
_HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """A panel: what it shows, and its queries by their legends."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None


@dataclass
class Row:
    """Panels below one heading."""

    title: str
    panels: list[Panel] = field(default_factory=list)


def rate(metric: str, labels: str = _ENGINE) -> str:
    """A counter's increase a second."""
    return f"rate(tokasaurus_{metric}_total{labels}[$__rate_interval])"


def ratio(part: str, whole: str) -> str:
    """One counter's increase divided by another's, of all engines that are shown."""
    return f"sum({rate(part)}) / sum({rate(whole)})"


def gauge(metric: str) -> str:
    return f"tokasaurus_{metric}{_ENGINE}"


def quantiles(metric: str) -> dict[str, str]:
    """Of a histogram, over all engines that are shown."""
    buckets = f"sum by (le) (rate(tokasaurus_{metric}_bucket{_ENGINE}[$__rate_interval]))"
    return {
        "half of them": f"histogram_quantile(0.5, {buckets})",
        "95%": f"histogram_quantile(0.95, {buckets})",
        "99%": f"histogram_quantile(0.99, {buckets})",
    }


ROWS = [
    Row(
        "Now",
        [
            Panel(
                "Engines up",
                "Engines that Prometheus can scrape.",
                "short",
                {"": f'sum(up{{job="tokasaurus", {_ENGINE[1:]})'},
                kind="stat",
                width=4,
            ),
            Panel(
                "Processes that hang",
                "Managers and workers that have work and make no progress.",
                "short",
                {"": f"sum({gauge('stalled_processes')})"},
                kind="stat",
                width=4,
            ),
            Panel(
                "Done in",
                "Predicted time until everything in flight has ended; of the slowest engine.",
                "s",
                {"": f"max({gauge('backlog_seconds')})"},
                kind="stat",
                width=4,
            ),
            Panel(
                "What limits throughput",
                "1 for what keeps throughput from being higher. The engine's log has the remedy.",
                "short",
                {"{{instance}} {{kind}}": f"{gauge('limit')} == 1"},
                width=12,
            ),
        ],
    ),
    Row(
        "Throughput",
        [
            Panel(
                "Tokens",
                "A second: generated, and of prompts computed and found in the prefix cache.",
                "short",
                {
                    "generated": f"sum({rate('generated_tokens')})",
                    "of prompts, computed": f"sum({rate('computed_prompt_tokens')})",
                    "of prompts, cached": f"sum({rate('cached_prompt_tokens')})",
                },
            ),
            Panel(
                "Requests by status",
                "A second. 429: the queue is full. 503: the engine does not serve.",
                "reqps",
                {"{{status}}": f"sum by (status) ({rate('http_requests')})"},
                stacked=True,
            ),
            Panel(
                "Prompts by outcome",
                "A second. Aborted: the client went away, or its time was up.",
                "short",
                {"{{outcome}}": f"sum by (outcome) ({rate('prompts')})"},
                stacked=True,
            ),
        ],
    ),
    Row(
        "Latency",
        [
            Panel(
                "Time to the first token",
                "Of streams, and of requests with stop strings.",
                "s",
                quantiles("time_to_first_token_seconds"),
            ),
            Panel(
                "Time for each further token",
                "Of the same requests.",
                "s",
                quantiles("time_per_output_token_seconds"),
            ),
            Panel(
                "Time of a prompt",
                "From its arrival to the end of its last sample.",
                "s",
                quantiles("prompt_seconds"),
            ),
        ],
    ),
    Row(
        "Queue and KV cache",
        [
            Panel(
                "Sequences",
                "Running; waiting in the manager; held back by the server; and those that may run.",
                "short",
                {
                    "running": f"sum({gauge('running_sequences')})",
                    "waiting": f"sum({gauge('waiting_sequences')})",
                    "held": f"sum({gauge('held_sequences')})",
                    "seats": f"sum({gauge('seats')})",
                },
            ),
            Panel(
                "KV cache in use",
                "The share of pages that sequences hold. The rest is free, or holds the prefix "
                "cache, which gives way.",
                "percentunit",
                {"{{instance}}": gauge("kv_use")},
                most=1.0,
            ),
            Panel(
                "Prefix hits",
                "The share of prompt tokens found in the prefix cache.",
                "percentunit",
                {
                    "hits": f"sum({rate('cached_prompt_tokens')}) / (sum("
                    f"{rate('cached_prompt_tokens')}) + sum({rate('computed_prompt_tokens')}))"
                },
                most=1.0,
            ),
            Panel(
                "Preemptions and evictions",
                "A second: running sequences that gave their pages back, and pages that the prefix "
                "cache gave up.",
                "short",
                {
                    "preemptions": f"sum({rate('preemptions')})",
                    "evicted pages": f"sum({rate('evicted_pages')})",
                },
            ),
            Panel(
                "Waiting before the first run",
                "Seconds a sequence, on average.",
                "s",
                {"waiting": ratio("queue_seconds", "finished_sequences")},
            ),
            Panel(
                "Error of the forecast",
                "Pages by which the use of the KV cache differed from its forecast, on average.",
                "short",
                {"pages": ratio("forecast_pages_off", "forecasts")},
            ),
        ],
    ),
    Row(
        "Device",
        [
            Panel(
                "Time of a forward pass",
                "A moving average.",
                "s",
                {"{{instance}}": gauge("step_seconds")},
            ),
            Panel(
                "Device busy",
                "The share of the time with work in which the device computes; otherwise it waits "
                "for the host.",
                "percentunit",
                {"busy": ratio("device_seconds", "active_seconds")},
                most=1.0,
            ),
            Panel(
                "Rows that share a prefix",
                "The share of decode rows whose attention read a prefix once for a group.",
                "percentunit",
                {"grouped": ratio("grouped_decode_tokens", "decode_tokens")},
                most=1.0,
            ),
            Panel(
                "Bubble",
                "The share of the device's time in which the last stage of a pipeline waited.",
                "percentunit",
                {"waiting": ratio("worker_wait_seconds", "device_seconds")},
                most=1.0,
            ),
            Panel(
                "Tokens beyond the end",
                "The share of generated tokens that came after their sequence had ended.",
                "percentunit",
                {"wasted": ratio("wasted_tokens", "decode_tokens")},
                most=1.0,
            ),
            Panel(
                "Version of the weights",
                "One more after each update.",
                "short",
                {"{{instance}}": gauge("weights_version")},
            ),
        ],
    ),
    Row(
        "Replicas (dp_size over 1)",
        [
            Panel(
                "Replicas up",
                "1 if the replica takes requests.",
                "short",
                {"{{instance}} {{replica}}": gauge("replica_up")},
                most=1.0,
            ),
            Panel(
                "Sequences of each replica",
                "That run.",
                "short",
                {"{{instance}} {{replica}}": gauge("replica_running_sequences")},
            ),
            Panel(
                "Lost replicas",
                "Since the engine started, and samples of theirs that went on elsewhere.",
                "short",
                {
                    "lost": f"sum(tokasaurus_lost_replicas_total{_ENGINE})",
                    "moved samples": f"sum(tokasaurus_moved_samples_total{_ENGINE})",
                },
            ),
        ],
    ),
    Row(
        "Cartridges",
        [
            Panel(
                "Prompts behind cartridges",
                "A second: all, and those whose cartridges were in the KV cache.",
                "short",
                {
                    "prompts": f"sum({rate('cartridge_requests')})",
                    "hits": f"sum({rate('cartridge_hits')})",
                },
            ),
            Panel(
                "Pages of cartridges",
                "Pages of the KV cache that hold cartridges.",
                "short",
                {"{{instance}}": gauge("cartridge_pages")},
            ),
            Panel(
                "Cartridges on the host",
                "Bytes in memory, and on the disk of the store.",
                "bytes",
                {
                    "memory": f"sum({gauge('cartridge_host_bytes')})",
                    "disk": f"sum({gauge('cartridge_disk_bytes')})",
                },
            ),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    """The dashboard, in Grafana's form."""
    return {
        "title": "Tokasaurus",
        "uid": "tokasaurus",
        "description": "docs/operations.md says what each metric means.",
        "tags": ["tokasaurus"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_data_source(), _instances()]},
        "panels": _panels(),
    }


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": _WIDTH, "x": 0, "y": top},
                "panels": [],
            }
        )
        left, top = 0, top + 1
        for panel in row.panels:
            if left + panel.width > _WIDTH:
                left, top = 0, top + _HEIGHT
            place = {"h": _HEIGHT, "w": panel.width, "x": left, "y": top}
            panels.append(_panel(panel, len(panels) + 1, place))
            left += panel.width
        top += _HEIGHT
    return panels


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"fillOpacity": 20 if panel.stacked else 5, "stacking": stacking}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
            }
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _data_source() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
    }


def _instances() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Engine",
        "type": "query",
        "datasource": _SOURCE,
        "query": "label_values(tokasaurus_stalled_processes, instance)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "hide": 0,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
