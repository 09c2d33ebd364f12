"""Processes of an engine are killed and stopped at random moments, under load.

Every request is answered once: with the tokens that an undisturbed engine gives, or with a 503 that
says why. Nothing hangs for longer than the engine takes to notice a stall.
"""

from __future__ import annotations

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

pytestmark = [pytest.mark.engine, pytest.mark.long]

STALL_S = 4.0
FLAGS = (
    "deterministic=T",
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
            except openai.APIStatusError as error:
                self._note_error(number, error.status_code, str(error))
            except openai.APIError as error:  # an event of a stream
                status = int(getattr(error, "code", None) or 0)
                self._note_error(number, status, str(error))
            else:
                with self._lock:
                    if texts == self.expected[number]:
                        self.num_right += 1
                    else:
                        self.faults.append(f"{options(number)} gave {texts}")
            with self._lock:
                self.longest_s = max(self.longest_s, time.monotonic() - started)

    def _note_error(self, number: int, status: int, text: str) -> None:
        with self._lock:
            if status == 503:
                self.refusals.append(text)
            else:
                self.faults.append(f"{options(number)} gave {status}: {text}")


@pytest.mark.parametrize("grid", ["dp_size=2 pp_size=2", "dp_size=2 tp_size=2"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_every_request_is_answered_once(
    tmp_path: Path, expected: list[list[str]], grid: str, number: signal.Signals
) -> None:
    chance = random.Random(f"{grid} {number}")
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, *grid.split())
    roles = ("manager", "manager-1", "worker", "worker-0-1", "worker-1-0", "worker-1-1")
    try:
        engine.wait_ready()
        load = Load(engine, expected)
        try:
            for moment in range(NUM_MOMENTS):
                time.sleep(chance.uniform(0.0, 3.0))
                pid = engine.child(chance.choice(roles))  # of its last start
                os.kill(pid, number)
                eventually(
                    lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"{moment}: {pid} ends", 60
                )
                if chance.random() < 0.7:  # otherwise the next moment meets the engine as it heals
                    eventually(lambda: is_whole(engine), f"{moment}: the engine heals", 60)
        finally:
            load.end()
        eventually(lambda: is_whole(engine), "the engine heals", 60)
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


def is_whole(engine: EngineProcess) -> bool:
    """Whether both replicas serve."""
    return engine.get("/health")[0] == 200 and engine.metrics().get("replicas") == 2
