"""A real ``toka`` for tests: started as a program, asked over HTTP, stopped with a signal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

PROGRAM = (os.environ.get("ENGINE_PYTHON", sys.executable), "-m", "tokasaurus.entry")
"""The variable names another environment's Python, where tests of clients have none with torch."""

# As text or as JSON.
_READY = re.compile(r'[ "]server[ "].*ready: .* at https?://\S+:(\d+)/v1(?:"|$)', re.MULTILINE)


def eventually(check: Callable[[], bool], what: object, timeout_s: float = 60.0) -> None:
    """Waits until a check holds; fails if it does not hold in time."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.02)


class EngineProcess:
    """One running ``toka``, with directories of its own.

    It takes a free port, so that tests may run side by side.

    Args:
        log_path: the file that its output goes to, which a failing test prints.
        flags: of ``toka``. Without ``model=``, the environment variable MODEL names the model. The
            variable ENGINE_FLAGS has more flags, such as server_processes=2, with which the
            same tests must pass.
        port: None takes a free one.
        program: the command to run.

    Attributes:
        private: the only directory in which it finds room for temporary files.
    """

    def __init__(
        self,
        log_path: Path,
        *flags: str,
        port: int | None = None,
        program: Sequence[str | Path] = PROGRAM,
    ) -> None:
        self.log_path = log_path
        self._port = port
        if "MODEL" in os.environ and not any(flag.startswith("model=") for flag in flags):
            flags = (f"model={os.environ['MODEL']}", *flags)
        flags = (*os.environ.get("ENGINE_FLAGS", "").split(), *flags)
        if not any(flag.startswith("data_dir=") for flag in flags):
            flags = (f"data_dir={log_path.parent / 'data'}", *flags)
        if not any(flag.startswith("cartridge_dir=") for flag in flags):
            flags = (f"cartridge_dir={log_path.parent / 'cartridges'}", *flags)
        # Not below the log: the path of a Unix socket has 107 bytes at most.
        self.private = Path(tempfile.mkdtemp(prefix="toka-test-"))
        environment = {
            **os.environ,
            "OMP_WAIT_POLICY": "passive",
            "TMPDIR": str(self.private),
        }
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, f"port={port or 0}", *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def port(self) -> int:
        """The port that it listens on, which its log names when it is ready."""
        if self._port is None:
            found = _READY.search(self.log)
            assert found is not None, f"no port in the log:\n{self.log}"
            self._port = int(found[1])
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def json_log(self, **fields: object) -> list[dict[str, Any]]:
        """The lines of its log so far that have these fields, with ``log_format=json``."""
        whole = [line for line in self.log.splitlines(keepends=True) if line.endswith("\n")]
        lines = map(json.loads, whole)
        return [line for line in lines if fields.items() <= line.items()]

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(api_key="none", base_url=f"{self.url}/v1", max_retries=0, **options)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 if nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """Every figure of ``/metrics``, under its name with labels and without ``tokasaurus_``."""
        lines = self.get("/metrics")[1].splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name.removeprefix("tokasaurus_"): float(value) for name, value in pairs}

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while _READY.search(self.log) is None:
            assert self.process.poll() is None, f"toka exited early:\n{self.log}"
            assert time.monotonic() < deadline, f"toka is not ready:\n{self.log}"
            time.sleep(0.05)
        assert self.get("/health")[0] == 200

    def begin_batch(self, lines: Sequence[dict[str, Any]]) -> str:
        """Uploads lines for ``/v1/completions``, and starts their batch; returns its id."""
        text = "\n".join(map(json.dumps, lines)).encode()
        with self.client() as client:
            file = client.files.create(file=("in.jsonl", text), purpose="batch")
            return client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            ).id

    def answered_batch(self, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines of the output of a batch, when it is completed."""
        batch_id = self.begin_batch(lines)
        with self.client() as client:

            def is_completed() -> bool:
                return client.batches.retrieve(batch_id).status == "completed"

            eventually(is_completed, "the batch")
            output = client.batches.retrieve(batch_id).output_file_id
            return [json.loads(line) for line in client.files.content(output).text.splitlines()]

    def child(self, role: str) -> int:
        """The process id of one role, which its log says at the start; of the latest one."""
        for line in reversed(self.log.splitlines()):
            if f" {role} " in line and "process id" in line:
                return int(line.rsplit("process id", 1)[1])
        raise AssertionError(f"no {role} in the log:\n{self.log}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_exit(self, timeout_s: float = 60.0) -> int:
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
        shutil.rmtree(self.private, ignore_errors=True)


@contextlib.contextmanager
def started(
    directory: Path, *flags: str, port: int | None = None, is_ready: bool = False
) -> Iterator[EngineProcess]:
    """An engine for the length of a with-block, which may end by itself before."""
    engine = EngineProcess(directory / "toka.log", *flags, port=port)
    try:
        if is_ready:
            engine.wait_ready()
        yield engine
    finally:
        engine.stop()


def running(directory: Path, *flags: str) -> contextlib.AbstractContextManager[EngineProcess]:
    """An engine that is ready, for the length of a with-block."""
    return started(directory, *flags, is_ready=True)
