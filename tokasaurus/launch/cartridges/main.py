"""``toka-cartridge``: runs the command that its first word names."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokasaurus.config.commands import run_command
from tokasaurus.config.pipes import ends_with_its_reader

__all__ = ["COMMANDS", "main"]

# Modules of this package.
COMMANDS = {
    "inspect": "say what is in a cartridge's file",
    "verify": "check a file whole, and whether it fits a model",
    "convert": "write a cartridge in the other format: .pt as safetensors, or the reverse",
    "create": "make a cartridge of a text: the KV cache that a model has after reading it",
    "train": "train a short cartridge that stands for a long document",
    "list": "list the cartridges of a running engine",
    "upload": "give a running engine a cartridge",
    "delete": "let a running engine forget a cartridge",
}


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status, as ``run_command`` does."""
    return run_command(
        "toka-cartridge",
        "makes, checks and converts cartridges.",
        "tokasaurus.launch.cartridges",
        COMMANDS,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
