"""``toka-cartridge convert``: writes a cartridge in the other format."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.launch.cartridges.files import FileConfig, read, sizes

__all__ = ["SCHEMA", "ConvertConfig", "run"]

_SUFFIXES = (".safetensors", ".pt")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(FileConfig):
    """What to convert, and where to."""

    out: str = flag(
        help="The file to write; one that is there is replaced. A name that ends in .pt gets the "
        "layout of trainers, any other a safetensors file."
    )

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=ConvertConfig,
    program="toka-cartridge convert",
    summary="Write a cartridge in the other format. The digest, which says what the cartridge is, "
    "stays the same.",
    examples=(
        "toka-cartridge convert cartridge.pt cartridge.safetensors",
        "toka-cartridge convert file=cartridge.safetensors out=cartridge.pt",
    ),
)


def run(config: ConvertConfig) -> None:
    """Writes the file, and prints what it is.

    Raises:
        RequestError, ConfigError: as ``read``.
        EngineError: the target cannot be written.
    """
    out = Path(config.out).expanduser()
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"out={config.out}: the name must end in {' or '.join(_SUFFIXES)}")
    if not out.parent.is_dir():
        raise ConfigError(f"out={config.out}: there is no directory {out.parent}")
    metadata = read(config, out) if out.suffix != ".pt" else _write_torch_file(config, out)
    print(f"{config.out} is a cartridge of {sizes(metadata)}; digest {metadata.digest}")


def _write_torch_file(config: ConvertConfig, out: Path) -> CartridgeMetadata:
    # To import torch takes seconds, and the process that reads files does it only if it has to.
    from tokasaurus.launch.cartridges.tensors import save_torch_file

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:64]}.") as directory:
        checked = Path(directory) / "checked.safetensors"
        metadata = read(config, checked)
        save_torch_file(checked, out, metadata.num_frozen)
    return metadata
