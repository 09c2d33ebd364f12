"""A real `toka` for tests: started as a program, talked to over HTTP, stopped with a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai

PROGRAM = (sys.executable, "-m", "tokasaurus.entry")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EngineProcess:
    """One running ``toka``, on the model that the environment variable MODEL names; its log goes to a file that failing tests print."""

    def __init__(
        self,
        log_path: Path,
        *flags: str,
        port: int | None = None,
        program: Sequence[str | Path] = PROGRAM,
    ) -> None:
        self.port = port or free_port()
        self.log_path = log_path
        if "MODEL" in os.environ and not any(flag.startswith("model=") for flag in flags):
            flags = (f"model={os.environ['MODEL']}", *flags)
        if not any(flag.startswith("data_dir=") for flag in flags):
            flags = (f"data_dir={log_path.parent / 'data'}", *flags)
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, f"port={self.port}", *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(api_key="none", base_url=f"{self.url}/v1", max_retries=0, **options)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 while nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None, f"toka exited early:\n{self.log}"
            assert time.monotonic() < deadline, f"toka is not ready:\n{self.log}"
            time.sleep(0.1)

    def children(self) -> list[int]:
        """Process ids of its manager and worker, and whatever else it started."""
        seen = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(line) for line in seen.stdout.split()]

    def child(self, role: str) -> int:
        """The process id of one role, found by what its log says at start."""
        for line in self.log.splitlines():
            if f" {role} " in line and "process id" in line:
                return int(line.rsplit("process id", 1)[1])
        raise AssertionError(f"no {role} in the log:\n{self.log}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_exit(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"toka did not exit in {timeout_s} s:\n{self.log}") from None

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                self.wait_exit(30)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def running(directory: Path, *flags: str) -> Iterator[EngineProcess]:
    """A ready engine for the length of a with-block."""
    engine = EngineProcess(directory / "toka.log", *flags)
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.stop()
