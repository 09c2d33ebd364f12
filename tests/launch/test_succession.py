"""What a new engine may change, and what memory it finds beside the old one."""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.parser import parse_command_line
from tokasaurus.errors import ConfigError
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.keeping import succession
from tokasaurus.launch.keeping.memory import untaken_memory
from tokasaurus.launch.keeping.notes import LANGUAGE, Begin, Standing
from tokasaurus.launch.keeping.service_manager import ServiceManager
from tokasaurus.launch.keeping.succession import check_successor, placed_beside, words_of
from tokasaurus.launch.machine import devices_here

CONFIG = EngineConfig(
    device="cpu", kv_cache_num_tokens=16384, max_tokens_per_forward=256, data_dir="d"
)


def standing(**changes: object) -> Standing:
    fields = {
        "refusal": None,
        "has_new_weights": False,
        "host": "127.0.0.1",
        "data_dir": "d",
        "num_kv_tokens": 16384,
        "max_tokens_per_forward": 256,
        "untaken_bytes": 0,
    }
    return Standing(**{**fields, **changes})


def begin(*added: str) -> Begin:
    return Begin(LANGUAGE, 2, ("port=1", "max_n=3"), added, 0, "")


@pytest.mark.parametrize("overrides", [None, "max_n=4 served_model_name='a b'"])
def test_words_that_a_restart_adds_win(overrides):
    environment = {} if overrides is None else {"OVERRIDES": overrides}
    for added, expected in (((), 3 if overrides is None else 4), (("max_n=5",), 5)):
        config = parse_command_line(*words_of(begin(*added), environment))
        assert config.max_n == expected
        assert config.port == 1
        assert config.served_model_name == (None if overrides is None else "a b")
    words = words_of(begin("served_model_name=it's two"), environment)
    assert parse_command_line(*words).served_model_name == "it's two"
    assert overrides is None or shlex.split(words[1]["OVERRIDES"])[-1].endswith("it's two")


def test_what_a_restart_cannot_change_is_named():
    check_successor(CONFIG, standing(), CONFIG.port)
    rows = [
        ({"port": 1}, {}, "port=1"),
        ({"host": "0.0.0.0"}, {}, "host=0.0.0.0"),
        ({"data_dir": "e"}, {}, "data_dir=e"),
        ({"launcher": "ray"}, {}, "launcher=ray"),
        ({"profile": True}, {}, "profile=F"),
        ({"data_dir": None}, {}, "data_dir=~/.local"),
    ]
    for changes, before, expected in rows:
        config = EngineConfig(**{"device": "cpu", "data_dir": "d", **changes})
        with pytest.raises(ConfigError, match=expected) as caught:
            check_successor(config, standing(**before), CONFIG.port)
        assert "toka" in str(caught.value), expected
    check_successor(
        EngineConfig(port=0), standing(data_dir="~/.local/share/tokasaurus/port-7"), port=7
    )


@pytest.mark.parametrize(
    ("untaken_bytes", "left"), [(19 * 10**9, "1.0 GB"), (21 * 10**9, "0 bytes")]
)
def test_memory_that_the_old_engine_may_still_take_is_not_free_for_the_new_one(
    monkeypatch, untaken_bytes, left
):
    # What is free changes from one look to the next, so here it is a number.
    here = dataclasses.replace(devices_here(CONFIG), memory_bytes=20 * 10**9)
    monkeypatch.setattr(succession, "devices_here", lambda config: here)
    placed_beside(CONFIG, standing())
    config = dataclasses.replace(CONFIG, kv_cache_num_tokens=1 << 24)
    plan = "the running engine has planned with 9 GB"
    with pytest.raises(ConfigError) as caught:
        placed_beside(config, standing(untaken_bytes=untaken_bytes, untaken_plan=plan))
    words = f"(20.0 GB are free; {plan}; so a new one beside it has {left})"
    assert words in str(caught.value)


@pytest.mark.parametrize("flag", ["kv_cache_num_tokens", "max_tokens_per_forward"])
def test_a_smaller_engine_is_accepted_only_if_somebody_asks_for_it(flag):
    before = standing(num_kv_tokens=1 << 30, max_tokens_per_forward=1 << 20)
    for value in (None, "auto") if flag == "kv_cache_num_tokens" else (None,):
        config = EngineConfig(**{**vars(CONFIG), flag: value})
        with pytest.raises(ConfigError, match=f"toka restart {flag}="):
            placed_beside(config, before)
    slices, _ = placed_beside(CONFIG, before)
    assert slices.memory_plan.kv_tokens == 16384


def test_a_process_has_not_taken_what_it_has_not_written():
    slices = assemble(CONFIG)
    planned = sum(item.num_bytes for item in slices.memory_plan.items)
    untaken, text = untaken_memory(slices, [])
    assert untaken == planned
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with_a_process, text = untaken_memory(slices, [process.pid, 1 << 30])
    assert 0 < with_a_process < planned
    assert "the running engine has planned with" in text


def test_systemd_is_told_and_others_are_not(tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(10)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "HOME": "/"}
        manager = ServiceManager(environment)
        assert environment == {"HOME": "/"}
        manager.ready()
        manager.restarting()
        manager.stopping()
        assert told.recv(1000) == b"READY=1"
        first, second = told.recv(1000).decode().split("\n")
        assert first == "RELOADING=1"
        assert int(second.removeprefix("MONOTONIC_USEC=")) > 0
        assert told.recv(1000) == b"STOPPING=1"
    manager.ready()  # nobody listens any more
    ServiceManager({}).ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0toka-test-{os.getpid()}")
        ServiceManager({"NOTIFY_SOCKET": f"@toka-test-{os.getpid()}"}).ready()
        assert told.recv(1000) == b"READY=1"
