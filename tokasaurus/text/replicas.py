"""The router between the turnstile and the managers of several replicas.

It looks like one manager to the text core. Requests go to replicas, answers come back merged, and
when a replica is lost, its samples go on elsewhere with the tokens that the server has of them.
Samples that were to be aborted end instead: the router sends the last rows that the replica owes.

Which replica gets a request:

- the one with most free seats, where a seat is a sequence that can run;
- but the one that had the last prompt with the same first ``_PREFIX_TOKENS`` tokens, which may be
  in its prefix cache, if it has room and is not much fuller than the others;
- if the samples exceed the free seats of that one, each takes what it has seats for. Samples stay
  together if they would wait in any case and could run together, since they share their prompt.

The samples of a request that are at one replica are a *part*. A manager knows it by an id of its
own, the request's id with the number of the part in its upper bits. So a replica may get several
parts of one request, one after the other. Where a request has several parts, ends are counted for
``first_k`` here. The draws of a sample do not depend on where it runs.

An engine with one replica has no router.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import numpy as np

from tokasaurus.protocol.arrays import EMPTY_FLOAT32, EMPTY_INT32, Int32Array
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    aborts_all,
)
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    Eta,
    FinishReason,
    FromServer,
    GenerateRequest,
    Ping,
    PooledState,
    Progress,
    PromptLogprobs,
    RequestRejected,
    SequenceUpdates,
    Statistics,
    StopSequence,
    ToServer,
)
from tokasaurus.text.generation import Generation

__all__ = ["Find", "Replicas"]

Find: TypeAlias = Callable[[int], Generation | None]
"""Finds the generation in flight with a request id."""

_PART_SHIFT = 40
_REQUEST_MASK = (1 << _PART_SHIFT) - 1
_PREFIX_TOKENS = 128
_MAX_PREFIXES = 4096  # that are remembered
_UNEVEN_SHARE = 4  # a replica with a known prefix may have a quarter of its seats fewer free
_STATE_FIELDS = (
    "num_waiting",
    "num_running",
    "num_pages",
    "num_free_pages",
    "num_evictable_pages",
    "step_s",
    "weights_version",
    "paused",
)
# What is not summed over the replicas: of the slowest, of the newest, and whether any is paused.
_SHARED_FIELDS = ("step_s", "weights_version", "paused")


@dataclass(eq=False, slots=True)
class _Replica:
    number: int
    send: Callable[[FromServer], None]
    num_seats: int
    num_open: int = 0  # samples that it has and that have not ended
    backlog_s: float = 0.0  # its last prediction
    is_stalled: bool = False  # so that it gets nothing as long as another is not

    @property
    def room(self) -> int:
        """Free seats; less than 0 if samples wait there."""
        return self.num_seats - self.num_open


@dataclass(eq=False, slots=True)
class _Part:
    """Samples of a request that are at one replica, and have not ended."""

    part_id: int
    replica: _Replica
    samples: set[int]
    eta_s: float = 0.0  # its last prediction


@dataclass(eq=False, slots=True)
class _Route:
    """Where a request is."""

    request: GenerateRequest
    parts: dict[int, _Part] = field(default_factory=dict)  # by part id
    num_parts: int = 0  # made so far
    num_finished: int = 0  # samples that ended by themselves
    is_split: bool = False  # so that ends are counted here
    # Its replicas were told to end its samples, and will send the last row of each.
    is_aborted: bool = False

    @property
    def has_enough(self) -> bool:
        """Whether ``first_k`` samples have ended by themselves."""
        return 0 < self.request.first_k <= self.num_finished


@dataclass(eq=False, slots=True)
class _Broadcast:
    """The answers to a command that was sent to every replica."""

    awaited: set[int]  # replicas
    answers: dict[int, CommandDone | CommandFailed] = field(default_factory=dict)  # by replica


class Replicas:
    """Several managers as one.

    Args:
        senders: give a message to the manager of each replica; they must not block.
        num_seats: the sequences that each can run at once.
    """

    def __init__(
        self, senders: Sequence[Callable[[FromServer], None]], num_seats: Sequence[int]
    ) -> None:
        self._replicas = {
            number: _Replica(number, send, seats)
            for number, (send, seats) in enumerate(zip(senders, num_seats, strict=True))
        }
        self._routes: dict[int, _Route] = {}  # by request id
        self._broadcasts: dict[int, _Broadcast] = {}  # by command id
        # By the bytes of a prompt's first ids: the number of the replica that had it last.
        self._prefixes: OrderedDict[bytes, int] = OrderedDict()
        self._statistics: dict[int, Statistics] = {}  # the latest, of lost replicas as well

    @property
    def num_seats(self) -> int:
        """The sequences that can run at once."""
        return sum(replica.num_seats for replica in self._choice())

    @property
    def num_stuck(self) -> int:
        """The samples at stalled replicas, while others go on."""
        choice = self._choice()
        return sum(each.num_open for each in self._replicas.values() if each not in choice)

    def is_awaited(self, replica: int) -> bool:
        """Whether a replica has something that it must answer sooner or later."""
        its = self._replicas.get(replica)
        return its is not None and (
            its.num_open > 0 or any(replica in each.awaited for each in self._broadcasts.values())
        )

    def set_stalled(self, stalled: Collection[int]) -> None:
        """These replicas make no progress: the others get all further requests, if there are any.

        What the stalled ones have stays there.
        """
        for replica in self._replicas.values():
            replica.is_stalled = replica.number in stalled

    def _choice(self) -> list[_Replica]:
        """The replicas that get requests."""
        replicas = list(self._replicas.values())
        return [replica for replica in replicas if not replica.is_stalled] or replicas

    # --- from the text core -----------------------------------------------------------------------

    def send(self, message: FromServer) -> None:
        """Passes a message on to the replicas that it concerns."""
        if isinstance(message, Acknowledge):
            self._acknowledge(message)
        elif isinstance(message, GenerateRequest):
            route = self._routes[message.request_id] = _Route(message)
            self._place(route, range(message.n), {})
        elif isinstance(message, StopSequence):
            part = self._part_of(message.request_id, message.sample_index)
            if part is not None:
                part.replica.send(StopSequence(part.part_id, message.sample_index))
        elif isinstance(message, AbortRequest):
            route_or_none = self._routes.get(message.request_id)
            if route_or_none is not None:
                self._abort_parts(route_or_none)
        elif isinstance(message, Ping):
            for replica in self._replicas.values():
                replica.send(message)
        else:
            self._broadcast(message)

    def _acknowledge(self, message: Acknowledge) -> None:
        rows: dict[_Replica, list[tuple[int, int, int]]] = {}
        for request_id, index, count in zip(
            message.request_ids.tolist(),
            message.sample_indices.tolist(),
            message.num_tokens.tolist(),
            strict=True,
        ):
            part = self._part_of(request_id, index)
            if part is not None:
                rows.setdefault(part.replica, []).append((part.part_id, index, count))
        for replica, columns in rows.items():
            part_ids, indices, counts = zip(*columns, strict=True)
            replica.send(Acknowledge(np.array(part_ids, np.int64), _int32(indices), _int32(counts)))

    def _part_of(self, request_id: int, sample_index: int) -> _Part | None:
        route = self._routes.get(request_id)
        parts = () if route is None else route.parts.values()
        return next((part for part in parts if sample_index in part.samples), None)

    def _broadcast(self, command: Command) -> None:
        self._broadcasts[command.command_id] = _Broadcast(set(self._replicas))
        if aborts_all(command.action):
            for route in self._routes.values():
                route.is_aborted = True
        for replica in self._replicas.values():
            replica.send(command)

    def _abort_parts(self, route: _Route) -> None:
        route.is_aborted = True
        for part in route.parts.values():
            part.replica.send(AbortRequest(part.part_id))

    def _free_seats(self, route: _Route) -> None:
        for part in route.parts.values():
            part.replica.num_open -= len(part.samples)

    # --- choosing replicas ------------------------------------------------------------------------

    def _place(
        self, route: _Route, indices: Sequence[int], generated: dict[int, list[int]]
    ) -> None:
        """Sends samples to replicas, with the tokens that they have."""
        shares = self._shares(route.request, len(indices))
        route.is_split |= len(shares) > 1
        start = 0
        for replica, count in shares:
            self._send_part(route, replica, indices[start : start + count], generated)
            start += count

    def _send_part(
        self,
        route: _Route,
        replica: _Replica,
        indices: Sequence[int],
        generated: dict[int, list[int]],
    ) -> None:
        request, number = route.request, route.num_parts
        part_id = request.request_id | number << _PART_SHIFT
        route.num_parts += 1
        route.parts[part_id] = _Part(part_id, replica, set(indices))
        replica.num_open += len(indices)
        if number or len(indices) < request.n:
            request = msgspec.structs.replace(
                request,
                request_id=part_id,
                first_k=0 if route.is_split else request.first_k,
                progress=_progress(indices, generated, route.num_finished),
            )
        replica.send(request)

    def _shares(self, request: GenerateRequest, num_samples: int) -> list[tuple[_Replica, int]]:
        """How many samples each replica gets, without those that get none."""
        best = self._best(request, num_samples)
        rooms = {replica: max(0, replica.room) for replica in self._choice()}
        must_wait = sum(rooms.values()) < num_samples <= best.num_seats
        if num_samples <= best.room or must_wait or not _may_be_split(request):
            return [(best, num_samples)]
        shares, left = dict.fromkeys(rooms, 0), num_samples
        for replica in sorted(rooms, key=lambda replica: -rooms[replica]):
            shares[replica] = min(left, rooms[replica])
            left -= shares[replica]
        each, more = divmod(left, len(shares))
        for index, replica in enumerate(shares):
            shares[replica] += each + (index < more)
        return [(replica, count) for replica, count in shares.items() if count]

    def _best(self, request: GenerateRequest, num_samples: int) -> _Replica:
        """The replica for a request that is not split."""
        choice = self._choice()
        emptiest = max(choice, key=lambda replica: replica.room)
        if len(request.prompt_ids) < _PREFIX_TOKENS:
            return emptiest
        prefix = request.prompt_ids[:_PREFIX_TOKENS].tobytes()
        best = self._replicas.get(self._prefixes.pop(prefix, emptiest.number), emptiest)
        is_fuller = emptiest.room - best.room > best.num_seats // _UNEVEN_SHARE
        if is_fuller or best.room < num_samples or best not in choice:
            best = emptiest
        self._prefixes[prefix] = best.number
        if len(self._prefixes) > _MAX_PREFIXES:
            self._prefixes.popitem(last=False)
        return best

    # --- from the managers ------------------------------------------------------------------------

    def absorb(self, replica: int, message: ToServer) -> list[ToServer]:
        """Takes a message of a replica; returns what it says to the text core, if anything."""
        sender = self._replicas.get(replica)
        if sender is None:  # lost: what it says belongs to samples that go on elsewhere
            return []
        if isinstance(message, SequenceUpdates):
            return [self._absorb_updates(message)]
        if isinstance(message, (PromptLogprobs, PooledState)):
            return [_renamed(message)]
        if isinstance(message, RequestRejected):
            return self._absorb_rejection(message)
        if isinstance(message, Eta):
            return [self._merged_eta(sender, message)]
        if isinstance(message, Statistics):
            self._statistics[replica] = message
            return [_merged_statistics(self._statistics.values())]
        self._broadcasts[message.command_id].answers[replica] = message
        return self._answered(message.command_id, replica)

    def _absorb_updates(self, message: SequenceUpdates) -> SequenceUpdates:
        part_ids, reasons = message.request_ids, message.finish_reasons
        for row in reasons.nonzero()[0].tolist():
            self._end_sample(
                part_ids.item(row), message.sample_indices.item(row), reasons.item(row)
            )
        if (part_ids > _REQUEST_MASK).any():
            return msgspec.structs.replace(message, request_ids=part_ids & _REQUEST_MASK)
        return message

    def _end_sample(self, part_id: int, sample_index: int, reason: int) -> None:
        route = self._routes.get(part_id & _REQUEST_MASK)
        part = None if route is None else route.parts.get(part_id)
        if route is None or part is None:
            return  # another part was refused
        part.samples.remove(sample_index)
        part.replica.num_open -= 1
        if not part.samples:
            del route.parts[part_id]
        if reason != FinishReason.ABORT:
            self._count_finished(route)
        if not route.parts:
            del self._routes[route.request.request_id]

    def _count_finished(self, route: _Route) -> None:
        """Counts a sample that ended by itself; aborts the others if they are not needed."""
        had_enough = route.has_enough
        route.num_finished += 1
        if route.is_split and route.has_enough and not had_enough:
            self._abort_parts(route)

    def _absorb_rejection(self, message: RequestRejected) -> list[ToServer]:
        """The first part that is refused ends the request."""
        route = self._routes.pop(message.request_id & _REQUEST_MASK, None)
        if route is not None:
            self._free_seats(route)
            del route.parts[message.request_id]
            self._abort_parts(route)
        return [_renamed(message)]

    def _merged_eta(self, sender: _Replica, message: Eta) -> Eta:
        """The sender's predictions; for a request in several parts, that of the last part."""
        sender.backlog_s = message.backlog_seconds
        seconds: dict[int, float] = {}
        for part_id, eta_s in zip(
            message.request_ids.tolist(), message.seconds.tolist(), strict=True
        ):
            route = self._routes.get(part_id & _REQUEST_MASK)
            if route is None or part_id not in route.parts:
                continue
            if len(route.parts) > 1:
                route.parts[part_id].eta_s = eta_s
                eta_s = max(part.eta_s for part in route.parts.values())
            seconds[route.request.request_id] = eta_s
        return Eta(
            request_ids=np.array(list(seconds), np.int64),
            seconds=np.array(list(seconds.values()), np.float64),
            backlog_seconds=max(
                replica.backlog_s
                for replica in self._replicas.values()
                if replica is sender or replica.num_open
            ),
        )

    def _answered(self, command_id: int, replica: int) -> list[ToServer]:
        """This replica will not answer any more; returns the answer if it was the last one."""
        broadcast = self._broadcasts[command_id]
        broadcast.awaited.discard(replica)
        if broadcast.awaited:
            return []
        del self._broadcasts[command_id]
        return [_merged_answers(command_id, broadcast)]

    # --- when a replica is lost -------------------------------------------------------------------

    def lost(self, replica: int, find: Find) -> list[ToServer]:
        """Lets everything that a replica had go on elsewhere; others must be left.

        Args:
            replica: its number.
            find: finds generations in flight.

        Returns:
            For the text core: what the replica would have said.
        """
        dead = self._replicas.pop(replica)
        if replica in self._statistics:
            nothing = dict.fromkeys(_STATE_FIELDS, 0)
            last = self._statistics[replica]
            self._statistics[replica] = msgspec.structs.replace(last, **nothing)
        endings = _Endings()
        for route in list(self._routes.values()):
            parts = [part for part in route.parts.values() if part.replica is dead]
            for part in parts:
                del route.parts[part.part_id]
            generation = find(route.request.request_id) if parts else None
            if generation is not None:
                indices = sorted(index for part in parts for index in part.samples)
                self._replay(route, indices, generation, endings)
            if not route.parts:
                del self._routes[route.request.request_id]
        messages: list[ToServer] = [endings.message()] if endings.rows else []
        for command_id, broadcast in list(self._broadcasts.items()):
            broadcast.answers.pop(replica, None)
            if replica in broadcast.awaited:
                messages += self._answered(command_id, replica)
        return messages

    def _replay(
        self, route: _Route, indices: list[int], generation: Generation, endings: _Endings
    ) -> None:
        """Lets samples of a lost replica go on, with the tokens that the server has."""
        samples = generation.samples
        rest = [index for index in indices if samples[index].finish_reason is None]
        # The others have a stop string, of which the manager had not heard or had not told.
        for index in set(indices).difference(rest):
            endings.add(route.request, samples[index].num_cached_tokens, index, FinishReason.STOP)
            self._count_finished(route)
        if route.is_aborted or route.has_enough:
            for index in rest:
                endings.add(
                    route.request, samples[index].num_cached_tokens, index, FinishReason.ABORT
                )
        elif rest:
            if generation.has_prompt_logprobs:
                route.request = msgspec.structs.replace(route.request, num_prompt_logprobs=-1)
            self._place(route, rest, {index: samples[index].token_ids for index in rest})


