"""The turnstile between server and manager: a bounded number of sequences pass, in fair shares.

The manager gets enough to choose from and no more. Further requests wait here, by client; the
client that has been served the fewest tokens comes next.

The manager serves the clients that it knows in fair shares. So a client does not wait here behind
another one: when the manager has enough, requests still pass of a client with less than its share
of what the manager may hold.

Priority comes first. For requests that are more urgent than everything that waits, the manager
takes as many sequences again, however many it holds of the rest.

The order is self-clocked fair queueing (Golestani, INFOCOM 1994). The first request of each client
has an end, counted in tokens: its own tokens after the end of the request that had passed last when
it became the first. The earliest end passes. A client with nothing waiting need not be remembered.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable

from tokasaurus.protocol.messages import AbortRequest, FromServer, GenerateRequest

__all__ = ["Turnstile"]

_FIRST_GUESS = 256.0  # tokens of a sample, before any has ended
_FEW = 64  # clients without requests that may stay in a heap
_NEW_SHARE = 0.02  # weight of the latest request in the average


class Turnstile:
    """Holds requests back and lets them pass.

    Args:
        send: gives a message to the manager.
        max_open: sequences that the manager holds, running or not, before others wait here. A
            request passes as a whole, however many sequences it has. With k clients, a client with
            fewer than ``max_open / k`` of them need not wait.
    """

    def __init__(self, send: Callable[[FromServer], None], max_open: int) -> None:
        self.num_open = 0  # sequences that the manager holds
        self.num_held = 0  # sequences that wait here
        self._send = send
        self._max_open = max_open
        self._open: dict[int, GenerateRequest] = {}  # by request id
        self._num_open: Counter[int] = Counter()  # sequences, by priority
        self._num_of_client: dict[str, Counter[int]] = {}  # the same for each client
        self._held: dict[int, GenerateRequest] = {}  # by request id
        self._levels: dict[int, _Level] = {}  # by priority, those with requests
        self._priorities: list[int] = []  # of the levels, a heap
        self._mean_tokens = _FIRST_GUESS

    def submit(self, request: GenerateRequest) -> None:
        """Sends a request to the manager, now or later."""
        if not self._levels and self.num_open < self._max_open:
            self._pass(request)
            return
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = _Level()
            heapq.heappush(self._priorities, request.priority)
        level.add(request, self._mean_tokens)
        self._held[request.request_id] = request
        self.num_held += request.n
        self._let_pass()
        self._let_client_pass(request.client)

    def abort(self, request_id: int) -> bool:
        """Drops a request; if it has passed, tells the manager.

        Returns:
            Whether it was held here, so that the manager has never heard of it.
        """
        request = self._held.pop(request_id, None)
        if request is None:
            self._send(AbortRequest(request_id))
            return False
        self.num_held -= request.n
        level = self._levels[request.priority]
        level.remove(request)
        if not level.num_requests:
            self._drop_level(request.priority)
        return True

    def take_held(self) -> list[int]:
        """Drops all requests that are held here, and returns their ids."""
        held = [*self._held]
        self._held.clear()
        self._levels.clear()
        self._priorities.clear()
        self.num_held = 0
        return held

    def ended(self, request_id: int, num_tokens: int | None = None) -> None:
        """The manager has finished a request, or will soon, since it was aborted.

        Args:
            request_id: of a request that has passed, or that is not here any more.
            num_tokens: generated for all its samples; None if the number is not typical.
        """
        request = self._open.pop(request_id, None)
        if request is None:
            return
        self.num_open -= request.n
        _subtract(self._num_open, request)
        of_client = self._num_of_client[request.client]
        _subtract(of_client, request)
        if not of_client:
            del self._num_of_client[request.client]
        if num_tokens is not None:
            self._mean_tokens += _NEW_SHARE * (num_tokens / request.n - self._mean_tokens)
        if self._levels:
            self._let_pass()
            self._let_client_pass(request.client)

    def resize(self, max_open: int) -> None:
        """From now on the manager holds this many sequences before others wait here."""
        self._max_open = max_open
        self._let_pass()

    def clear(self) -> None:
        """The manager is gone: forgets everything."""
        self._open.clear()
        self._num_open.clear()
        self._num_of_client.clear()
        self._held.clear()
        self._levels.clear()
        self._priorities.clear()
        self.num_open = self.num_held = 0

    def _let_pass(self) -> None:
        while self._priorities:
            priority = self._priorities[0]
            if _as_urgent(self._num_open, priority) >= self._max_open:
                return  # less urgent requests cannot pass either
            self._release(priority, self._levels[priority].pop(self._mean_tokens))

    def _let_client_pass(self, client: str) -> None:
        """Lets requests of this client pass while it has less than its share in the manager."""
        for priority in sorted(self._priorities):
            level = self._levels[priority]
            while self._is_below_share(client, priority):
                request = level.pop_of(client, self._mean_tokens)
                if request is None:
                    break
                self._release(priority, request)

    def _is_below_share(self, client: str, priority: int) -> bool:
        of_client = self._num_of_client.get(client)
        num_clients = len(self._num_of_client) + (of_client is None)
        num_open = 0 if of_client is None else _as_urgent(of_client, priority)
        return num_open * num_clients < self._max_open

    def _release(self, priority: int, request: GenerateRequest) -> None:
        """Lets a request pass that its level has given up."""
        if not self._levels[priority].num_requests:
            self._drop_level(priority)
        del self._held[request.request_id]
        self.num_held -= request.n
        self._pass(request)

    def _pass(self, request: GenerateRequest) -> None:
        self._open[request.request_id] = request
        self._num_open[request.priority] += request.n
        self._num_of_client.setdefault(request.client, Counter())[request.priority] += request.n
        self.num_open += request.n
        self._send(request)

    def _drop_level(self, priority: int) -> None:
        del self._levels[priority]
        self._priorities.remove(priority)
        heapq.heapify(self._priorities)


def _as_urgent(num_open: Counter[int], priority: int) -> int:
    """Sequences that are at least as urgent as this priority."""
    return sum(count for each, count in num_open.items() if each <= priority)


def _subtract(num_open: Counter[int], request: GenerateRequest) -> None:
    num_open[request.priority] -= request.n
    if not num_open[request.priority]:
        del num_open[request.priority]


class _Client:
    """One client's waiting requests of one priority."""

    __slots__ = ("end", "name", "requests")

    def __init__(self, name: str) -> None:
        self.name = name
        self.end = 0.0  # of the first request, in tokens
        self.requests: OrderedDict[int, GenerateRequest] = OrderedDict()


