"""``toka-download``: downloads a model into the cache, for later use without a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tokasaurus.config.parser import parse_or_exit
from tokasaurus.config.pipes import ends_with_its_reader
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ModelError

__all__ = ["DownloadConfig", "main"]


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to download."""

    model: str = flag(help="The repository id, such as meta-llama/Llama-3.2-1B-Instruct.")
    allow_patterns: tuple[str, ...] | None = flag(
        None, help="Patterns of the files to download. None: the files that an engine reads."
    )

    def __post_init__(self) -> None:
        check_fields(self)


DOWNLOAD = Schema(
    target=DownloadConfig,
    program="toka-download",
    summary="Download a model from the Hugging Face Hub into the cache.",
    examples=(
        "toka-download model=meta-llama/Llama-3.2-1B-Instruct",
        "toka-download model=Qwen/Qwen3-4B allow_patterns='*.json,*.txt'",
    ),
)


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, which prints the directory of the snapshot.

    Returns:
        The exit status: 0, or 1 if the model is not available.
    """
    config = parse_or_exit(DOWNLOAD, sys.argv[1:] if arguments is None else arguments)
    from tokasaurus.launch.model_files import download, download_model

    patterns = config.allow_patterns
    try:
        path = (
            download_model(config.model) if patterns is None else download(config.model, patterns)
        )
    except ModelError as error:
        print(f"{DOWNLOAD.program}: error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
