"""How much memory of the host a new process may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory_bytes"]

# Files of a control group's directory: the limit, the use, and the reclaimable part of the use, a
# key of memory.stat. Version 2 of control groups, then version 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory available without swapping, of the machine and of the control groups around us.

    Of the machine, Linux estimates it; elsewhere it is half of all memory. A container or a service
    has a control group, whose limit the kernel enforces by killing: pages of files that were not
    used lately count as available there, since the kernel drops them first.

    Args:
        root: of the file system.
    """
    return min([_machine_bytes(root), *_control_group_bytes(root)])


def _machine_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _control_group_bytes(root: Path) -> Iterator[int]:
    """What each control group with a limit leaves: ours, and those around it."""
    for directory in _control_groups(root):
        for limit, use, reclaimable in _FILES:
            try:
                most = int((directory / limit).read_text())
                used = int((directory / use).read_text())
                statistics = (directory / "memory.stat").read_text()
            except (OSError, ValueError):  # of the other version; or "max", which is no limit
                continue
            kept = dict(line.split() for line in statistics.splitlines())
            yield max(most - used + int(kept.get(reclaimable, 0)), 0)


def _control_groups(root: Path) -> Iterator[Path]:
    """The directories of our control groups that have to do with memory, and of those around them.

    In a container the path may be one of the host's, which is not mounted. The mount itself is the
    container's control group then.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mount / path.lstrip("/")
        yield group
        yield from (each for each in group.parents if each.is_relative_to(mount))
