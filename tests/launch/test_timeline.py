"""The timeline of a real engine's first batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_process import eventually, running

pytestmark = [pytest.mark.engine, pytest.mark.processes]


def test_a_profile_shows_turns_queue_and_batches_of_the_first_batches(tmp_path: Path):
    path = tmp_path / "data" / "profile.json"

    def events(phase, lane):
        trace = json.loads(path.read_text().rstrip(",\n") + "]")
        return [each for each in trace if each["ph"] == phase and each.get("cat") == lane]

    with running(tmp_path, "profile=T", "profile_num_batches=20") as engine:
        engine.client().completions.create(
            model="m", prompt="A B C D", max_tokens=60, extra_body={"ignore_eos": True}
        )
        eventually(lambda: len(events("X", "device")) == 20 <= len(events("b", "queue")), "batches")
        sent = {each["id"]: each["ts"] for each in events("b", "queue")}
        begun = {each["id"]: each["ts"] for each in events("e", "queue")}
        batches = events("X", "device")
        turns = events("X", "manager")
    assert list(begun) == list(range(20))
    assert all(sent[number] <= begun[number] for number in begun)
    assert [each["name"] for each in batches] == [f"batch {number}" for number in range(20)]
    assert all(each["ts"] == begun[number] for number, each in enumerate(batches))
    assert {number for each in turns for number in each["args"]["batches"]} == set(sent)
