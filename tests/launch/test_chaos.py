"""Processes of an engine are killed and stopped at random moments, under load.

Every request is answered once: with the tokens that an undisturbed engine gives, or with a 503 that
says why. Nothing hangs for longer than the engine takes to notice a stall.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from engine_process import EngineProcess, eventually, running

from tokasaurus.protocol.role import Role

pytestmark = [pytest.mark.engine, pytest.mark.long]

STALL_S = 4.0
FLAGS = (
    "deterministic=T",
    "replica_restarts=1000",
    "cpu_threads=1",
    "kv_cache_num_tokens=16384",
    "max_seqs_per_forward=32",
    f"stall_timeout_s={STALL_S}",
    "uvicorn_log_level=warning",
)
PROMPTS = ("A B C D", "one two one two", "The quick brown fox", "7 8 9", "x y z x y")
NUM_REQUESTS = 40  # that differ
NUM_CLIENTS = 10
NUM_MOMENTS = 20
# A request moves once. The second replica may be stopped as well before it has answered.
LONGEST_ANSWER_S = 60.0


def options(number: int) -> dict:
    return {
        "model": "m",
        "prompt": PROMPTS[number % len(PROMPTS)],
        "max_tokens": 40 + 7 * (number % 23),
        "n": 1 + number % 3,
        "temperature": (0.0, 0.9)[number % 2],
        "seed": number,
        "extra_body": {"ignore_eos": True},
    }


def ask(engine: EngineProcess, number: int) -> list[str]:
    """The texts of a request, of which every third streams."""
    client = engine.client(timeout=LONGEST_ANSWER_S)
    if number % 3:
        return [each.text for each in client.completions.create(**options(number)).choices]
    texts = [""] * options(number)["n"]
    for event in client.completions.create(stream=True, **options(number)):
        for choice in event.choices:
            texts[choice.index] += choice.text
    return texts


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[str]]]:
    with (
        running(tmp_path_factory.mktemp("one"), *FLAGS) as engine,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        yield list(pool.map(lambda number: ask(engine, number), range(NUM_REQUESTS)))


@dataclass
class Load:
    """Clients that ask without a pause, and compare.

    Attributes:
        num_right: answers as expected.
        refusals: messages of 503.
        faults: anything else.
    """

    engine: EngineProcess
    expected: list[list[str]]
    num_right: int = 0
    refusals: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(client,)) for client in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client: int) -> None:
        chance = random.Random(client)
        while not self._ending.is_set():
            number, started = chance.randrange(NUM_REQUESTS), time.monotonic()
            try:
                texts = ask(self.engine, number)
            except openai.APIError as error:  # with a status, or within a stream
                self._note_error(number, error)
            else:
                with self._lock:
                    if texts == self.expected[number]:
                        self.num_right += 1
                    else:
                        self.faults.append(f"{options(number)} gave {texts}")
            with self._lock:
                self.longest_s = max(self.longest_s, time.monotonic() - started)

    def _note_error(self, number: int, error: openai.APIError) -> None:
        status = getattr(error, "status_code", 503)
        with self._lock:
            if status == 503 and "two replicas ended while they had this request" in str(error):
                self.refusals.append(str(error))
            else:
                self.faults.append(f"{options(number)} gave {status}: {error}")


# Replicas, stages and ranks of a stage.
@pytest.mark.parametrize("grid", [(3, 1, 1), (2, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.timeout(900)
def test_every_request_is_answered_once(
    tmp_path: Path, expected: list[list[str]], grid: tuple[int, int, int], number: signal.Signals
) -> None:
    dp, pp, tp = grid
    chance = random.Random(f"{grid} {number}")
    flags = (f"dp_size={dp}", f"pp_size={pp}", f"tp_size={tp}")
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, *flags)
    roles = [Role("manager", replica) for replica in range(dp)]
    roles += [Role("worker", replica, rank) for replica in range(dp) for rank in range(pp * tp)]
    try:
        engine.wait_ready()
        load = Load(engine, expected)
        try:
            for moment in range(NUM_MOMENTS):
                time.sleep(chance.uniform(0.0, 3.0))
                role = chance.choice(roles)
                # One that starts is spared: after two starts in vain it would be given up.
                what = f"{moment}: replica {role.replica} is back"
                eventually(lambda role=role: strike(engine, role, number), what, 90)
                if chance.random() < 0.7:  # otherwise the next moment meets the engine as it heals
                    eventually(lambda: is_whole(engine, dp), f"{moment}: the engine heals", 90)
        finally:
            load.end()
        eventually(lambda: is_whole(engine, dp), "the engine heals", 90)
        assert load.faults == []
        assert load.num_right > 5 * NUM_MOMENTS
        assert load.longest_s < LONGEST_ANSWER_S
        # What runs on both replicas at a moment moves; little is lost twice.
        assert len(load.refusals) < load.num_right / 4
        assert ask(engine, 1) == expected[1]
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit(30) == 0
        assert list(engine.private.iterdir()) == []
    finally:
        engine.stop()


def states(engine: EngineProcess) -> dict[str, str]:
    """Of the replicas, by number."""
    return json.loads(engine.get("/health")[1] or "{}").get("replicas", {})


def strike(engine: EngineProcess, role: Role, number: signal.Signals) -> bool:
    """Sends a signal to a process of a replica that serves. Returns whether there was one."""
    try:
        if states(engine).get(str(role.replica)) == "ok":
            os.kill(engine.child(str(role)), number)
            return True
    except ProcessLookupError:  # it has just ended
        pass
    return False


def is_whole(engine: EngineProcess, num_replicas: int) -> bool:
    """Whether all replicas serve."""
    is_healthy = engine.get("/health")[0] == 200
    return is_healthy and list(states(engine).values()) == ["ok"] * num_replicas