class _Endings:
    """Last rows without tokens, in the place of a replica that does not send them any more."""

    def __init__(self) -> None:
        # Request id, sample index, finish reason, cached tokens, logprobs of a token.
        self.rows: list[tuple[int, int, int, int, int]] = []

    def add(
        self, request: GenerateRequest, num_cached: int, sample_index: int, reason: FinishReason
    ) -> None:
        self.rows.append(
            (request.request_id, sample_index, reason, num_cached, request.num_logprobs)
        )

    def message(self) -> SequenceUpdates:
        request_ids, sample_indices, reasons, num_cached, num_logprobs = zip(
            *self.rows, strict=True
        )
        nothing: Int32Array = np.zeros(len(self.rows), np.int32)
        return SequenceUpdates(
            request_ids=np.array(request_ids, np.int64),
            sample_indices=_int32(sample_indices),
            num_tokens=nothing,
            finish_reasons=_int32(reasons),
            num_cached_tokens=_int32(num_cached),
            num_logprobs=_int32(num_logprobs),
            weights_versions=nothing,
            token_ids=EMPTY_INT32,
            logprobs=EMPTY_FLOAT32,
            top_ids=EMPTY_INT32,
            top_logprobs=EMPTY_FLOAT32,
        )


def _may_be_split(request: GenerateRequest) -> bool:
    """Whether samples may run apart.

    With prompt logprobs, which sample 0 brings, and ``first_k``, samples elsewhere could end the
    request before the logprobs have come.
    """
    return request.num_prompt_logprobs < 0 or not request.first_k


