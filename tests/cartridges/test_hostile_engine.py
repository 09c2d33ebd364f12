"""Files that are no cartridges, named in requests to a real engine, while others are answered."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx2 as httpx
import pytest
from engine_process import running
from hostile_files import CASES
from test_hostile_files import make

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900)]

PLAIN = {"prompt": "A B C D A B C D", "temperature": 0, "max_tokens": 40}


def test_an_engine_refuses_them_by_name_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    work, files = tmp_path / "work", tmp_path / "files"
    work.mkdir()
    files.mkdir()
    monkeypatch.chdir(work)  # where a file that runs would leave its mark
    with running(tmp_path, f"cartridge_roots={files}", "cpu_threads=1") as engine:

        def ask(**fields: object) -> httpx.Response:
            return httpx.post(f"{engine.url}/v1/completions", json={**PLAIN, **fields}, timeout=120)

        expected = ask().json()["choices"]
        is_over, others = threading.Event(), []

        def go_on() -> None:
            while not is_over.is_set():
                others.append(ask().json().get("choices"))

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            cases = [case for case in CASES if not case.needs_limits]
            assert len(cases) > 60
            for case in cases:
                source, _ = make(case, files)
                answer = ask(cartridges=[{"id": str(source), "source": "local"}])
                assert answer.status_code == 400, (case.name, answer.text)
                assert answer.json()["error"]["param"] == "cartridges", case.name
        finally:
            is_over.set()
            thread.join()
        assert len(others) > 60
        assert others == [expected] * len(others)
        assert engine.get("/health")[0] == 200
        assert list(work.iterdir()) == []
        assert httpx.get(f"{engine.url}/v1/cartridges").json()["data"] == []
