"""Random kills and stops of the processes of three replicas under load."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import pytest
from engine_process import EngineProcess, eventually

pytestmark = [pytest.mark.engine, pytest.mark.long]

FLAGS = (
    "dp_size=3",
    "replica_restarts=1000",
    "stall_timeout_s=2",
    "max_seqs_per_forward=8",
    "max_tokens_per_forward=64",
    "kv_cache_num_tokens=8192",
    "cpu_threads=1",
    "deterministic=T",
    "uvicorn_log_level=warning",
)
ROLES = ("manager", "worker", "manager-1", "worker-1-0", "manager-2", "worker-2-0")
PROMPTS = ("A B C D", "Once upon a time", "one two one two one", "7 8 9")
NUM_CLIENTS = 6
NUM_STRIKES = 20
# A request waits for stall_timeout_s, twice if it moves to a replica that hangs as well, and for a
# start where no replica lives.
LONGEST_S = 60


class Client(threading.Thread):
    """Asks again and again, and compares each answer with that of an undisturbed run."""

    def __init__(self, engine: EngineProcess, number: int) -> None:
        super().__init__()
        self._engine = engine
        self._random = random.Random(number)
        self.outcomes: Counter[str] = Counter()
        self.longest_s = 0.0
        self.wrong: list[object] = []
        self.must_end = threading.Event()

    def run(self) -> None:
        while not self.must_end.is_set():
            request = random_request(self._random)
            started = time.monotonic()
            try:
                found = ask(self._engine, **request)
            except openai.APIStatusError as error:
                self.outcomes[f"{error.status_code}"] += 1
                if error.status_code != 503 or "two replicas ended" not in str(error):
                    self.wrong.append(error)
            except openai.APIError as error:  # within a stream
                self.outcomes["error event"] += 1
                if "two replicas ended" not in str(error):
                    self.wrong.append(error)
            else:
                self.outcomes["answered"] += 1
                if found != EXPECTED[tuple(sorted(request.items()))]:
                    self.wrong.append((request, found))
            self.longest_s = max(self.longest_s, time.monotonic() - started)


EXPECTED: dict[tuple, list[str]] = {}


def random_request(chance: random.Random) -> dict[str, object]:
    return {
        "prompt": chance.choice(PROMPTS),
        "n": chance.choice([1, 1, 2, 10]),
        "seed": chance.randrange(3),
        "stream": chance.random() < 0.5,
    }


def ask(engine: EngineProcess, *, n: int, stream: bool, **request: object) -> list[str]:
    """The text of each sample."""
    answer = engine.client(timeout=LONGEST_S).completions.create(
        model="m", n=n, stream=stream, max_tokens=300, extra_body={"ignore_eos": True}, **request
    )
    texts = [""] * n
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    return texts


@pytest.mark.timeout(900)
def test_every_request_is_answered_as_in_an_undisturbed_run(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS)
    chance = random.Random(15)
    clients = [Client(engine, number) for number in range(NUM_CLIENTS)]
    try:
        engine.wait_ready()
        for prompt in PROMPTS:
            for n in (1, 2, 10):
                for seed in range(3):
                    texts = ask(engine, prompt=prompt, n=n, seed=seed, stream=False)
                    for stream in (False, True):
                        request = {"prompt": prompt, "n": n, "seed": seed, "stream": stream}
                        EXPECTED[tuple(sorted(request.items()))] = texts
        for client in clients:
            client.start()
        for _ in range(NUM_STRIKES):
            time.sleep(chance.uniform(0.5, 6))
            number = chance.choice([signal.SIGKILL, signal.SIGSTOP])
            try:
                os.kill(engine.child(chance.choice(ROLES)), number)
            except ProcessLookupError:
                continue  # the replica is on its way back
        eventually(lambda: '"starting"' not in engine.get("/health")[1], "all are back", 60)
    finally:
        for client in clients:
            client.must_end.set()
        for client in clients:
            client.join() if client.ident else None
        outcomes = sum((client.outcomes for client in clients), Counter())
        print(outcomes, max(client.longest_s for client in clients))
        for line in engine.log.splitlines():
            if " server " in line and ("lost" in line or "replica" in line):
                print(line[:200])
        engine.stop()
    assert [wrong for client in clients for wrong in client.wrong] == []
    assert outcomes["answered"] > 50
    assert max(client.longest_s for client in clients) < LONGEST_S
