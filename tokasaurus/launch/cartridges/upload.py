"""``toka-cartridge upload``: gives a running engine a cartridge."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tokasaurus.config.memory import amount
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.launch.cartridges.engine import asked
from tokasaurus.scripts.connection import Connection

__all__ = ["SCHEMA", "UploadConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class UploadConfig(Connection):
    """What to upload, and where to."""

    file: str = flag(help="The file: .pt or safetensors.")
    name: str | None = flag(
        None,
        help="What requests call it, with source local.",
        usually="the name of the file without its ending",
    )

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=UploadConfig,
    program="toka-cartridge upload",
    summary="Give a running engine a cartridge. The engine checks it, and keeps it under a name.",
    examples=(
        "toka-cartridge upload cartridge.pt name=notes",
        "toka-cartridge upload notes.safetensors host=10.0.0.7 port=8080",
    ),
)


def run(config: UploadConfig) -> None:
    """Uploads the file, and prints what it is.

    Raises:
        ConfigError: there is no such file.
        EngineError: the engine is not there, or refuses the file.
    """
    path = Path(config.file).expanduser()
    name = config.name or path.stem
    try:
        file, size = path.open("rb"), path.stat().st_size
    except OSError as error:
        raise ConfigError(f"file={config.file}: {error.strerror}") from None
    is_quiet = not sys.stderr.isatty()
    with file, tqdm.wrapattr(file, "read", total=size, desc=path.name, disable=is_quiet) as read:
        content: Any = read  # a file to read from
        stored = asked(
            config,
            lambda client: client.post(
                "/cartridges",
                cast_to=object,
                body={"name": name},
                files={"file": (path.name, content)},
                options={"headers": {"Content-Type": "multipart/form-data"}},
            ),
        )
    print(
        f"the engine has {stored['id']}: {stored['tokens']} tokens,"
        f" {amount(stored['versions'][0]['bytes'])}, digest {stored['digest']}"
    )
