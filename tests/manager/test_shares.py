"""The places of clients' sequences in the order."""

from __future__ import annotations

from simulation import make_request, prompt

from tokasaurus.manager.order import first_order, priority_of
from tokasaurus.manager.sequence import Request
from tokasaurus.manager.shares import Shares
from tokasaurus.manager.waiting import Backlog


class Clients:
    """Requests of several clients, and what runs as far as the test says."""

    def __init__(self) -> None:
        self.present: int | None = None
        self.usual = 100.0  # tokens of a sequence without a limit
        self.shares = Shares(
            lambda priority: self.present, lambda max_tokens: min(max_tokens, self.usual)
        )
        self.backlog = Backlog(4, self.shares)
        self.num_requests = 0

    def ask(self, client: str, *, n: int = 1, max_tokens: int = 10, priority: int = 0) -> Request:
        self.num_requests += 1
        message = make_request(
            self.num_requests, prompt(5), max_tokens, n=n, client=client, priority=priority
        )
        self.shares.pass_step()
        return self.backlog.add(message, 0.0)

    def end(self, request: Request) -> None:
        for sequence in list(request.sequences.values()):
            self.backlog.end(sequence)

    def order(self) -> str:
        """The clients of all sequences, in order."""
        requests = self.backlog.requests.values()
        sequences = [each for request in requests for each in request.sequences.values()]
        sequences.sort(key=lambda each: each.order)
        return "".join(each.request.message.client for each in sequences)


def times(request: Request) -> list[int]:
    """Tokens of work before each sample, after the first sequence of the first client."""
    start = first_order(request.message.priority) + (1 << 30)
    return [sequence.order - start for sequence in request.sequences.values()]


def test_a_client_alone_is_served_in_the_order_of_arrival() -> None:
    clients = Clients()
    requests = [clients.ask("a", n=n, max_tokens=limit) for n, limit in ((2, 10), (1, 500), (3, 1))]
    assert [times(request) for request in requests] == [[0, 15], [25], [130, 136, 137]]


def test_a_new_client_comes_at_the_present_and_then_by_its_work() -> None:
    clients = Clients()
    clients.ask("a", n=8, max_tokens=20)  # at 0, 25, 45, 65, 85, ...
    clients.present = (1 << 30) + 50
    assert times(clients.ask("b", n=3, max_tokens=5)) == [50, 60, 65 + 1]  # 65 is taken
    assert clients.order() == "aaabbabaaaa"
    assert times(clients.ask("b")) == [70]


def test_priorities_have_clients_of_their_own() -> None:
    clients = Clients()
    clients.ask("a", n=100)
    low = clients.ask("a", priority=1)
    assert times(low) == [0]
    assert clients.shares.num_clients(0) == clients.shares.num_clients(1) == 1
    assert priority_of(low.sequences[0].order) == priority_of(first_order(1))


def test_clients_without_sequences_are_forgotten() -> None:
    clients = Clients()
    for number in range(50):
        clients.end(clients.ask(str(number)))
        assert clients.ask("x").client < 3
    assert clients.shares.num_numbers == 2
    for request in list(clients.backlog.requests.values()):
        clients.end(request)
    assert clients.shares.num_sequences == 0
    assert not clients.shares._levels


def test_places_are_given_anew_when_predictions_change() -> None:
    clients = Clients()
    clients.ask("a", n=4, max_tokens=10**6)  # 100 tokens each
    clients.present = 1 << 30
    assert not clients.shares.outdated()
    clients.usual = 10.0
    assert not clients.shares.outdated()  # one client: the order is that of arrival
    small = clients.ask("b", n=4, max_tokens=10)
    assert clients.order() == "abbbbaaa"
    assert clients.shares.outdated() == [0]
    clients.backlog.review_places()
    assert clients.order() in ("abababab", "babababa")
    assert times(small)[0] in (0, 1)
    assert not clients.shares.outdated()


def test_a_sequence_becomes_the_head() -> None:
    clients = Clients()
    requests = [clients.ask("a") for _ in range(4)]
    last = requests[-1].sequences[0]
    assert clients.backlog.move_to_head(last)
    assert clients.backlog.head() is last
    assert clients.backlog.move_to_head(last)
    queue = [sequence.request for sequence in clients.backlog.in_order()]
    assert queue == [requests[3], *requests[:3]]
