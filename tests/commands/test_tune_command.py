"""``toka tune`` as a program: what it refuses before it measures anything."""

from __future__ import annotations

import pytest

from tokasaurus import entry
from tokasaurus.commands import tune

SHAPE = "workload=prompt=64,output=32,requests=10"


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs ``toka tune``, which may not measure; returns what it says."""

    def measured(_):
        raise AssertionError("it looked at the machine")

    def run(*words):
        monkeypatch.setattr(tune, "look_here", measured)
        monkeypatch.setattr("sys.argv", ["toka", "tune", *words])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


def test_a_file_that_cannot_be_written_is_refused_at_once(refused, tmp_path):
    path = tmp_path / "none" / "tuned.yaml"
    assert refused(SHAPE, f"out={path}") == (
        f"toka tune: error: out={path}: No such file or directory; set another file with out=\n"
    )
    for directory in (tmp_path, ".", ".."):
        assert f"out={directory}: Is a directory" in refused(SHAPE, f"out={directory}")
    assert list(tmp_path.iterdir()) == []


def test_a_workload_that_is_no_file_is_refused_and_leaves_nothing(refused, tmp_path):
    assert "workload=nowhere" in refused("workload=nowhere", f"out={tmp_path / 'tuned.yaml'}")
    assert list(tmp_path.iterdir()) == []
