"""``toka-cartridge train``, from a text to a cartridge, with the bundled model."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from random import Random

import pytest

from tokasaurus.cartridge_file import CartridgeFile
from tokasaurus.demo.corpus import passages
from tokasaurus.launch.cartridges.main import main

FEW = (
    "num_tokens=33",
    "num_conversations=80",
    "num_steps=24",
    "batch_size=8",
    "learning_rate=0.06",
    "num_frozen=2",
    "kv_cache_num_tokens=8192",
)


def status(words: list[str]) -> int:
    """Of the program, which ends by itself where a flag is wrong."""
    try:
        return main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "village.txt"
    path.write_text(passages.passage(Random(1), num_subjects=3, num_facts=3, held_out=True).text)
    return path


def test_a_text_becomes_a_cartridge_and_a_picture(text, tmp_path, capsys):
    out = tmp_path / "village.safetensors"
    assert main(["train", "--text", str(text), f"out={out}", *FEW]) == 0
    said = capsys.readouterr().out
    with CartridgeFile(out) as file:
        assert file.num_tokens == 33
        file.check(num_layers=6, num_kv_heads=2, head_dim=32)
    after, before = map(float, re.findall(r"by ([0-9.]+)", said))
    assert after < 0.9 * before
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")
    assert main(["inspect", str(out)]) == 0
    assert "33" in capsys.readouterr().out


def test_a_text_that_the_context_does_not_hold_is_shown_in_excerpts(text, tmp_path, capsys):
    flags = [*FEW, "num_steps=2", "answer_tokens=32", "max_num_tokens_per_request=160"]
    flags += [f"text={text}", f"out={tmp_path / 'village.safetensors'}"]
    assert main(["train", *flags]) == 0
    assert "trained on" in capsys.readouterr().out
    assert main(["train", *flags, "answer_tokens=128"]) == 2
    assert "answer_tokens=128 and a question leave no room" in capsys.readouterr().err


def test_a_text_that_is_no_longer_than_the_cartridge_is_refused(text, tmp_path, capsys):
    out = tmp_path / "short.safetensors"
    text.write_text("Slairmo is a village.")
    assert main(["train", f"text={text}", f"out={out}", *FEW]) == 2
    said = capsys.readouterr().err
    assert "num_tokens=33: the text has" in said
    assert "prompts" not in said  # nothing was asked before
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"text": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"out": "village.pt"}, "must end in .safetensors"),
        ({"out": "nowhere/village.safetensors"}, "there is no directory nowhere"),
        ({"plot": "nowhere/village.png"}, "plot=nowhere/village.png: there is no directory"),
        ({"num_frozen": "512"}, "it must be less than num_tokens=512"),
        ({"rope_scaling.rope_type": "linear"}, "rope_scaling: training takes the model's own"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_loaded(flags, said, text, capsys):
    given = {"text": str(text), "out": "village.safetensors", **flags}
    assert status(["train", *(f"{name}={value}" for name, value in given.items())]) == 2
    assert said in capsys.readouterr().err


def test_without_a_library_that_draws_the_remedy_is_named(text, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["train", f"text={text}", "out=village.safetensors"]) == 2
    assert "pip install 'tokasaurus[train]'" in capsys.readouterr().err
