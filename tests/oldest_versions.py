"""Constraints for pip that are the lower bounds of the package's own requirements.

    python tests/oldest_versions.py [EXTRA ...] > constraints-oldest.txt

Of ``torch`` it names the installed version: its older ones come from PyPI with gigabytes of CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement

__all__ = ["lower_bounds"]

_KEPT = ("torch",)


def lower_bounds(requirements: Iterable[str], extras: Iterable[str]) -> Iterator[str]:
    """One constraint for each requirement that holds here, without or with one of the extras.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    for each in map(Requirement, requirements):
        if each.marker and not any(each.marker.evaluate({"extra": name}) for name in ("", *extras)):
            continue
        if each.name in _KEPT:
            yield f"{each.name}=={metadata.version(each.name).partition('+')[0]}"
            continue
        bounds = [bound.version for bound in each.specifier if bound.operator in (">=", "==")]
        if len(bounds) != 1:
            raise ValueError(f"{each} has no lower bound; give it one in pyproject.toml")
        yield f"{each.name}=={bounds[0]}"


if __name__ == "__main__":
    print(*lower_bounds(metadata.requires("tokasaurus") or (), sys.argv[1:]), sep="\n")
