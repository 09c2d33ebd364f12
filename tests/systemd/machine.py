"""A machine for tests: systemd as the first process of namespaces of its own.

It shares the network, the kernel and the programs of this machine. It needs root, cgroups of the
second version and the programs ``systemd``, ``unshare`` and ``nsenter``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from documentation import ROOT
from engine_process import eventually

__all__ = ["Machine"]

_BEGIN = Path(__file__).with_name("begin.sh")
_TARGETS = ("sysinit", "basic", "shutdown", "network-online", "multi-user")
_PROGRAM = "/opt/tokasaurus/bin/toka"
_HOMES = ("/root", "/home")
_WITH_THIS_PROCESS = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount")
"""It ends at once if this process is killed."""
_NAMESPACES = (
    *("unshare", "--pid", "--uts", "--ipc", "--mount", "--cgroup"),
    *("--fork", "--kill-child"),
)
_ENTER = """
mount -t cgroup2 cgroup2 /mnt && mkdir "/mnt/$0" && echo $$ > "/mnt/$0/cgroup.procs" &&
umount /mnt && exec "$@"
"""
"""Moves itself to a group of processes, $0, which becomes the root of the machine's groups."""
_TIDY = """
mount -t cgroup2 cgroup2 /mnt && find "/mnt/$0" -depth -type d -exec rmdir {} +
test ! -e "/mnt/$0"
"""


class Machine:
    """One machine, which ends with ``stop``.

    Args:
        directory: for the log of its systemd.
    """

    def __init__(self, directory: Path) -> None:
        self._log = directory / "systemd.log"
        units = directory / "units"
        units.mkdir()
        for name in _TARGETS:
            text = f"[Unit]\nDescription={name}\nDefaultDependencies=no\n"
            (units / f"{name}.target").write_text(text)
        _write_unit(units)
        self._cgroup = f"toka-tests-{os.getpid()}"
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        begin = ["bash", str(_BEGIN), str(ROOT), sys.prefix, str(units), f"{base}/tokasaurus"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_WITH_THIS_PROCESS, "bash", "-c", _ENTER, self._cgroup, *_NAMESPACES, *begin],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(self._is_up, self)

    def __str__(self) -> str:
        return self._log.read_text()

    def run(self, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a program there.

        Args:
            command: its words.
            text: for its standard input.
        """
        enter = ["nsenter", "-t", str(self._first_process()), "--mount", "--pid", "--cgroup", "--"]
        return subprocess.run([*enter, *command], input=text, capture_output=True, text=True)

    def systemctl(self, *words: str) -> str:
        """What it prints. Fails if it fails."""
        done = self.run("systemctl", "--no-pager", *words)
        assert done.returncode == 0, (
            f"{words}: {done.stdout}{done.stderr}\n{self.engine_log()}\n{self}"
        )
        return done.stdout

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self.systemctl("show", "--value", f"--property={name}", "tokasaurus").strip()

    def write(self, path: str, text: str) -> None:
        """Writes a file there."""
        assert self.run("tee", path, text=text).returncode == 0

    def engine_log(self) -> str:
        return self.run("cat", "/run/engine.log").stdout

    def stop(self) -> None:
        """Ends all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first_process(), 9)
        self._process.wait()
        eventually(self._is_tidy, self._cgroup)

    def _first_process(self) -> int:
        """Its systemd, by the number that it has here: the child of unshare."""
        number = self._process.pid
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        if not children:
            raise ProcessLookupError(f"the machine has ended:\n{self}")
        return int(children[0])

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self
        with contextlib.suppress(ProcessLookupError):
            return self.run("systemctl", "is-active", "multi-user.target").returncode == 0
        return False

    def _is_tidy(self) -> bool:
        """Whether its groups of processes are gone, which are removed as soon as they are empty."""
        tidied = subprocess.run(["unshare", "--mount", "bash", "-c", _TIDY, self._cgroup])
        return tidied.returncode == 0


def _write_unit(units: Path) -> None:
    """The unit as it is, with the program of this environment, and what tests need beside it."""
    text = (ROOT / "deploy/tokasaurus.service").read_text()
    assert text.count(f"={_PROGRAM} ") == 2
    text = text.replace(f"={_PROGRAM} ", "=/mnt/environment/bin/python -m tokasaurus.entry ")
    (units / "tokasaurus.service").write_text(text)
    more = [
        "[Service]",
        "StandardOutput=append:/run/engine.log",
        "StandardError=inherit",
        "Environment=PYTHONPATH=/mnt/source",
        "RestartSec=0",
    ]
    if sys.base_prefix.startswith(_HOMES):
        # The interpreter itself is where the unit sees nothing.
        more += ["ProtectHome=tmpfs", f"BindReadOnlyPaths={sys.base_prefix}"]
    (units / "tokasaurus.service.d").mkdir()
    (units / "tokasaurus.service.d/tests.conf").write_text("\n".join([*more, ""]))
