"""What every installed command answers, whatever else it does."""

import os
import subprocess
import sys
from importlib.metadata import distribution

import pytest
from rows import each_row

from tokasaurus import __version__
from tokasaurus.config.parser import answer_question
from tokasaurus.config.pipes import ends_with_its_reader

COMMANDS = [
    entry for entry in distribution("tokasaurus").entry_points if entry.group == "console_scripts"
]


def answer(entry, word, monkeypatch, capsys):
    """Runs a command with one argument; returns what it printed."""
    monkeypatch.setattr("sys.argv", [entry.name, word])
    try:
        status = entry.load()()
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert (status or 0, err) == (0, ""), entry.name
    return out


def test_every_command_prints_its_version(monkeypatch, capsys):
    assert {"toka", "toka-ping", "toka-batch", "toka-bench"} <= {entry.name for entry in COMMANDS}
    for entry in COMMANDS:
        printed = answer(entry, "--version", monkeypatch, capsys)
        assert printed == f"tokasaurus {__version__}\n", entry.name


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_every_command_prints_its_help(word, monkeypatch, capsys):
    for entry in COMMANDS:
        program = entry.name.replace("tksrs", "toka")
        printed = answer(entry, word, monkeypatch, capsys)
        assert printed.startswith(program), entry.name
        if program == "toka":
            for flag in ("model", "kv_cache_num_tokens", "max_seqs_per_forward", "port"):
                assert flag in printed


@each_row("words", [["help", "port=1"], ["port=1", "help"], ["version"]])
def test_only_a_single_help_asks_for_help(words):
    def fail():
        raise AssertionError("printed the help")

    assert not answer_question(words, fail)


def test_a_program_whose_output_nobody_reads_ends_quietly():
    for arguments in (("tokasaurus.entry", "--show"), ("tokasaurus.bench.main", "--help")):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, ""), arguments


def test_a_broken_pipe_elsewhere_is_an_error(capfd):
    @ends_with_its_reader
    def main():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        main()
