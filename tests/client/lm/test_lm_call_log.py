"""The log of calls: where its files are, and what they say."""

from __future__ import annotations

import json
import logging
import re
import threading

import pytest
from pydantic import BaseModel

from tokasaurus.client.lm import call_log
from tokasaurus.client.lm.call_log import (
    CallLog,
    current_context,
    enable_json_logging,
    json_log_context,
)

TIME = r"\d{8}T\d{12}Z"
LOGGER = logging.getLogger("test")


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(call_log, "_base", None)
    enable_json_logging(tmp_path)
    return CallLog("some/model", LOGGER)


PATHS = [
    ({}, r"default/actions/\d{6}_"),
    ({"mode": "train", "call_type": "action"}, r"train/actions/action_\d{6}_"),
    (
        {"mode": "train", "call_type": "reflection", "episode_index": 3, "step_index": 0},
        r"train/reflections/reflection_episode_3_step_0_\d{6}_",
    ),
    ({"mode": "val", "num_seen_episodes": 40}, r"validation/val_40/actions/\d{6}_"),
    ({"mode": "validation"}, r"validation/val_0/actions/\d{6}_"),
    ({"mode": "../..", "call_type": "/etc/x"}, r"_.._?/_etc_xs/_etc_x_\d{6}_"),
]


def test_the_context_names_the_file(log, tmp_path):
    for context, expected in PATHS:
        before = set(tmp_path.rglob("*"))
        with json_log_context(**context):
            log.begin("s", "u")
        (path,) = {each for each in tmp_path.rglob("*.json") if each not in before}
        name = str(path.relative_to(tmp_path))
        assert re.fullmatch(f"{expected}{TIME}\\.json", name), (context, name)


def test_a_file_says_what_went_in_and_what_came_out(log, tmp_path):
    class Schema(BaseModel):
        label: str

    with json_log_context(mode="train", response_schema=Schema):
        number = log.begin("system \ud800", "user")
    (path,) = tmp_path.rglob("*.json")
    begun = json.loads(path.read_text())
    assert set(begun) == {"timestamp", "model", "system_prompt", "user_prompt", "context"}
    assert begun["model"] == "some/model"
    assert begun["user_prompt"] == "user"
    assert begun["context"]["mode"] == "train"
    assert begun["context"]["response_schema"]["properties"] == {
        "label": {"title": "Label", "type": "string"}
    }
    log.end(number, "reply", {"metrics": {"duration": 1.5}})
    ended = json.loads(path.read_text())
    assert ended.pop("output") == "reply"
    assert ended.pop("extra") == {"metrics": {"duration": 1.5}}
    assert re.fullmatch(TIME, ended.pop("timestamp_end"))
    assert ended == begun
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    log.end(number, "again")
    assert json.loads(path.read_text())["output"] == "reply"
    assert not log._open


def test_contexts_nest_and_threads_do_not_see_them():
    with json_log_context(mode="train", step_index=1):
        with json_log_context(step_index=2):
            assert current_context() == {"mode": "train", "step_index": 2}
            seen = []
            thread = threading.Thread(target=lambda: seen.append(current_context()))
            thread.start()
            thread.join()
            assert seen == [{}]
        assert current_context() == {"mode": "train", "step_index": 1}
    assert current_context() == {}


def test_calls_are_below_the_current_directory_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(call_log, "_base", None)
    monkeypatch.chdir(tmp_path)
    CallLog("m", LOGGER).begin("s", "u")
    assert len(list(tmp_path.glob("llm_calls/default/actions/*.json"))) == 1


def test_a_log_that_cannot_be_written_is_an_error_in_the_log(log, tmp_path, caplog):
    (tmp_path / "default").write_text("in the way")
    log.end(log.begin("s", "u"), "reply")
    assert "a call is missing in the log" in caplog.text
