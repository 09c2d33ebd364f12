"""The lines of ``toka-batch`` where there is no terminal."""

from __future__ import annotations

import re

import pytest
from rows import each_row

from tokasaurus.batch.offline import JobProgress
from tokasaurus.batch.prices import Prices
from tokasaurus.batch.records import RequestCounts, Usage
from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError
from tokasaurus.launch import batch_progress
from tokasaurus.launch.batch_config import BatchRunConfig
from tokasaurus.launch.batch_progress import ProgressDisplay
from tokasaurus.launch.batch_run import main


def progress(answered, total, *, final=False, **more):
    usage = Usage.of(10 * answered, 0, 100 * answered, 0)
    return JobProgress("in progress", RequestCounts(total, answered, 0), usage, final, **more)


@pytest.fixture
def at(monkeypatch):
    """Sets the time."""
    now = [1000.0]
    monkeypatch.setattr(batch_progress.time, "monotonic", lambda: now[0])

    def at(seconds):
        now[0] = 1000.0 + seconds

    return at


def test_lines_have_lines_files_speed_cost_and_time_left(at, capsys):
    with ProgressDisplay(Prices(0.0, 1.0)) as display:
        display.show(progress(50, 0), None)  # an earlier run's
        at(10)
        display.show(progress(150, 350, files=(1, 4), is_estimate=True), 99.0)
        at(30)
        display.show(progress(350, 350, final=True, files=(4, 4)), None)
    assert capsys.readouterr().err.splitlines() == [
        "toka-batch: in progress, 50 of ? lines, 0 tokens/s, cost 0.005",
        "toka-batch: in progress, 150 of about 350 lines, 1 of 4 files, 1,000 tokens/s,"
        " cost 0.015, about 0:00:20 left",
        "toka-batch: in progress, 350 of 350 lines, 4 of 4 files, 1,000 tokens/s, cost 0.035",
    ]


@each_row(
    "num_new, forecast_s, is_whole, left",
    [
        (0, None, False, None),
        (0, 30.0, False, "0:00:30"),
        (20, 30.0, False, "0:00:30"),  # few lines say less than the forecast
        (20, None, False, "0:08:10"),
        (500, 30.0, False, "0:00:10"),  # many say more
        (500, 30.0, True, "0:00:30"),  # unless it knows all that is left
    ],
)
def test_the_time_left_is_a_forecast_or_the_pace(
    monkeypatch, capsys, num_new, forecast_s, is_whole, left
):
    now = [0.0]
    monkeypatch.setattr(batch_progress.time, "monotonic", lambda: now[0])
    with ProgressDisplay() as display:
        display.show(progress(0, 1000), None)
        now[0] = 10.0
        display.show(progress(num_new, 1000), forecast_s, is_whole=is_whole)
    found = re.search("about (.*) left", capsys.readouterr().err.splitlines()[-1])
    assert (found and found[1]) == left


def test_a_long_run_has_few_lines(at, capsys):
    with ProgressDisplay() as display:
        for seconds in range(3600):
            at(seconds)
            display.show(progress(seconds, 10_000), None)
    assert 60 <= len(capsys.readouterr().err.splitlines()) <= 100


def test_a_price_may_be_one_or_two():
    assert BatchRunConfig().prices is None
    assert BatchRunConfig(price_per_million=2.0).prices == Prices(2.0, 2.0)
    assert BatchRunConfig(price_per_million=2.0, prompt_price_per_million=1.0).prices == Prices(
        1.0, 2.0
    )
    assert BatchRunConfig(generated_price_per_million=3.0).prices == Prices(0.0, 3.0)
    with pytest.raises(ConfigError, match="price_per_million=-1"):
        BatchRunConfig(price_per_million=-1.0)
    assert BatchRunConfig(port=5, price_per_million=2.0).engine == EngineConfig(port=5)


@each_row(
    "words, message",
    [
        ("in.jsonl out.jsonl part=0/2", "part=0/2 is for a directory or a pattern"),
        ("in out part=2/2", "part=2/2: expected I/N"),
        ("s3://bucket/in out", "s3://bucket/in is a URL; set launcher=ray"),
        ("in s3://bucket/out", "s3://bucket/out is a URL; set launcher=ray"),
        ("in.jsonl s3://b/out launcher=ray", "s3://b/out is a URL, where only the answers to a"),
        ("in out", "has no files"),
        ("in/*.jsonl out", "has no files"),
        ("in out price_per_millon=1", "the nearest is 'price_per_million'"),
    ],
)
def test_wrong_uses_of_directories_are_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in.jsonl").touch()
    assert main(["run", *words.split()]) == 2
    assert message in capsys.readouterr().err
