"""Load for engines whose processes are killed and stopped at random moments.

Every request is answered once: with the tokens that an undisturbed engine gives, or with a 503 that
says why. Nothing hangs for longer than the engine takes to notice a stall.
"""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import openai
from engine_process import EngineProcess

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

    def check(self) -> None:
        """Call it after the end."""
        assert self.faults == [], self.faults
        # There was load: answers between all moments, although hangs take most of the time.
        assert self.num_right > 2 * NUM_MOMENTS, self.num_right
        assert self.longest_s < LONGEST_ANSWER_S, self.longest_s
        # A strike loses what had moved before: less than half of what the clients wait for.
        assert len(self.refusals) < NUM_MOMENTS * NUM_CLIENTS / 2, len(self.refusals)


def undisturbed(engine: EngineProcess) -> list[list[str]]:
    """The answers that are expected."""
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return list(pool.map(lambda number: ask(engine, number), range(NUM_REQUESTS)))


def states(engine: EngineProcess) -> dict[str, str]:
    """Of the replicas, by number."""
    return json.loads(engine.get("/health")[1] or "{}").get("replicas", {})


def is_whole(engine: EngineProcess, num_replicas: int) -> bool:
    """Whether all replicas serve."""
    is_healthy = engine.get("/health")[0] == 200
    return is_healthy and list(states(engine).values()) == ["ok"] * num_replicas
