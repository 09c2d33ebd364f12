"""``toka-batch``: its files, and a run that is interrupted and killed before it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokasaurus.batch.lines import MAX_LINE_BYTES, answer_line, error_line, parse_line, read_lines
from tokasaurus.batch.offline import OfflineJob
from tokasaurus.batch.tables import import_requests, write_parquet
from tokasaurus.errors import ConfigError
from tokasaurus.launch.batch_run import main

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
MESSAGES = [{"role": "user", "content": "hello"}]


def imported(source: Path) -> list[object]:
    target = source.with_name("imported")
    import_requests(source, target)
    return [json.loads(line) for _, line in read_lines(target)]


def test_plain_lines_become_lines_of_a_batch(tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [
        json.dumps(LINE),
        "",
        json.dumps({"prompt": "p", "max_tokens": 3}),
        json.dumps({"messages": MESSAGES, "custom_id": "mine"}),
        json.dumps({"neither": 1}),
        "[1]",
    ]
    source.write_text("\n".join(lines))
    assert imported(source) == [
        LINE,
        {**LINE, "custom_id": "line-3", "body": {"prompt": "p", "max_tokens": 3}},
        {
            "custom_id": "mine",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": MESSAGES},
        },
        {"neither": 1},
        [1],
    ]


def test_lines_have_the_numbers_that_an_editor_shows(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "imported"
    source.write_text('\n\n{"prompt": "p"}\n\n[1]\n{\n\n{"prompt": "q"}')
    import_requests(source, target)
    lines = [
        parse_line(number, line, None, ["/v1/completions"]) for number, line in read_lines(target)
    ]
    assert [line.name for line in lines] == ["line-3", "line-5", "line-6", "line-8"]
    assert [line.line for line in lines] == [3, 5, 6, 8]
    with source.open("ab") as file:
        file.write(b"\n\n" + b"a" * (MAX_LINE_BYTES + 1))
    with pytest.raises(ConfigError, match="line 10 is too long"):
        import_requests(source, target)


def test_the_error_of_a_line_without_a_request_says_what_a_line_may_be():
    bad = parse_line(1, b'{"text": "a"}', None, ["/v1/completions"])
    assert bad.message.endswith(
        "custom_id, method, url, body, or be a body with prompt or messages"
    )


def test_rows_of_parquet_become_lines_of_a_batch(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [
        {"prompt": "p", "max_tokens": 3, "messages": None},
        {"prompt": None, "max_tokens": None, "messages": MESSAGES},
    ]
    source = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    bodies = [line["body"] for line in imported(source)]
    assert bodies == [{"prompt": "p", "max_tokens": 3}, {"messages": MESSAGES}]
    table = pyarrow.Table.from_pylist([{**LINE, "body": json.dumps(LINE["body"])}])
    pyarrow.parquet.write_table(table, source)
    assert imported(source) == [LINE]
    source.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="Parquet"):
        imported(source)


def test_results_are_written_as_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    completion = {"choices": [{"text": "one"}]}
    chat = {"choices": [{"message": {"content": "two"}}]}
    lines = [
        answer_line("a", 200, json.dumps(completion).encode()),
        answer_line("b", 200, json.dumps(chat).encode()),
        answer_line("c", 400, b'{"error":{}}'),
        error_line("line-4", "code", "message"),
    ]
    (tmp_path / "lines").write_bytes(b"".join(lines))
    write_parquet(tmp_path / "lines", tmp_path / "out.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["custom_id"] for row in rows] == ["a", "b", "c", "line-4"]
    assert [row["status_code"] for row in rows] == [200, 200, 400, None]
    assert [row["text"] for row in rows] == ["one", "two", None, None]
    assert json.loads(rows[0]["body"]) == completion
    assert json.loads(rows[3]["error"]) == {"code": "code", "message": "message"}


def test_the_error_of_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").touch()
    with pytest.raises(ConfigError, match=r"tokasaurus\[parquet\]"):
        imported(tmp_path / "in.parquet")
    (tmp_path / "in.jsonl").write_text(json.dumps(LINE))
    with pytest.raises(ConfigError, match=r"tokasaurus\[parquet\]"):  # before any line is answered
        OfflineJob(tmp_path / "in.jsonl", tmp_path / "out.parquet", "m")


def test_a_job_that_cannot_run_is_refused(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="not a file"):
        OfflineJob(source, target, "m")
    source.write_text(json.dumps(LINE))
    with pytest.raises(ConfigError, match="not a directory"):
        OfflineJob(source, tmp_path / "none" / "out.jsonl", "m")
    job = OfflineJob(source, target, "m")
    with pytest.raises(ConfigError, match="in use"):
        OfflineJob(source, target, "m")
    job.store.close()
    again = OfflineJob(source, target, "m")
    assert again.batch_id == job.batch_id
    again.store.close()
    with pytest.raises(ConfigError, match=r"model=m, not other; .*toka-batch"):
        OfflineJob(source, target, "other")
    target.write_text("precious")  # another program's, while the job is not finished
    with pytest.raises(ConfigError, match="exists already"):
        OfflineJob(source, target, "m")
    target.unlink()
    source.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE))
    with pytest.raises(ConfigError, match=r"begun; delete .*toka-batch"):
        OfflineJob(source, target, "m")
    other = tmp_path / "other.jsonl"
    other.touch()
    with pytest.raises(ConfigError, match="exists already"):
        OfflineJob(source, other, "m")
    with pytest.raises(ConfigError, match="is a directory; name a file in it"):
        OfflineJob(source, tmp_path, "m")


def test_a_wrong_command_line_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, message in {
        "walk a b": "not a command",
        "run": "name the input and the output",
        "run a": "name the input and the output",
        "run none.jsonl out.jsonl": "none.jsonl is not a file",
        "run a b colour=red": "colour",
    }.items():
        assert main(line.split()) == 2, line
        assert message in capsys.readouterr().err, line


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    assert "toka-batch run INPUT OUTPUT" in capsys.readouterr().out


# --- with an engine -------------------------------------------------------------------------------


class Run:
    """A running ``toka-batch``."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self._directory = directory
        self.log = directory / "log"
        words = ["run", str(directory / "in.jsonl"), str(directory / "out.jsonl"), *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tokasaurus.launch.batch_run", *words],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
                start_new_session=True,
            )

    def wait_for_answers(self, number: int) -> None:
        """Returns when at least ``number`` lines are recorded."""
        path = self._directory / "out.jsonl.toka-batch" / "jobs.sqlite3"
        while True:
            assert self.process.poll() is None, self.log.read_text()
            if path.exists():
                database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
                try:
                    if database.execute("SELECT count(*) FROM answers").fetchone()[0] >= number:
                        return
                except sqlite3.OperationalError:
                    pass  # the table does not exist yet
                finally:
                    database.close()
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(120)


