"""``toka-cartridge list``: says which cartridges a running engine has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.launch.cartridges.engine import asked
from tokasaurus.scripts.connection import Connection

__all__ = ["SCHEMA", "ListConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class ListConfig(Connection):
    """Where the engine is, and what to print."""

    as_json: bool = flag(False, help="Print the engine's answer, in JSON.", aliases=("json",))

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=ListConfig,
    program="toka-cartridge list",
    summary="List the cartridges of a running engine: sizes, versions, how many requests use "
    "them, and where they are.",
    examples=("toka-cartridge list", "toka-cartridge list port=8080 json=T"),
)
_COLUMNS = ("id", "source", "version", "tokens", "MB", "users", "where")


def run(config: ListConfig) -> None:
    """Prints a line for each version.

    Raises:
        EngineError: the engine is not there, or refuses.
    """
    answer = asked(config, lambda client: client.get("/cartridges", cast_to=object))
    if config.as_json:
        print(json.dumps(answer, indent=2))
        return
    rows = [_row(each, version) for each in answer["data"] for version in each["versions"]]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for row in (_COLUMNS, *rows):
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _row(cartridge: Mapping[str, Any], version: Mapping[str, Any]) -> tuple[str, ...]:
    residence, num_bytes = version["residence"], version["bytes"]
    places = {
        f"device ({residence['device_pages']} pages)": residence["device"],
        "host": residence["host"],
        "disk": residence["disk"],
    }
    return (
        cartridge["id"] if version["current"] else f"{cartridge['id']} (before)",
        cartridge["source"],
        version["digest"][:12],
        str(version["tokens"]),
        f"{num_bytes / 1e6:.1f}",
        str(version["users"]),
        ", ".join(place for place, is_there in places.items() if is_there),
    )
