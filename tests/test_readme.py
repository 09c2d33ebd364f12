"""The README's commands and programs run, and answer what it says they answer.

A block in a language is a program; a block without one, right after it, is what it prints.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
BLOCKS = [(match[1], match[2]) for match in BLOCK.finditer(README)]


def programs(language: str, containing: str) -> list[tuple[str, str]]:
    """Each program, and what the README says it prints."""
    found = []
    for (kind, code), (next_kind, printed) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind == language and containing in code:
            found.append((code, printed if next_kind == "" else ""))
    return found


def test_curl(engine):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    ((command, printed),) = programs("bash", "curl")
    seen = subprocess.run(
        command.replace("127.0.0.1:10210", f"127.0.0.1:{engine.port}").replace("curl ", "curl -s "),
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    said, says = json.loads(printed), json.loads(seen.stdout)
    assert says["choices"] == said["choices"]
    assert says["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"]


def test_openai_client(engine):
    ((program, printed),) = programs("python", "from openai import OpenAI")
    program = program.replace("127.0.0.1:10210", f"127.0.0.1:{engine.port}")
    seen = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert seen.stdout == printed


def test_embedded():
    ((program, printed),) = programs("python", "from tokasaurus import")
    seen = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert seen.stdout == printed


def test_ping(engine):
    (command,) = re.findall(r"`(toka-ping [^`]*)`", README)
    arguments = command.replace("toka-ping", "").strip()
    seen = subprocess.run(
        f"{sys.executable} -m tokasaurus.scripts.ping port={engine.port} {arguments}",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(seen.stdout.split()) > 5