@pytest.mark.engine
@pytest.mark.processes
@pytest.mark.parametrize("num_lines", [60, pytest.param(300, marks=pytest.mark.long)])
def test_a_run_that_is_interrupted_and_killed_continues(tmp_path, num_lines):
    lines = [
        {"prompt": f"number {i}", "max_tokens": 40 + i % 50, "return_token_ids": True}
        for i in range(num_lines)
    ]
    lines[7] = {"prompt": "too long", "max_tokens": 10**8}
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{")
    # A small engine starts sooner.
    small = ("max_tokens_per_forward=256", "kv_cache_num_tokens=8192")
    # Few sequences at a time, so that a run that is to be stopped does not end before.
    slow = (*small, "max_seqs_per_forward=4")
    run = Run(tmp_path, *slow)
    run.wait_for_answers(num_lines // 30)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert "run the same command again to continue" in run.log.read_text()
    assert not (tmp_path / "out.jsonl").exists()
    run = Run(tmp_path, *slow)
    run.wait_for_answers(num_lines // 3)
    run.process.kill()
    run.wait()
    run = Run(tmp_path, *small)
    assert run.wait() == 0, run.log.read_text()
    assert f"{num_lines + 1} lines, 2 with an error" in run.log.read_text()
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    names = [f"line-{i}" for i in range(1, num_lines + 1)]
    assert [result["custom_id"] for result in results] == [*names, f"line-{num_lines + 1}"]
    for number, result in enumerate(results[:num_lines]):
        if number == 7:
            assert result["response"]["status_code"] == 400
        else:
            body = result["response"]["body"]
            (choice,), usage = body["choices"], body["usage"]
            assert usage["completion_tokens"] <= 40 + number % 50
            assert len(choice["token_ids"]) == usage["completion_tokens"]
            assert len(choice["prompt_token_ids"]) == usage["prompt_tokens"]
    assert not (tmp_path / "out.jsonl.toka-batch").exists()


@pytest.mark.engine
@pytest.mark.processes
def test_a_directory_is_answered_file_by_file_and_its_cost_is_said(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        lines = [{"prompt": f"{name} {i}", "max_tokens": 5} for i in range(3)]
        (source / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "tokasaurus.launch.batch_run", "run", source, target]
    flags = ["kv_cache_num_tokens=8192", "max_tokens_per_forward=256", "price_per_million=1000"]

    def run():
        return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)

    done = run()
    assert done.returncode == 0, done.stderr
    first, *_, progress, last = done.stderr.splitlines()
    assert first == "toka-batch: loading the model"
    assert progress.startswith("toka-batch: in progress, 6 of 6 lines, 2 of 2 files, ")
    found = re.fullmatch(
        rf"{target}: 2 files, 6 lines; (\d+) prompt tokens, (\d+) generated; cost (.*)", last
    )
    assert found is not None, last
    num_tokens = int(found[1]) + int(found[2])
    assert float(found[3]) == pytest.approx(num_tokens / 1000, rel=0.01)
    for name in ("a", "sub/b"):
        results = [json.loads(line) for line in (target / f"{name}.jsonl").open()]
        assert [result["custom_id"] for result in results] == ["line-1", "line-2", "line-3"]
    again = run()  # which needs no engine
    assert (again.returncode, again.stderr.splitlines()) == (0, [last])
