"""Memory that a process may take: of the machine, and of control groups with a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokasaurus.launch.available_memory import available_memory_bytes

GB = 10**9


def write(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GB, 50 GB of them available."""
    write(tmp_path / "proc", meminfo="MemTotal: 64000000 kB\nMemAvailable: 48828125 kB")
    return tmp_path


def test_without_control_groups_it_is_what_linux_estimates(root: Path) -> None:
    assert available_memory_bytes(root) == 50 * GB


def test_a_control_group_leaves_its_limit_less_what_it_cannot_drop(root: Path) -> None:
    write(root / "proc/self", cgroup="0::/system.slice/toka.service")
    group = root / "sys/fs/cgroup/system.slice/toka.service"
    stat = f"anon {2 * GB}\ninactive_file {GB}"
    write(group, memory__max=8 * GB, memory__current=3 * GB, memory__stat=stat)
    assert available_memory_bytes(root) == 6 * GB


def test_a_limit_around_it_holds_too(root: Path) -> None:
    write(root / "proc/self", cgroup="0::/pods/one")
    write(
        root / "sys/fs/cgroup/pods/one", memory__max="max", memory__current=1, memory__stat="anon 0"
    )
    group = root / "sys/fs/cgroup/pods"
    write(group, memory__max=4 * GB, memory__current=GB, memory__stat="inactive_file 0")
    assert available_memory_bytes(root) == 3 * GB


def test_a_container_that_sees_the_path_of_its_host_has_the_limit_of_the_mount(root: Path) -> None:
    write(root / "proc/self", cgroup="5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc")
    write(
        root / "sys/fs/cgroup/memory",
        memory__limit_in_bytes=2 * GB,
        memory__usage_in_bytes=GB,
        memory__stat=f"total_inactive_file {GB // 2}",
    )
    assert available_memory_bytes(root) == 3 * GB // 2


def test_a_group_without_a_limit_changes_nothing(root: Path) -> None:
    write(root / "proc/self", cgroup="4:memory:/")
    write(
        root / "sys/fs/cgroup/memory",
        memory__limit_in_bytes=9223372036854771712,
        memory__usage_in_bytes=GB,
        memory__stat="anon 0",
    )
    assert available_memory_bytes(root) == 50 * GB


def test_more_use_than_the_limit_leaves_nothing(root: Path) -> None:
    write(root / "proc/self", cgroup="0::/")
    write(root / "sys/fs/cgroup", memory__max=GB, memory__current=2 * GB, memory__stat="anon 0")
    assert available_memory_bytes(root) == 0


def test_this_machine_has_memory() -> None:
    assert available_memory_bytes() > 1 << 20
