"""The version of the installed package; rooms take it from here and not from the public face."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("tokasaurus")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
