"""docs/capacity.md: its plans come out as printed, and its rule agrees with them."""

from __future__ import annotations

import re
import shlex

import pytest
from described_models import LLAMA_1B, LLAMA_8B, LLAMA_70B, describe
from documentation import ROOT, examples, mismatch, run_bash

from tokasaurus import entry
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.bound import Means
from tokasaurus.planner.demand import demand_of_shape
from tokasaurus.planner.devices import device_names, find_device

PAGE = "docs/capacity.md"
TEXT = (ROOT / PAGE).read_text()


@pytest.fixture
def page_directory(tmp_path, monkeypatch):
    """A directory in which the page's model has been described."""
    (program,) = (each.program for each in examples(PAGE) if "mkdir" in each.program)
    run_bash(program, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plans_come_out_as_printed(page_directory, monkeypatch, capsys):
    shown = [each for each in examples(PAGE) if each.printed is not None]
    assert len(shown) == 3
    for example in shown:
        monkeypatch.setattr("sys.argv", shlex.split(example.program.replace("\\\n", " ")))
        with pytest.raises(SystemExit) as ended:
            entry.main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        assert mismatch(example.printed, out) == ""


def test_the_rule_agrees_with_its_table_and_with_the_tool(tmp_path):
    positions = "{:,} KiB"
    for fields, size in ((LLAMA_1B, 32), (LLAMA_8B, 128), (LLAMA_70B, 320)):
        facts = model_facts(describe(tmp_path, fields))
        assert facts.kv_elements_per_token * 2 == size * 1024
        weights = f"{facts.num_parameters * 2 / 1e9:.1f} GB"
        assert re.search(rf"\| {positions.format(size)} \| [\d.]+ GB \| {weights} \|", TEXT), size
    many = Means.of(demand_of_shape("prompt=1024,output=256,n=64,requests=64"))
    single = Means.of(demand_of_shape("prompt=1024,output=256,requests=4096"))
    together, alone = (
        int(number.replace(",", ""))
        for number in re.search(r"\| tokens \| ([\d,]+) \| ([\d,]+) \|", TEXT).groups()
    )
    # Answers of the many end together, so they hold 128 tokens more than halfway.
    assert many.num_held(together - 1024 * 128, 16) == pytest.approx(1024)
    assert single.num_held(alone, 16) == pytest.approx(1024)
    held = re.search(r"sequences held at most ([\d,]+) tokens", TEXT)[1]
    assert int(held.replace(",", "")) == pytest.approx(together, rel=0.05)


def test_the_page_names_the_devices_and_their_knees():
    named = re.search(r"devices.yaml\): ([^.]*)\. Each", TEXT)[1]
    assert tuple(re.split(r",\s+", named)) == device_names()
    h200, l4 = (
        find_device(name).flops_per_s("bfloat16") / find_device(name).bytes_per_s
        for name in ("h200", "l4")
    )
    assert (round(h200, -1), round(l4, -1)) == (140, 270)
    assert "about 140 on an H200 and 270 on an L4" in TEXT


def test_the_described_device_can_be_read(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "board.yaml"
    path.write_text(block)
    assert find_device(str(path)).can_be_joined
