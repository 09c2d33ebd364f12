"""The processes of the engines, each with its model loaded once, and told what to run and when."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokasaurus
from tokasaurus.bench.peers.workloads import Request
from tokasaurus.errors import ConfigError, EngineDead

__all__ = ["EngineProcess", "driver_command", "export_openvino"]

_DRIVER = Path(__file__).with_name("driver.py")
_TAIL_LINES = 12


class EngineProcess:
    """One engine in a process of its own. A context manager, which ends it.

    Args:
        python: that the engine is installed in.
        settings: see ``driver.py``; ``settings["engine"]`` is the name of the engine.

    Attributes:
        name: of the engine.
        version: of the engine, once ``await_ready`` has returned.

    Raises:
        ConfigError: there is no such file as ``python``.
    """

    version = ""

    def __init__(self, python: str, settings: dict[str, Any]) -> None:
        self.name: str = settings["engine"]
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed with this
        environment = dict(os.environ)
        # Ours may run from a checkout; a peer must not find this engine's packages.
        environment.pop("PYTHONPATH", None)
        if self.name in ("tokasaurus", "int8"):
            environment["PYTHONPATH"] = str(Path(tokasaurus.__file__).parent.parent)
        try:
            self._process = subprocess.Popen(
                driver_command(python, settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                text=True,
            )
        except OSError as error:
            raise ConfigError(f"{self.name}={python}: {error.strerror}") from None

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def await_ready(self) -> None:
        """Waits until the model is loaded. Raises EngineDead if the process has ended."""
        self.version = self._answer()["version"]

    def run(self, requests: Sequence[Request]) -> float:
        """Runs the requests, and returns the seconds that they took.

        Raises:
            EngineDead: the process has ended, or some tokens were not generated.
        """
        answer = self._ask({"run": [asdict(each) for each in requests]})
        wanted = sum(each.max_tokens * each.n for each in requests)
        if answer["tokens"] != wanted:
            raise EngineDead(f"{self.name} generated {answer['tokens']} tokens, not {wanted}")
        seconds: float = answer["seconds"]
        return seconds

    def products(self, rounds: int) -> float:
        """Seconds of the products of the last run alone, the median of several rounds."""
        seconds: float = self._ask({"products": rounds})["seconds"]
        return seconds

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise EngineDead(f"{self.name} ended with status {status}:\n{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-_TAIL_LINES:])


def driver_command(python: str, settings: dict[str, Any]) -> list[str]:
    """The command of an engine's process."""
    return [python, str(_DRIVER), json.dumps(settings)]


def export_openvino(python: str, checkpoint: Path, directory: Path) -> None:
    """Fills a directory with the export of a checkpoint that OpenVINO GenAI runs.

    Args:
        python: that optimum-intel is installed in.

    Raises:
        ConfigError: the export failed; quotes its end.
    """
    command = [python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    flags = ["--weight-format", "fp32", "--task", "text-generation-with-past"]
    try:
        done = subprocess.run(
            [*command, "--model", str(checkpoint), *flags, str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            text=True,
        )
    except OSError as error:
        raise ConfigError(f"openvino={python}: {error.strerror}") from None
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_TAIL_LINES:])
        raise ConfigError(f"the checkpoint could not be exported for OpenVINO:\n{tail}")
