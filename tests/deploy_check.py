"""``make test-deploy``: checks deployment files with their validators, and builds the CPU image.

    python tests/deploy_check.py [TORCH_INDEX]

1. The validators of ``deployment_validators`` find nothing.
2. The steps of the Dockerfile's cpu target run in a directory of their own, without Docker and
   without those that change the system. ``toka`` starts as its entry point says. The health check
   passes, the bundled model answers, and SIGTERM ends it with status 0.

The exit status is 0 if all of this holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from deployment_validators import validate
from dockerfile import Build, Image

ROOT = Path(__file__).parent.parent
_PORT = 10210
_START_S = 120.0


def main(torch_index: str | None = None) -> int:
    validate()
    with tempfile.TemporaryDirectory(prefix="tokasaurus-image-") as directory:
        root = Path(directory)
        arguments = {} if torch_index is None else {"TORCH_INDEX": torch_index}
        (root / "tmp").mkdir()
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment = {**kept, "HOME": str(root / "home/toka"), "TMPDIR": str(root / "tmp")}
        build = Build((ROOT / "Dockerfile").read_text(), ROOT, root, arguments, environment)
        print("==> the steps of the Dockerfile, target cpu", flush=True)
        image = build.run("cpu")
        for command in build.left_out:
            print(f"left out: {command}")
        serve(image)
    print("==> all of it holds")
    return 0


def serve(image: Image) -> None:
    """Starts the engine of an image, asks it, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*image.entrypoint, f"port={port}"]
    print("==>", *command, flush=True)
    search = image.environment["PATH"].split(os.pathsep)[0]
    command[0] = f"{search}/{command[0]}"
    engine = subprocess.Popen(command, cwd=image.directory, env=image.environment)
    try:
        health_check = [word.replace(f":{_PORT}/", f":{port}/") for word in image.health_check]
        if health_check == image.health_check:
            raise ValueError(f"the health check does not ask port {_PORT}: {health_check}")
        await_health(engine, health_check)
        print("answer:", ask(port))
        engine.send_signal(signal.SIGTERM)
        status = engine.wait(60)
        if status:
            raise RuntimeError(f"after SIGTERM, the engine ended with status {status}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            engine.kill()


def await_health(engine: subprocess.Popen[bytes], command: list[str]) -> None:
    deadline = time.monotonic() + _START_S
    while subprocess.run(command).returncode:
        if engine.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the health check never passed: {command}")
        time.sleep(1)
    print("healthy:", *command)


def ask(port: int) -> str:
    body = {"prompt": "A B C D A B C D A B", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text = json.load(response)["choices"][0]["text"]
    if text != " C D A B C D A B":
        raise RuntimeError(f"the answer is {text!r}")
    return str(text)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
