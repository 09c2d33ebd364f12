"""``toka-batch`` with a directory or a pattern: which files, what is done, and how it goes on."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest
from rows import each_row

from tokasaurus.batch.prices import Prices
from tokasaurus.batch.records import Usage
from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.sharded import ShardedJob
from tokasaurus.batch.shards import find_shards, names_several, read_part
from tokasaurus.errors import ConfigError, EngineDead

URL = "/v1/completions"


def write(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def names(source: object, target: Path, part: str | None = None) -> list[str]:
    found = find_shards(str(source), target, None if part is None else read_part(part))
    return [shard.name for shard in found]


class Engine:
    """Answers with the prompt, until it has died."""

    def __init__(self, lives_for: int = 1 << 30) -> None:
        self.answered: list[str] = []
        self._lives_for = lives_for

    async def answer(self, path: str, body: dict, *, priority: int) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        if len(self.answered) >= self._lives_for:
            raise EngineDead("it was killed")
        self.answered.append(body["prompt"])
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        return 200, json.dumps({"text": body["prompt"], "usage": usage}).encode()


def run(job: ShardedJob, engine: Engine):
    """Runs a job as ``toka-batch`` does; returns how far it came."""

    async def work():
        runner = BatchRunner(
            job.store,
            engine.answer,
            urls=[URL],
            model="m",
            max_samples=8,
            max_lines=1 << 30,
            joins_errors=True,
        )
        await runner.start()
        work = asyncio.create_task(job.run(runner))
        while not work.done():
            progress = await runner.on_disk(job.progress)
            assert progress.counts.total >= progress.num_answered
            await asyncio.wait({work}, timeout=0.05)
        work.result()
        await runner.stop()
        return await runner.on_disk(job.progress)

    return asyncio.run(work())


def answers(path: Path) -> list[tuple[str, str | None]]:
    """The id and the text of each result."""
    lines = map(json.loads, path.read_text().splitlines())
    return [
        (line["custom_id"], line["response"] and line["response"]["body"]["text"]) for line in lines
    ]


def test_a_directory_has_the_files_below_it_but_hidden_ones(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("b.jsonl", "a.jsonl", "sub/deep/c.parquet", ".hidden.jsonl", "_notes/x.txt"):
        write(source / name, "p")
    assert names_several(str(source))
    assert names(source, target) == ["a.jsonl", "b.jsonl", "sub/deep/c.parquet"]
    assert names(source, target, "0/2") == ["a.jsonl", "sub/deep/c.parquet"]
    assert names(source, target, "1/2") == ["b.jsonl"]
    (shard,) = find_shards(str(source), target, read_part("1/2"))
    assert (shard.source, shard.target) == (source / "b.jsonl", target / "b.jsonl")
    write(source / "sub" / "readme.txt", "p")
    with pytest.raises(ConfigError, match=r"readme\.txt is neither \.jsonl nor \.parquet"):
        names(source, target)


@each_row(
    "pattern, expected",
    [
        ("a*.jsonl", ["a1.jsonl", "a2.jsonl"]),
        ("a[2-9].jsonl", ["a2.jsonl"]),
        ("sub/?.jsonl", ["c.jsonl"]),
        ("*/c.jsonl", ["sub/c.jsonl"]),
        ("**/*.jsonl", ["a1.jsonl", "a2.jsonl", "sub/c.jsonl"]),
    ],
)
def test_a_pattern_names_files_below_its_part_without_wildcards(tmp_path, pattern, expected):
    for name in ("a1.jsonl", "a2.jsonl", "sub/c.jsonl", "sub/note.txt"):
        write(tmp_path / "in" / name, "p")
    source = str(tmp_path / "in" / pattern)
    assert names_several(source)
    assert names(source, tmp_path / "out") == expected


def test_inputs_that_make_no_sense_are_refused(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for pattern in (source, source / "*.jsonl"):
        with pytest.raises(ConfigError, match="has no files"):
            names(pattern, tmp_path / "out")
    write(source / "a.jsonl", "p")
    for target in (source, source / "out"):
        with pytest.raises(ConfigError, match=r"whose files are requests|where the answers go"):
            names(source, target)
    write(source / "out" / "b.jsonl", "p")
    with pytest.raises(ConfigError, match="where the answers go"):
        names(source / "**" / "*.jsonl", source / "out")
    assert not names_several(str(source / "a.jsonl"))
    assert not names_several("no-such-file.jsonl")
    (tmp_path / "odd[1].jsonl").touch()
    assert not names_several(str(tmp_path / "odd[1].jsonl"))
    for text in ("16/16", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ConfigError, match="expected I/N"):
            read_part(text)


def test_each_file_has_an_output_and_a_wrong_file_is_named(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    for number in range(40):  # more than run at once
        write(source / f"{number:02}.jsonl", *(f"{number}-{i}" for i in range(number % 5 + 1)))
    with (source / "07.jsonl").open("a") as file:
        file.write("\n{\n")
    (source / "sub").mkdir()
    (source / "sub" / "bad.jsonl").write_text("no request\n")
    job, engine = ShardedJob(str(source), target, "m"), Engine()
    last = run(job, engine)
    assert last.is_final
    assert not last.is_estimate
    assert last.files == (41, 41)
    assert last.counts.completed == len(engine.answered) == 120
    assert (last.counts.total, last.counts.failed) == (121, 1)
    assert last.usage.output_tokens == 3 * 120
    (error,) = job.conclude()
    assert error.startswith("sub/bad.jsonl: line 1: the line is not valid JSON")
    for number in range(40):
        expected = [(f"line-{i + 1}", f"{number}-{i}") for i in range(number % 5 + 1)]
        if number == 7:
            expected.append(("line-5", None))
        assert answers(target / f"{number:02}.jsonl") == expected
    assert not (target / "sub").exists()
    assert not list((target / "_toka-batch" / "files").iterdir()), "copies are left"


def test_a_run_that_was_cut_off_continues_and_answers_no_file_twice(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    for number in range(30):
        write(source / f"{number:02}.jsonl", *(f"{number}-{i}" for i in range(6)))
    seen: list[str] = []
    rounds = 0
    while True:
        job, engine = ShardedJob(str(source), target, "m"), Engine(lives_for=37)
        before = {path: path.stat().st_mtime_ns for path in target.glob("*.jsonl")}
        last = run(job, engine)
        job.store.close()
        seen += engine.answered
        rounds += 1
        for path, modified_ns in before.items():
            assert path.stat().st_mtime_ns == modified_ns
        if last.is_final:
            break
        assert rounds < 10
    assert rounds == 5
    assert sorted(seen) == sorted(f"{number}-{i}" for number in range(30) for i in range(6))
    assert len(list(target.glob("*.jsonl"))) == 30
    # Once more: nothing is left to do. New files are answered, and only they.
    write(source / "new.jsonl", "new")
    job, engine = ShardedJob(str(source), target, "m"), Engine()
    assert run(job, engine).files == (31, 31)
    assert engine.answered == ["new"]
    assert job.conclude() == []


def test_lines_of_files_that_are_not_read_yet_are_estimated_by_size(tmp_path):
    source = tmp_path / "in"
    for number in range(20):  # of which 16 are read at once
        write(source / f"{number:02}.jsonl", "a", "b", "c")
    job = ShardedJob(str(source), tmp_path / "out", "m")
    last = run(job, Engine(lives_for=0))
    job.store.close()
    assert (last.counts.total, last.is_estimate, last.files) == (60, True, (0, 20))


def test_a_deleted_output_is_made_again_and_a_changed_input_is_refused(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    write(source / "a.jsonl", "a")
    write(source / "b.jsonl", "b")
    job = ShardedJob(str(source), target, "m")
    run(job, Engine())
    job.conclude()
    (target / "a.jsonl").unlink()
    job, engine = ShardedJob(str(source), target, "m"), Engine()
    run(job, engine)
    job.conclude()
    assert engine.answered == ["a"]
    write(source / "b.jsonl", "b", "more")
    with pytest.raises(ConfigError, match=r"b\.jsonl has changed .* delete .*out/b\.jsonl"):
        ShardedJob(str(source), target, "m")
    (target / "b.jsonl").unlink()
    job, engine = ShardedJob(str(source), target, "m"), Engine()
    run(job, engine)
    job.conclude()
    assert engine.answered == ["b", "more"]


def test_an_unfinished_file_that_has_changed_or_gone_starts_over(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    write(source / "a.jsonl", "a1", "a2", "a3")
    write(source / "b.jsonl", "b1", "b2", "b3")
    job = ShardedJob(str(source), target, "m")
    assert not run(job, Engine(lives_for=2)).is_final
    job.store.close()
    write(source / "a.jsonl", "other")
    os.utime(source / "a.jsonl", ns=(time.time_ns(), time.time_ns() + 1))
    (source / "b.jsonl").unlink()
    job, engine = ShardedJob(str(source), target, "m"), Engine()
    assert run(job, engine).is_final
    job.conclude()
    assert engine.answered == ["other"]
    assert [path.name for path in target.glob("*.jsonl")] == ["a.jsonl"]


def test_a_file_that_vanishes_during_a_run_is_named_and_the_others_are_answered(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    for number in range(20):  # more than run at once
        write(source / f"{number:02}.jsonl", f"{number}")
    job, engine = ShardedJob(str(source), target, "m"), Engine()
    (source / "00.jsonl").unlink()
    (source / "19.jsonl").unlink()
    assert run(job, engine).is_final
    assert job.conclude() == [
        f"{name}: it cannot be read: No such file or directory" for name in ("00.jsonl", "19.jsonl")
    ]
    assert sorted(engine.answered, key=int) == [f"{number}" for number in range(1, 19)]


def test_a_link_to_nothing_is_refused(tmp_path):
    source = tmp_path / "in"
    write(source / "a.jsonl", "a")
    (source / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for named in (source, source / "*.jsonl"):
        with pytest.raises(ConfigError, match=r"b\.jsonl is a link to a file that does not exist"):
            find_shards(str(named), tmp_path / "out")


def test_what_another_run_has_or_has_not_written_is_left_alone(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    write(source / "a.jsonl", "a")
    write(target / "a.jsonl", "precious")
    with pytest.raises(ConfigError, match=r"a\.jsonl exists already"):
        ShardedJob(str(source), target, "m")
    (target / "a.jsonl").unlink()
    job = ShardedJob(str(source), target, "m")
    with pytest.raises(ConfigError, match="in use"):
        ShardedJob(str(source), target, "m")
    run(job, Engine())
    job.conclude()
    with pytest.raises(ConfigError, match="model=m, not other"):
        ShardedJob(str(source), target, "other")
    with pytest.raises(ConfigError, match="not a directory"):
        ShardedJob(str(source), tmp_path / "no" / "out", "m")
    with pytest.raises(ConfigError, match=r"a\.jsonl is a file, .* directory; choose another"):
        ShardedJob(str(source), target / "a.jsonl", "m")
    with pytest.raises(ConfigError, match="/proc/out cannot be made: "):
        ShardedJob(str(source), Path("/proc/out"), "m")


def test_parts_share_the_files_and_an_output(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    for number in range(7):
        write(source / f"{number}.jsonl", f"p{number}")
    answered = []
    jobs = [ShardedJob(str(source), target, "m", read_part(f"{i}/3")) for i in range(3)]
    for job in jobs:  # all of them are open
        engine = Engine()
        assert run(job, engine).is_final
        job.conclude()
        answered.append(sorted(engine.answered))
    assert answered == [["p0", "p3", "p6"], ["p1", "p4"], ["p2", "p5"]]
    # With a new file before the others, the parts are others, too.
    write(source / "-.jsonl", "new")
    jobs = [ShardedJob(str(source), target, "m", read_part(f"{i}/3")) for i in range(3)]
    engines = [Engine() for _ in jobs]
    for job, engine in zip(jobs, engines, strict=True):
        assert run(job, engine).is_final
        job.conclude()
    assert [each for engine in engines for each in engine.answered] == ["new"]


def test_costs_count_prompts_and_generated_tokens():
    usage = Usage.of(2_000_000, 500_000, 3_000_000, 0)
    assert Prices(0.5, 2.0).cost(usage) == pytest.approx(7.0)
    assert Prices(0.5, 2.0).shown(usage) == "7.00"
    assert Prices(500.0, 0.0).shown(usage) == "1,000.00"
    assert Prices(0.0, 0.000_123_456).shown(usage) == "0.00037"
    assert Prices(0.0, 0.0).shown(usage) == "0.00"
