"""Fair shares: which requests pass the turnstile to the manager, and when."""

from __future__ import annotations

import random
import weakref
from collections import Counter

import numpy as np
from rows import each_row

from tokasaurus.protocol.messages import AbortRequest, GenerateRequest, LogprobsMode, Sampling
from tokasaurus.text.turnstile import Turnstile

SAMPLING = Sampling(1.0, 0, 1.0, 0.0, LogprobsMode.RAW)


class Manager:
    """The requests that have passed, in order, and those that still run."""

    def __init__(self, max_open):
        self.turnstile = Turnstile(self.take, max_open)
        self.passed: list[GenerateRequest] = []
        self.aborted: list[int] = []
        self.running: dict[int, GenerateRequest] = {}
        self.num_made = 0
        self.clients: dict[int, str] = {}

    def take(self, message):
        if isinstance(message, AbortRequest):
            self.aborted.append(message.request_id)
            return
        assert message.request_id not in self.running
        self.passed.append(message)
        self.running[message.request_id] = message

    def submit(self, client, *, n=1, max_tokens=10, prompt=10, priority=0):
        request = GenerateRequest(
            request_id=self.num_made,
            prompt_ids=np.zeros(prompt, np.int32),
            n=n,
            max_tokens=max_tokens,
            sampling=SAMPLING,
            seed=0,
            stop_token_ids=(),
            priority=priority,
            client=client,
        )
        self.num_made += 1
        self.clients[request.request_id] = client
        self.turnstile.submit(request)
        return request.request_id

    def end(self, request_id=None):
        if request_id is None:
            request_id = next(iter(self.running))
        del self.running[request_id]
        self.turnstile.ended(request_id)

    def order(self):
        """The clients of the requests, in the order in which these passed."""
        return "".join(self.clients[request.request_id] for request in self.passed)


def test_requests_pass_at_once_while_there_is_room():
    manager = Manager(8)
    for number in range(8):
        manager.submit("ab"[number % 2])
    assert manager.order() == "abababab"
    manager.submit("a")
    assert len(manager.passed) == 8
    assert (manager.turnstile.num_open, manager.turnstile.num_held) == (8, 1)
    manager.end()
    assert len(manager.passed) == 9


def test_one_client_alone_keeps_the_manager_full_and_in_order():
    """The manager stays full while requests are held."""
    manager = Manager(16)
    for _ in range(500):
        manager.submit("a")
    while manager.turnstile.num_held:
        assert len(manager.running) == 16
        manager.end(random.Random(len(manager.passed)).choice(list(manager.running)))
    assert [request.request_id for request in manager.passed] == list(range(500))


def test_a_newcomer_passes_at_once_up_to_its_share():
    """With k clients, the k-th may have a k-th of what the manager takes, beyond the limit."""
    manager = Manager(12)
    for _ in range(1000):
        manager.submit("a")
    for client in "bcd":
        for _ in range(100):
            manager.submit(client)
    assert manager.order() == "a" * 12 + "b" * 6 + "c" * 4 + "d" * 3
    manager.end(next(i for i in manager.running if manager.clients[i] == "a"))
    assert len(manager.passed) == 12 + 6 + 4 + 3  # there is enough
    for _ in range(2):
        manager.end(next(i for i in manager.running if manager.clients[i] == "d"))
    assert manager.order()[-2:] == "dd"  # still less than a quarter


def test_a_less_urgent_crowd_of_the_same_client_does_not_count():
    manager = Manager(8)
    for _ in range(20):
        manager.submit("b", priority=1)
        manager.submit("a")
    before = Counter(manager.order())
    manager.submit("b")
    assert Counter(manager.order()) - before == {"b": 1}


def test_shares_are_counted_in_tokens_not_in_requests():
    manager = Manager(4)
    for _ in range(400):
        manager.submit("a", n=4, max_tokens=50, prompt=100)  # 300 tokens
        manager.submit("b", max_tokens=50, prompt=50)  # 100 tokens
        manager.submit("c", max_tokens=10, prompt=20)  # 30 tokens
    tokens: Counter[str] = Counter()
    while len(manager.passed) < 300:  # a manager that serves its clients fairly
        request = min(manager.running.values(), key=lambda request: tokens[request.client])
        tokens[request.client] += len(request.prompt_ids) + request.n * request.max_tokens
        manager.end(request.request_id)
    assert max(tokens.values()) - min(tokens.values()) < 700  # two of the largest requests


def test_a_client_gets_no_credit_for_time_without_requests():
    manager = Manager(1)
    for _ in range(100):
        manager.submit("a")
    for _ in range(50):
        manager.end()
    for _ in range(20):
        manager.submit("b")
    before = len(manager.passed)
    for _ in range(20):
        manager.end()
    assert Counter(manager.order()[before:]) == {"a": 10, "b": 10}