class _Level:
    """The waiting requests of one priority."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._now = 0.0  # the end of the request that passed last, in tokens
        self._clients: dict[str, _Client] = {}
        # (end of the first request, tie-breaker, client): one for each client, and some that count
        # no more: of clients that have left _clients, and of requests that passed out of turn.
        self._heap: list[tuple[float, int, _Client]] = []
        self._num_pushed = 0

    def add(self, request: GenerateRequest, num_tokens: float) -> None:
        """Adds a request with about this many tokens in each sample."""
        name = request.client
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(name)
            self._push(client, self._now, request, num_tokens)
        client.requests[request.request_id] = request
        self.num_requests += 1

    def pop_of(self, name: str, num_tokens: float) -> GenerateRequest | None:
        """Removes and returns the client's first request, out of turn; None if it has none."""
        client = self._clients.get(name)
        return None if client is None else self._pop_first(client, client.end, num_tokens)

    def remove(self, request: GenerateRequest) -> None:
        client = self._clients[request.client]
        del client.requests[request.request_id]
        self.num_requests -= 1
        if not client.requests:
            self._forget(client)

    def pop(self, num_tokens: float) -> GenerateRequest:
        """Removes and returns the next request; there must be one."""
        while True:
            end, _, client = heapq.heappop(self._heap)
            if client.requests and end == client.end:
                break
        self._now = end
        return self._pop_first(client, end, num_tokens)

    def _pop_first(self, client: _Client, end: float, num_tokens: float) -> GenerateRequest:
        _, request = client.requests.popitem(last=False)
        self.num_requests -= 1
        if client.requests:
            self._push(client, end, next(iter(client.requests.values())), num_tokens)
        else:
            self._forget(client)
        return request

    def _forget(self, client: _Client) -> None:
        del self._clients[client.name]
        if len(self._heap) > 2 * len(self._clients) + _FEW:
            self._heap = [
                entry for entry in self._heap if entry[2].requests and entry[0] == entry[2].end
            ]
            heapq.heapify(self._heap)

    def _push(
        self, client: _Client, start: float, first: GenerateRequest, num_tokens: float
    ) -> None:
        cost = len(first.prompt_ids) + first.n * min(first.max_tokens, num_tokens)
        client.end = start + cost
        self._num_pushed += 1
        heapq.heappush(self._heap, (client.end, self._num_pushed, client))