def _progress(
    indices: Sequence[int], generated: dict[int, list[int]], num_finished: int
) -> Progress:
    tokens = [generated.get(index, []) for index in indices]
    return Progress(
        sample_indices=_int32(indices),
        num_generated=_int32([len(ids) for ids in tokens]),
        generated_ids=_int32([token for ids in tokens for token in ids]),
        num_finished=num_finished,
    )


def _renamed(
    message: PromptLogprobs | PooledState | RequestRejected,
) -> PromptLogprobs | PooledState | RequestRejected:
    """The message with the id of the request instead of its part's."""
    request_id = message.request_id & _REQUEST_MASK
    if request_id == message.request_id:
        return message
    return msgspec.structs.replace(message, request_id=request_id)


def _merged_answers(command_id: int, broadcast: _Broadcast) -> CommandDone | CommandFailed:
    answers = broadcast.answers
    done = [answer for answer in answers.values() if isinstance(answer, CommandDone)]
    failed = {
        replica: answer for replica, answer in answers.items() if isinstance(answer, CommandFailed)
    }
    if not failed:
        return CommandDone(
            command_id,
            num_pages=sum(each.num_pages for each in done),
            num_tokens=sum(each.num_tokens for each in done),
            num_sequences=sum(each.num_sequences for each in done),
            weights_version=max(each.weights_version for each in done),
            lacks_weights=any(each.lacks_weights for each in done),
        )
    first, *others = failed.values()
    if not done and all(each.reason == first.reason for each in others):
        return first
    named = [f"replica {replica}: {each.reason}" for replica, each in failed.items()]
    if done:
        named.append(f"{len(done)} of {len(answers)} replicas have done it")
    return CommandFailed(command_id, "; ".join(named), first.field, bool(done))


def _merged_statistics(each: Iterable[Statistics]) -> Statistics:
    columns = zip(*(msgspec.structs.astuple(statistics) for statistics in each), strict=True)
    named = zip(Statistics.__struct_fields__, columns, strict=True)
    return Statistics(
        **{name: max(column) if name in _SHARED_FIELDS else sum(column) for name, column in named}
    )


def _int32(values: Iterable[int]) -> Int32Array:
    return np.array(list(values), np.int32)
