"""Which of the files in a directory, repository or run is the cartridge."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokasaurus.cartridges.sources.source import SourceErrors
from tokasaurus.listing import listing

__all__ = ["COMPANION", "SUFFIXES", "choose_file", "companion_of"]

COMPANION = "config.yaml"
SUFFIXES = (".safetensors", ".pt")

_NAMES = ("cartridge.safetensors", "cartridge.pt", "cache_last.pt")
_STEP = re.compile(r"cache-(step|epoch)(\d{1,18})\.pt")
_KINDS = ("step", "epoch")


def choose_file(names: Iterable[str], errors: SourceErrors, remedy: str) -> str:
    """The name of the cartridge among the names of all files.

    In this order: cartridge.safetensors, cartridge.pt, cache_last.pt, the highest step of
    cache-step{N}.pt, the highest epoch of cache-epoch{N}.pt, and the only file that ends in
    .safetensors or .pt. Of two that are equal, the one in fewer directories.

    Args:
        names: with "/" between directories.
        errors: of the cartridge.
        remedy: how a request names one of several files.

    Raises:
        RequestError: there is none, or there are several.
    """
    everything = sorted(names, key=lambda name: (name.count("/"), name))
    files = [name for name in everything if name.endswith(SUFFIXES)]
    ranked = [(_rank(name.rpartition("/")[2]), name) for name in files]
    if known := [pair for pair in ranked if pair[0] is not None]:
        # The first of those that rank the same, by depth.
        return min(known, key=lambda pair: pair[0] or ())[1]
    if len(files) == 1:
        return files[0]
    if files:
        raise errors.wrong(f"it has several files, {listing(files)}; {remedy}")
    has = f"it has {listing(everything)}" if everything else "it has no files"
    raise errors.wrong(f"no file there ends in .pt or .safetensors; {has}")


def companion_of(name: str, names: Iterable[str]) -> str | None:
    """The config.yaml beside a file, if there is one."""
    path = name.rpartition("/")
    wanted = f"{path[0]}{path[1]}{COMPANION}"
    return wanted if wanted in set(names) else None


def _rank(name: str) -> tuple[int, int] | None:
    """The lower, the better; None for a name that says nothing."""
    if name in _NAMES:
        return _NAMES.index(name), 0
    if found := _STEP.fullmatch(name):
        return len(_NAMES) + _KINDS.index(found[1]), -int(found[2])
    return None