def test_a_more_urgent_level_does_not_wait_for_the_others():
    manager = Manager(8)
    for _ in range(100):
        manager.submit("a", priority=1000)
    assert len(manager.passed) == 8
    for _ in range(10):
        manager.submit("b")
    assert manager.order() == "a" * 8 + "b" * 8  # as many again, at once
    manager.end(next(i for i in manager.running if manager.clients[i] == "a"))
    assert manager.order()[16:] == ""  # sixteen are enough
    for _ in range(3):
        manager.end(next(i for i in manager.running if manager.clients[i] == "b"))
    assert manager.order()[16:] == "bb"
    while manager.running:
        manager.end()
    assert Counter(manager.order()) == {"a": 100, "b": 10}


def test_a_held_request_is_aborted_without_the_manager():
    manager = Manager(2)
    ids = [manager.submit("a") for _ in range(5)]
    for request_id in (ids[3], ids[0]):
        manager.turnstile.abort(request_id)
        manager.turnstile.ended(request_id)
    assert manager.aborted == [ids[0]]  # the manager has not received the other one
    assert [request.request_id for request in manager.passed] == ids[:3]
    manager.turnstile.abort(ids[4])
    manager.turnstile.ended(ids[4])
    assert (manager.turnstile.num_open, manager.turnstile.num_held) == (2, 0)
    assert not manager.turnstile._levels


def test_a_request_larger_than_the_bound_passes_as_a_whole():
    manager = Manager(4)
    manager.submit("a", n=100)
    manager.submit("a")
    assert manager.order() == "a"
    manager.end()
    assert manager.order() == "aa"


@each_row("seed", range(20))
def test_every_request_passes_once_and_nothing_is_left(seed):
    rng = random.Random(seed)
    manager = Manager(rng.randint(1, 30))
    waiting: set[int] = set()
    aborted = set()
    for step in range(600):
        what = rng.random()
        if what < 0.5 and step < 400:
            client = str(rng.randrange(200) if rng.random() < 0.5 else 0)
            size = {"n": rng.randint(1, 4), "max_tokens": rng.randint(1, 99)}
            waiting.add(manager.submit(client, **size, priority=rng.choice((-1, 0, 0, 0, 5))))
        elif what < 0.6 and waiting - aborted:
            request_id = rng.choice(sorted(waiting - aborted))
            if request_id in manager.running or request_id not in {
                request.request_id for request in manager.passed
            }:
                aborted.add(request_id)
                manager.running.pop(request_id, None)
                manager.turnstile.abort(request_id)
                manager.turnstile.ended(request_id)
        elif manager.running:
            manager.end(rng.choice(list(manager.running)))
    while manager.running:
        manager.end()
    passed = [request.request_id for request in manager.passed]
    assert len(passed) == len(set(passed))
    assert set(passed) | aborted == waiting
    turnstile = manager.turnstile
    assert (turnstile.num_open, turnstile.num_held) == (0, 0)
    for table in ("_open", "_num_open", "_num_of_client", "_held", "_levels", "_priorities"):
        assert not getattr(turnstile, table)


def test_clients_without_requests_are_forgotten():
    manager = Manager(1)
    for _ in range(500):
        manager.submit("a")
    for number in range(300):
        manager.submit(f"c{number}")
        manager.end()
    (level,) = manager.turnstile._levels.values()
    assert len(level._clients) < 100


def test_an_open_request_costs_what_others_turn_out_to_need():
    """A client does not pay for a large max_tokens which samples do not reach."""
    manager = Manager(1)
    turnstile = manager.turnstile
    for _ in range(300):  # samples have about 10 tokens
        turnstile.ended(manager.submit("x"), 10)
        manager.running.clear()
    before = len(manager.passed)
    manager.submit("x")
    for _ in range(50):
        manager.submit("a", max_tokens=4000)
        manager.submit("b", max_tokens=12)
    for _ in range(40):
        manager.end()
    counts = Counter(manager.order()[before + 1 :])
    assert abs(counts["a"] - counts["b"]) <= 4


class Name(str):
    """A string that supports weak references."""


def test_names_of_clients_without_requests_are_released():
    manager = Manager(1)
    manager.submit("a")
    manager.submit("a")  # so that the level stays
    names = []
    for number in range(1000):
        name = Name(f"client {number}")
        names.append(weakref.ref(name))
        passes, waits = manager.submit(name), manager.submit(name)
        assert manager.running.keys() >= {passes}
        assert waits not in manager.running
        manager.turnstile.abort(waits)
        manager.turnstile.ended(passes)
        manager.running.clear()
        manager.passed.clear()
        manager.clients.clear()
    del name
    assert sum(each() is not None for each in names) < 100
