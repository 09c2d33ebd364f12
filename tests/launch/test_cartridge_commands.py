"""What ``toka-cartridge`` prints about files, and what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import make_checkpoint
from rows import check_each
from safetensors.torch import load_file, save_file

from tokasaurus.launch.cartridges.main import COMMANDS, main


def run(*words):
    return main([str(word) for word in words])


def own_tensors(num_tokens=21, num_layers=3, heads=2, size=16):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}.{layer}": torch.randn(num_tokens, heads, size, generator=generator)
        for kind in ("keys", "values")
        for layer in range(num_layers)
    }


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.safetensors"
    said = {"format": "tokasaurus cartridge 1", "num_frozen": "2", "model": "org/name"}
    save_file(own_tensors(), path, said)
    return path


def test_inspect_prints_what_is_there(own, capsys):
    assert run("inspect", own) == 0
    lines = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    digest = lines.pop("digest")
    assert lines == {
        "layout": "safetensors",
        "positions": "21",
        "of which frozen": "2",
        "layers": "3",
        "KV heads": "2",
        "numbers per head": "16",
        "dtype": "F32",
        "bytes of tensors": str(6 * 21 * 2 * 16 * 4),
        "model": "org/name",
    }
    assert run("inspect", f"file={own}", "json=T") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["digest"] == digest
    assert printed["shape"] == {
        "num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "name": "org/name", "rope": ""
    }  # fmt: skip


def test_a_companion_is_found_beside_the_file_or_named(own, tmp_path, capsys):
    save_file(own_tensors(), tmp_path / "plain")
    text = "model: {pretrained_model_name_or_path: %s}"
    (tmp_path / "config.yaml").write_text(text % "beside/it")
    (tmp_path / "other.yaml").write_text(text % "named/other")
    assert run("inspect", tmp_path / "plain") == 0
    assert "beside/it" in capsys.readouterr().out
    assert run("inspect", tmp_path / "plain", "--companion", tmp_path / "other.yaml") == 0
    assert "named/other" in capsys.readouterr().out


def test_convert_goes_there_and_back(own, tmp_path, capsys):
    assert run("convert", own, tmp_path / "c.pt") == 0
    with torch.serialization.safe_globals([torch.nn.ParameterList]):  # as trainers load it
        saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert {name: len(each) for name, each in saved.items()} == dict.fromkeys(
        ("frozen_keys", "frozen_values", "trainable_keys", "trainable_values"), 3
    )
    assert all(isinstance(each, torch.nn.ParameterList) for each in saved.values())
    assert saved["frozen_keys"][0].shape == (1, 2, 2, 16)
    assert saved["trainable_values"][2].shape == (1, 2, 19, 16)
    assert [saved[n][0].requires_grad for n in ("trainable_keys", "frozen_keys")] == [True, False]
    assert run("convert", f"file={tmp_path / 'c.pt'}", f"out={tmp_path / 'c.safetensors'}") == 0
    found = load_file(tmp_path / "c.safetensors")
    assert found.keys() == own_tensors().keys()
    assert all(torch.equal(found[name], each) for name, each in own_tensors().items())
    printed = capsys.readouterr().out.splitlines()
    digests = {line.split("digest ")[1] for line in printed}
    assert len(printed) == 2
    assert len(digests) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "c.pt", "c.safetensors", "own.safetensors"
    ]  # fmt: skip


def test_verify_compares_with_a_model(own, tmp_path, capsys):
    fits = make_checkpoint(tmp_path / "fits", "llama")
    other = make_checkpoint(tmp_path / "other", "llama", num_layers=2, head_dim=8)
    capsys.readouterr()  # transformers' bars
    assert run("verify", own) == 0
    assert run("verify", own, "--model", fits) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(
        line.startswith(f"{own} is a cartridge of 21 positions, 16.1 KB in F32; digest ")
        for line in printed.out.splitlines()
    )
    assert run("verify", own, f"model={other}") == 1
    assert capsys.readouterr().err == (
        f"toka-cartridge verify: error: {own}: the cartridge has 3 layers, the model has 2; "
        "the cartridge has 16 numbers per head, the model has 8\n"
    )


def test_wrong_files_and_flags_are_errors(own, tmp_path, capsys):
    (tmp_path / "text").write_text("text")
    rows = [
        (("verify", tmp_path / "text"), 1, f"verify: error: {tmp_path}/text: the file is neither"),
        (("inspect", tmp_path / "absent"), 2, "inspect: error: file=.*absent: there is no such"),
        (("inspect",), 2, "inspect: error: file is required"),
        (("inspect", own, "companion=absent"), 2, "companion=absent: there is no such file"),
        (("inspect", own, "max_tokens=20"), 1, "21 positions; the limit is 20"),
        (("inspect", own, "timeout_s=0"), 2, "timeout_s=0.0: must be at least 0.1"),
        (("convert", own, "c.bin"), 2, "c.bin: the name must end in .safetensors or .pt"),
        (("convert", own, "/absent/c.pt"), 2, "there is no directory /absent"),
        (("convert", tmp_path / "text", tmp_path / "c.pt"), 1, "the file is neither"),
        (("verify", own, "model=org/name"), 2, "toka-download model=org/name fetches it"),
        (("eat",), 2, "'eat' is not a command; the commands are inspect, verify"),
    ]

    def check(row):
        words, status, says = row
        try:
            assert run(*words) == status
        except SystemExit as ended:
            assert ended.code == status  # noqa: PT017
        err = capsys.readouterr().err
        assert re.search(says, err), err
        assert err.startswith("toka-cartridge")
        assert not (tmp_path / "c.pt").exists()

    check_each(rows, check)


def test_every_command_has_help(capsys):
    assert run("help") == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in listed
        with pytest.raises(SystemExit) as ended:
            run(name, "--help")
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"toka-cartridge {name}: ")


def test_the_commands_about_files_of_ours_import_no_torch(own):
    """They would take seconds; the process that reads imports torch for files of torch.save."""
    program = (
        "import sys\n"
        "from tokasaurus.launch.cartridges.main import main\n"
        f"assert main(['verify', {str(own)!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
