"""The first word of ``toka``: a command's name runs the command, anything else serves."""

from __future__ import annotations

import importlib

import pytest

from tokasaurus import entry
from tokasaurus.commands import COMMANDS
from tokasaurus.config.schema import Schema


@pytest.fixture
def toka(monkeypatch, capsys):
    """Runs the program; returns its status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["toka", *words])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_every_command_has_a_schema_of_its_name_and_a_summary_in_the_table():
    assert "plan" in COMMANDS
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"tokasaurus.commands.{name}")
        assert isinstance(module.SCHEMA, Schema)
        assert module.SCHEMA.program == f"toka {name}"
        assert callable(module.run)
        assert summary


def test_the_help_lists_the_commands(toka):
    status, out, _ = toka("--help")
    assert status == 0
    assert "toka COMMAND --help" in out
    for name in COMMANDS:
        assert f"\n  {name} " in out


def test_a_command_has_a_help_of_its_own(toka):
    for name in COMMANDS:
        status, out, _ = toka(name, "--help")
        assert status == 0
        assert out.startswith(f"toka {name}: ")
        assert "uvicorn_log_level" not in out


def test_an_error_of_a_command_names_it(toka):
    status, out, err = toka("plan", "workload=prompt=8,output=8", "device=h20")
    assert (status, out) == (2, "")
    assert err.startswith("toka plan: error: device=h20 is not known; the nearest is h200.")


def test_another_word_is_not_taken_for_a_command(toka):
    error = "toka: error: {!r}: expected key=value, perhaps {}\n"
    for word, guess in (
        ("plam", "the command toka plan"),
        ("restrat", "the command toka restart"),
        ("qwen", "model=qwen"),
    ):
        assert toka(word) == (2, "", error.format(word, guess))
    # Only the first word names a command.
    assert toka("port=0", "plan") == (2, "", error.format("plan", "the command toka plan"))
