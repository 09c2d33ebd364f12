"""The version of the installed package, for rooms that must not import ``tokasaurus`` itself."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("tokasaurus")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
