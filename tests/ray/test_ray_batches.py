"""``toka-batch run`` on a Ray cluster: directories of files, and a single file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokasaurus[ray]'")

FLAGS = (
    "device=cpu",
    "kv_cache_num_tokens=8192",
    "max_tokens_per_forward=256",
    "max_seqs_per_forward=8",
    "deterministic=T",
)


class Run:
    """A running ``toka-batch run``."""

    def __init__(self, log: Path, source: Path, target: Path, *flags: str) -> None:
        self._log = log
        words = ["run", str(source), str(target), *FLAGS, *flags]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tokasaurus.launch.batch_run", *words],
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        return self.process.wait(120)


def on(cluster, num_engines: int = 2) -> tuple[str, ...]:
    return "launcher=ray", f"ray_address={cluster.address}", f"dp_size={num_engines}"


def requests_of(name: str, number: int, max_tokens: int = 20) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{name} {i} A B C", "max_tokens": max_tokens + i, "temperature": 0.0}
        for i in range(number)
    ]


def write_lines(path: Path, requests: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in requests))


def without_chance(result: dict[str, Any]) -> Any:
    """A result line without what differs from run to run: ids and times."""
    if result["response"] is None:
        return result["custom_id"], result["error"]
    body = result["response"]["body"]
    usage = body.get("usage") or {}
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    content = body.get("choices"), body.get("error"), body.get("model"), counts
    return result["custom_id"], result["response"]["status_code"], content


def results_in(path: Path) -> list[Any]:
    return [without_chance(json.loads(line)) for line in path.read_bytes().splitlines()]


def results_below(directory: Path, stem: str) -> list[Any]:
    """The results of one input file, in the order of its result files' names."""
    paths = sorted(directory.glob(f"{stem}-*.jsonl"))
    return [result for path in paths for result in results_in(path)]


def locally(tmp_path: Path, source: Path) -> list[Any]:
    target = tmp_path / "local" / f"{source.stem}.jsonl"
    target.parent.mkdir(exist_ok=True)
    run = Run(tmp_path / "local.log", source, target, "cpu_threads=1")
    assert run.wait() == 0, run.log
    return results_in(target)


def test_a_killed_run_continues_and_answers_as_a_local_run_does(cluster, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    names = [f"f{number:02}" for number in range(12)]
    for name in names:
        write_lines(source / "sub" / f"{name}.jsonl", requests_of(name, 6, 60))
    with (source / "sub" / "f03.jsonl").open("a") as file:
        file.write('{"bad\n{"prompt": "too long", "max_tokens": 100000000}\n')
    # More rows than a block has.
    write_lines(source / "long.jsonl", requests_of("long", 3, 1) * 100)
    run = Run(tmp_path / "first.log", source, target, *on(cluster))
    while len(list(target.rglob("*.jsonl"))) < 4:
        assert run.process.poll() is None, run.log
        time.sleep(0.02)
    run.process.kill()
    run.wait()
    time.sleep(1)
    done = {path: path.stat().st_mtime_ns for path in target.rglob("*.jsonl")}
    assert 4 <= len(done) < 14
    run = Run(tmp_path / "second.log", source, target, *on(cluster))
    assert run.wait() == 0, run.log
    assert "374 lines" in run.log
    assert " of them answered before" in run.log
    for path, modified_ns in done.items():
        assert path.stat().st_mtime_ns == modified_ns, "a block was answered twice"
    together = tmp_path / "together.jsonl"
    paths = [source / "sub" / f"{name}.jsonl" for name in names]
    together.write_bytes(b"".join(path.read_bytes() for path in paths))
    found = [result for name in names for result in results_below(target / "sub", name)]
    assert [each[1:] for each in found] == [each[1:] for each in locally(tmp_path, together)]
    assert [each[0] for each in results_below(target / "sub", "f03")[5:]] == [
        "line-6",
        "line-7",
        "line-8",
    ]
    assert len(list(target.glob("long-*.jsonl"))) == 2
    assert results_below(target, "long") == locally(tmp_path, source / "long.jsonl")
    # All is done: nothing is written any more, and other models are refused.
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    run = Run(tmp_path / "third.log", source, target, *on(cluster))
    assert run.wait() == 0, run.log
    assert "374 lines, 374 of them answered before" in run.log
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    run = Run(tmp_path / "other.log", source, target, *on(cluster), "served_model_name=other")
    assert run.wait() == 2
    assert "begun with model=" in run.log


def test_tables_are_answered_with_tables(cluster, tmp_path):
    import pyarrow.parquet

    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b"):
        rows = [*requests_of(name, 5), {"prompt": None, "max_tokens": 1, "temperature": 0.0}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source / f"{name}.parquet")
    run = Run(tmp_path / "log", source, target, *on(cluster))
    assert run.wait() == 0, run.log
    assert "12 lines, 2 with an error" in run.log
    for name in ("a", "b"):
        expected = locally(tmp_path, source / f"{name}.parquet")
        (path,) = target.glob(f"{name}-000000001-*.parquet")
        rows = pyarrow.parquet.read_table(path).to_pylist()
        assert [row["custom_id"] for row in rows] == [each[0] for each in expected]
        texts = [row["text"] for row in rows]
        assert texts[:5] == [each[2][0][0]["text"] for each in expected[:5]]
        assert texts[5] is None
        assert json.loads(rows[5]["error"]) == expected[5][1]


def test_a_directory_that_cannot_be_answered_is_refused(cluster, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    flags = on(cluster, 1)
    empty = Run(tmp_path / "empty", source, target, *flags)
    assert empty.wait() == 2
    assert "has no files that end with .jsonl or .parquet" in empty.log
    write_lines(source / "a.jsonl", requests_of("a", 1))
    here = Run(tmp_path / "here", source, target)
    assert here.wait() == 2
    assert "set launcher=ray" in here.log
    wrong = Run(tmp_path / "wrong", source, target, *flags, f"model={tmp_path / 'none'}")
    assert wrong.wait() == 2, wrong.log
    assert "none: no such directory" in wrong.log.splitlines()[-1]
    target = tmp_path / "other"
    write_lines(target / "precious.jsonl", [])
    taken = Run(tmp_path / "taken", source, target, *flags)
    assert taken.wait() == 2
    assert "has files already" in taken.log


def test_one_file_is_answered_by_one_engine_on_the_cluster(cluster, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, [*requests_of("one", 40), {"neither": 1}])
    run = Run(tmp_path / "log", source, target, *on(cluster))
    assert run.wait() == 0, run.log
    assert "41 lines, 1 with an error" in run.log
    assert results_in(target) == locally(tmp_path, source)
