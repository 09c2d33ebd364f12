"""The files of a batch on a cluster: blocks and results. Ray is not needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokasaurus.errors import ConfigError
from tokasaurus.integrations.ray.batch_files import (
    Directory,
    blocks_of,
    claim,
    input_files,
    write_result,
)
from tokasaurus.server.protocols.table import OPERATIONS

fs = pytest.importorskip("pyarrow.fs")


def directory(path: Path) -> Directory:
    path.mkdir(exist_ok=True)
    return Directory.at(str(path))


def write_prompts(path: Path, number: int, first: int = 0) -> None:
    path.write_text("".join(json.dumps({"prompt": f"p{first + i}"}) + "\n" for i in range(number)))


def test_blocks_have_every_line_once_and_names_of_their_content(tmp_path):
    source = directory(tmp_path)
    write_prompts(tmp_path / "a.jsonl", 7)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n{"bad\n{"custom_id": "line-3", "prompt": "again"}\n')
    blocks = list(blocks_of(source, "a.jsonl", OPERATIONS, 4))
    assert [[line.line for line in block.lines] for block in blocks] == [
        [1, 2, 3, 4],
        [5, 6, 7, 9],  # line 8 is blank
        [10],
    ]
    assert sum(block.num_bytes for block in blocks) == (tmp_path / "a.jsonl").stat().st_size
    assert blocks[1].lines[3].code == "invalid_json_line"
    # Its twin is in another block.
    assert blocks[2].lines[0].code == "duplicate_custom_id"
    names = [block.name for block in blocks]
    assert names == sorted(names)
    assert [name[:12] for name in names] == ["a-000000001-", "a-000000005-", "a-000000010-"]
    again = [block.name for block in blocks_of(source, "a.jsonl", OPERATIONS, 4)]
    assert again == names
    text = (tmp_path / "a.jsonl").read_text().replace("p5", "other")
    (tmp_path / "a.jsonl").write_text(text)
    changed = [block.name for block in blocks_of(source, "a.jsonl", OPERATIONS, 4)]
    assert [name == before for name, before in zip(changed, names, strict=True)] == [
        True,
        False,
        True,
    ]


def test_a_table_and_its_result_have_the_same_format(tmp_path):
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"prompt": f"p{i}"} for i in range(5)])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    source = directory(tmp_path)
    first, last = blocks_of(source, "t.parquet", OPERATIONS, 3)
    size = (tmp_path / "t.parquet").stat().st_size
    assert first.num_bytes + last.num_bytes == pytest.approx(size)
    assert [line.custom_id for line in last.lines] == ["line-4", "line-5"]
    result = {"custom_id": "line-4", "response": None, "error": {"code": "c", "message": "m"}}
    write_result(source, last, [json.dumps(result).encode() + b"\n"])
    rows = pyarrow.parquet.read_table(tmp_path / last.name).to_pylist()
    assert [row["custom_id"] for row in rows] == ["line-4"]
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(ConfigError, match=r"t\.parquet cannot be read as Parquet"):
        list(blocks_of(source, "t.parquet", OPERATIONS))


def test_only_requests_may_be_in_a_directory(tmp_path):
    source = directory(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"no files that end with \.jsonl or \.parquet"):
        input_files(source)
    (tmp_path / "in" / "deep").mkdir()
    for name in ("b.jsonl", "deep/a.PARQUET", "_SUCCESS", ".hidden"):
        (tmp_path / "in" / name).write_text("x")
    assert input_files(source) == {"b.jsonl": 1, "deep/a.PARQUET": 1}
    (tmp_path / "in" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"notes\.txt is neither"):
        input_files(source)
    with pytest.raises(ConfigError, match="URL"):
        Directory.at("nowhere://bucket")


@pytest.mark.parametrize("kind", ["local", "other", "objects"])
def test_a_file_is_written_whole_and_a_directory_belongs_to_one_model(tmp_path, kind, monkeypatch):
    target = directory(tmp_path / "out")
    if kind == "other":
        target = Directory(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "out")
    elif kind == "objects":
        target = Directory(fs._MockFileSystem(), "out")
        monkeypatch.setattr("tokasaurus.integrations.ray.batch_files._WHOLE_STORES", ("mock",))
        target.system.create_dir("out")
    claim(target, "m")
    target.write("one.jsonl", b"1")
    target.write("one.jsonl", b"2")
    assert target.exists("one.jsonl")
    assert not target.exists("two.jsonl")
    with target.open("one.jsonl") as file:
        assert file.read() == b"2"
    with target.system.open_output_stream(target.child(".two.jsonl.ab.unfinished")) as file:
        file.write(b"half")
    claim(target, "m")
    assert target.files() == {"_toka-batch.json": 13, "one.jsonl": 1}
    with pytest.raises(ConfigError, match="begun with model=m, not other"):
        claim(target, "other")
    target.system.delete_file(target.child("_toka-batch.json"))
    with pytest.raises(ConfigError, match="has files already"):
        claim(target, "m")
