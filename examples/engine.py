"""Where the examples' engine is: one that runs already, or one that they start for themselves."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokasaurus.client import Client
from tokasaurus.errors import EngineError, TimedOut

__all__ = ["engine"]

_LOAD_S, _POLL_S, _STOP_S = 600.0, 0.5, 30.0
_JOIN_S = 60.0  # for an engine that somebody else starts


@contextlib.contextmanager
def engine(url: str | None, *flags: str) -> Iterator[str]:
    """The address of an engine that is ready.

    Args:
        url: of an engine that runs already; None starts ``toka`` on a free port of this machine,
            and ends it afterwards.
        flags: of the ``toka`` that is started.

    Raises:
        EngineError: there is none, or it ended while it loaded; says what it had to say.
    """
    if url is not None:
        with Client(url) as client:
            if not client.ping():
                print(f"no engine answers at {url}; waiting {_JOIN_S:g} s for it", file=sys.stderr)
            client.wait_until_ready(_JOIN_S)
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="tokasaurus-") as name:
        log = Path(name) / "toka.log"
        port = _free_port()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tokasaurus.entry"),
                *(f"port={port}", f"data_dir={name}/data", f"cartridge_dir={name}/cartridges"),
                *flags,
            ],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            # The trainer computes on the same cores: threads that wait shall sleep.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, log)
            yield address
        finally:
            process.terminate()
            process.wait(_STOP_S)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    with Client(address) as client:
        for _ in range(round(_LOAD_S / _POLL_S)):
            with contextlib.suppress(TimedOut):
                client.wait_until_ready(timeout_s=_POLL_S)
                return
            if process.poll() is not None:
                said = log.read_text(errors="replace")
                raise EngineError(f"toka ended with status {process.returncode}:\n{said}")
    raise EngineError(f"toka is not ready after {_LOAD_S:g} s:\n{log.read_text(errors='replace')}")
