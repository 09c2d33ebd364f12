"""``toka-cartridge verify``: checks a file whole, and whether it fits a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokasaurus.cartridges.differences import differences
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError, RequestError
from tokasaurus.launch.cartridges.files import FileConfig, inspected, refused, sizes
from tokasaurus.launch.model_files import find_model_here
from tokasaurus.model.facts import model_shape

__all__ = ["SCHEMA", "VerifyConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(FileConfig):
    """What to check."""

    model: str | None = flag(
        None,
        help="A model's directory, or the id of a repository that was downloaded: the cartridge "
        "must fit it.",
        usually="any model",
    )
    rope_scaling: Mapping[str, Any] | None = flag(
        None, help="The model's RoPE scaling, as the engine gets it.", usually="the model's own"
    )

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=VerifyConfig,
    program="toka-cartridge verify",
    summary="Check a cartridge's file whole: layout, sizes, numbers, its digest if it says one, "
    "and whether it fits a model.\n\n"
    "The exit status is 0 if all is well, and 1 if anything is wrong with the file.",
    examples=(
        "toka-cartridge verify cartridge.pt",
        "toka-cartridge verify cartridge.safetensors model=Qwen/Qwen3-4B",
    ),
)


def run(config: VerifyConfig) -> None:
    """Prints one line if all is well.

    Raises:
        RequestError: something is wrong; says what.
        ConfigError: there is no such file or model.
        ModelError: the model's config.json cannot be read.
    """
    metadata = inspected(config).metadata
    if config.model is not None:
        directory = find_model_here(config.model)
        if directory is None:
            raise ConfigError(
                f"model={config.model}: no such directory, and not in the cache; "
                f"toka-download model={config.model} fetches it"
            )
        scaling = None if config.rope_scaling is None else json.dumps(dict(config.rope_scaling))
        model = model_shape(directory, config.model, scaling)
        if found := differences(metadata.shape, model):
            raise refused(Path(config.file), RequestError("; ".join(found), "cartridges"))
    print(f"{config.file} is a cartridge of {sizes(metadata)}; digest {metadata.digest}")
