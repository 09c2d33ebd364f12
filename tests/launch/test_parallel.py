"""Engines of several devices give what one device gives, drain, and stop clean."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from engine_process import EngineProcess, eventually, running
from text_cartridges import save_cartridge

from tokasaurus.demo import MODEL_DIR

pytestmark = [pytest.mark.engine, pytest.mark.processes]

FLAGS = ("cpu_threads=1", "kv_cache_num_tokens=16384", "max_seqs_per_forward=64", "log_level=INFO")
PROMPTS = ("A B C D", "one two one two", "The quick brown fox", "7 8 9", "x y z x y")

# dp, pp and tp. The default run has the first ones, which have each kind of parallelism.
FEW = ((2, 2, 1), (1, 1, 2))
ALL = (*itertools.product((1, 2), repeat=3), (1, 3, 1))
GRIDS = [
    *FEW,
    *(pytest.param(*each, marks=pytest.mark.long) for each in ALL if each not in (*FEW, (1, 1, 1))),
]


def ask(engine: EngineProcess, cartridge: Path) -> list[tuple[list[str], list[float]]]:
    """Tokens and logprobs of every sample, of several requests at a time.

    One of three is behind a cartridge.
    """
    behind = {"cartridges": [{"id": str(cartridge), "source": "local"}]}

    def one(number: int) -> list[tuple[list[str], list[float]]]:
        answer = engine.client(timeout=120).completions.create(
            model="m",
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=30 + number,
            n=1 + number % 4,
            temperature=0.0 if number % 2 else 0.8,
            seed=number,
            logprobs=0,
            extra_body={"ignore_eos": True, **(behind if number % 3 == 0 else {})},
        )
        return [
            (choice.logprobs.tokens, choice.logprobs.token_logprobs) for choice in answer.choices
        ]

    with ThreadPoolExecutor(12) as pool:
        return [each for answer in pool.map(one, range(24)) for each in answer]


@pytest.fixture(scope="module")
def cartridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The KV cache of a text whose tokens fill no whole number of pages."""
    path = tmp_path_factory.mktemp("cartridge") / "text.safetensors"
    return save_cartridge(MODEL_DIR, list(range(40, 77)), path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, cartridge: Path) -> Iterator[list]:
    flags = (*FLAGS, f"cartridge_roots={cartridge.parent}")
    with running(tmp_path_factory.mktemp("one"), *flags) as engine:
        yield ask(engine, cartridge)


@pytest.mark.parametrize(("dp", "pp", "tp"), GRIDS)
def test_several_devices_give_what_one_gives(
    tmp_path: Path, expected: list, cartridge: Path, dp: int, pp: int, tp: int
) -> None:
    grid = (f"dp_size={dp}", f"pp_size={pp}", f"tp_size={tp}")
    flags = (*FLAGS, *grid, f"cartridge_roots={cartridge.parent}")
    engine = EngineProcess(tmp_path / "toka.log", *flags)
    try:
        engine.wait_ready()
        found = ask(engine, cartridge)
        for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(
            found, expected, strict=True
        ):
            assert tokens == expected_tokens
            if tp == 1:  # replicas and stages change no sum
                assert logprobs == expected_logprobs
            else:
                np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
        drains_and_stops_clean(engine)
        for role in roles(dp, pp * tp):
            assert engine.child(role) > 0
    finally:
        engine.stop()


def roles(num_replicas: int, num_ranks: int) -> Iterator[str]:
    for replica, rank in itertools.product(range(num_replicas), range(num_ranks)):
        yield f"worker-{replica}-{rank}" if replica or rank else "worker"


def drains_and_stops_clean(engine: EngineProcess) -> None:
    """A stream that runs ends by itself after SIGTERM, and nothing is left behind."""
    pids = [
        int(line.rsplit("process id", 1)[1])
        for line in engine.log.splitlines()
        if "process id" in line
    ]
    stream = engine.client(timeout=120).completions.create(
        model="m", prompt="A B C D", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    num_events = 1
    next(iter(stream))
    engine.signal(signal.SIGTERM)
    num_events += sum(1 for _ in stream)
    assert num_events > 2
    assert engine.wait_exit() == 0
    assert list(engine.private.iterdir()) == []
    for pid in pids:
        eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"process {pid} ends")


def test_a_rank_that_dies_ends_an_engine_of_one_replica(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, "pp_size=2")
    try:
        engine.wait_ready()
        os.kill(engine.child("worker-0-1"), signal.SIGKILL)
        assert engine.wait_exit() == 1
        # The cause is named, not the loss that the other rank sees.
        assert "toka: the worker-0-1 ended: killed by SIGKILL" in engine.log
        assert list(engine.private.iterdir()) == []
    finally:
        engine.stop()
