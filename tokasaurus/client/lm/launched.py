"""An engine that a program starts for itself, as a process, and stops again."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from tokasaurus.client.lm.config import TokasaurusConfig
from tokasaurus.config.resolve import BUNDLED_MODEL_NAME
from tokasaurus.errors import ConfigError, EngineDead

__all__ = ["launched_engine"]

_POLL_S = 0.1
_STOP_S = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHOWN_OF_LOG = 3000


@contextlib.contextmanager
def launched_engine(config: TokasaurusConfig, flags: Mapping[str, Any]) -> Iterator[None]:
    """An engine at the address of a configuration, for the length of a with-block.

    It serves the configuration's model, unless the flags name another; the name of the bundled
    model stands for that one.

    Args:
        flags: of ``toka``, but for its port.

    Raises:
        ConfigError: the address is not on this machine, or something listens there already.
        EngineDead: it ended before it was ready; the message has the end of its log.
    """
    address = urlsplit(config.base_url)
    if address.hostname not in _LOOPBACK or address.scheme != "http":
        raise ConfigError(
            f"launch starts an engine on this machine, and base_url={config.base_url!r} is not"
            " there; use http://localhost:PORT, or leave launch out"
        )
    if "port" in flags:
        raise ConfigError("engine.port: the port is that of lm_config.base_url; leave it out here")
    with httpx.Client(base_url=config.address.url, trust_env=False) as http:
        if _status(http, "/ping") is not None:
            raise ConfigError(
                f"launch: something listens at {config.base_url} already; leave launch out to use"
                " it, or change the port of base_url"
            )
        named = {"port": address.port or 80, **_model(config), **flags}
        words = [f"{key}={value}" for key, value in named.items()]
        with tempfile.TemporaryDirectory(prefix="toka-lm-") as directory:
            log = Path(directory) / "toka.log"
            with log.open("wb") as output:
                engine = subprocess.Popen(
                    [sys.executable, "-m", "tokasaurus.entry", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            try:
                _wait_until_ready(engine, http, log)
                yield
            finally:
                _stop(engine)


def _model(config: TokasaurusConfig) -> dict[str, str]:
    name = config.server_model
    return {} if name == BUNDLED_MODEL_NAME else {"model": name}


def _status(http: httpx.Client, path: str) -> int | None:
    try:
        return http.get(path, timeout=5.0).status_code
    except httpx.HTTPError:
        return None


def _wait_until_ready(engine: subprocess.Popen[bytes], http: httpx.Client, log: Path) -> None:
    while _status(http, "/health") != httpx.codes.OK:
        if engine.poll() is not None:
            said = log.read_text(errors="replace").strip()[-_SHOWN_OF_LOG:]
            raise EngineDead(f"the engine ended with status {engine.returncode}:\n{said}")
        time.sleep(_POLL_S)


def _stop(engine: subprocess.Popen[bytes]) -> None:
    if engine.poll() is not None:
        return
    engine.terminate()
    try:
        engine.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        engine.kill()
        engine.wait()
