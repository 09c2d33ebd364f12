"""What the commands about files share: their flags, and how they read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.cartridges.reading import Inspection, ReadLimits, inspect_cartridge, read_cartridge
from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.config.memory import amount
from tokasaurus.config.schema import flag
from tokasaurus.errors import ConfigError, RequestError

__all__ = ["FileConfig", "inspected", "read", "refused", "sizes"]

_COMPANION = "config.yaml"
_LIMITS = "Limits"


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """A cartridge's file, and what reading it may take."""

    file: str = flag(help="The file: .pt or safetensors.", aliases=("source",))
    companion: str | None = flag(
        None,
        help="The YAML file of the training, which names the model.",
        usually="config.yaml beside the file, if it is there",
    )
    max_tokens: int = flag(
        ReadLimits.max_tokens, group=_LIMITS, minimum=1, help="The most positions it may have."
    )
    max_bytes: int = flag(
        ReadLimits.max_bytes, group=_LIMITS, minimum=1, help="The most bytes of tensors."
    )
    timeout_s: float = flag(
        ReadLimits.timeout_s, group=_LIMITS, minimum=0.1, help="The most seconds to read it."
    )

    @property
    def limits(self) -> ReadLimits:
        return ReadLimits(self.max_tokens, self.max_bytes, self.timeout_s)


def inspected(config: FileConfig) -> Inspection:
    """Reads and checks the file.

    Raises:
        RequestError: it is no cartridge; names it.
        ConfigError: there is no such file.
    """
    path, companion = _paths(config)
    try:
        return asyncio.run(inspect_cartridge(path, config.limits, companion))
    except RequestError as error:
        raise refused(path, error) from None


def read(config: FileConfig, target: Path) -> CartridgeMetadata:
    """Reads and checks the file, and writes it as safetensors.

    Raises:
        RequestError, ConfigError: as for ``inspected``.
        EngineError: the target cannot be written.
    """
    path, companion = _paths(config)
    try:
        return asyncio.run(read_cartridge(path, target, config.limits, companion))
    except RequestError as error:
        raise refused(path, error) from None


def refused(path: Path, error: RequestError) -> RequestError:
    """The same error, which names the file."""
    return RequestError(f"{path}: {error.message}", error.field)


def sizes(metadata: CartridgeMetadata) -> str:
    """In a few words."""
    return f"{metadata.num_tokens:,} positions, {amount(metadata.num_bytes)} in {metadata.dtype}"


def _paths(config: FileConfig) -> tuple[Path, Path | None]:
    path = Path(config.file).expanduser()
    if not path.is_file():
        raise ConfigError(f"file={config.file}: there is no such file")
    if config.companion is not None:
        companion = Path(config.companion).expanduser()
        if not companion.is_file():
            raise ConfigError(f"companion={config.companion}: there is no such file")
        return path, companion
    beside = path.with_name(_COMPANION)
    return path, beside if beside.is_file() else None
