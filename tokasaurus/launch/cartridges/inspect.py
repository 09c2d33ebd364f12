"""``toka-cartridge inspect``: says what is in a cartridge's file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from tokasaurus.cartridges.reading import Inspection
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.launch.cartridges.files import FileConfig, inspected

__all__ = ["SCHEMA", "InspectConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class InspectConfig(FileConfig):
    """What to print."""

    as_json: bool = flag(False, help="Print a JSON object.", aliases=("json",))

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=InspectConfig,
    program="toka-cartridge inspect",
    summary="Say what is in a cartridge's file. It is read whole, in a process with limits.",
    examples=(
        "toka-cartridge inspect cartridge.pt",
        "toka-cartridge inspect cartridge.safetensors json=T",
    ),
)


def run(config: InspectConfig) -> None:
    """Prints what is there.

    Raises:
        RequestError, ConfigError: as ``inspected``.
    """
    found = inspected(config)
    if config.as_json:
        print(json.dumps({"layout": found.layout, **dataclasses.asdict(found.metadata)}, indent=2))
        return
    rows = [(name, value) for name, value in _rows(found) if value != ""]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _rows(found: Inspection) -> list[tuple[str, Any]]:
    metadata, shape = found.metadata, found.metadata.shape
    return [
        ("layout", found.layout),
        ("positions", metadata.num_tokens),
        ("of which frozen", metadata.num_frozen),
        ("layers", shape.num_layers),
        ("KV heads", shape.num_kv_heads),
        ("numbers per head", shape.head_dim),
        ("dtype", metadata.dtype),
        ("bytes of tensors", metadata.num_bytes),
        ("digest", metadata.digest),
        ("model", shape.name),
        ("rotary embedding", shape.rope),
        ("tokenizer", metadata.tokenizer),
    ]
