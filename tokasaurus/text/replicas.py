"""The router between the turnstile and the managers of several replicas.

It looks like one manager to the text core. Requests go to replicas, answers come back merged, and
when a replica is lost, its samples go on elsewhere with the tokens that the server has of them.
Samples that were to be aborted end instead: the router sends the last rows that the replica owes.
A request moves once. When a second replica ends while it has the request, the request fails, so
that one that kills its replica does not kill them all.

Which replica gets a request:

- one that has seats for all samples, where a seat is a sequence that can run; if there is none,
  any;
- of these, the one that would have the least work with the request. Prompt tokens that are
  probably in a replica's cache are no work there, and so are the positions of a cartridge;
- but the one that has the most of the prompt in its cache, as long as the difference in work is at
  most half of what the other one has to do. So a conversation stays where it is cached, unless that
  replica is clearly busier than another;
- if the samples exceed the free seats of that one, each takes what it has seats for. Samples stay
  together if they would wait in any case and could run together, since they share their prompt.

The samples of a request that are at one replica are a *part*. A manager knows it by an id of its
own, the request's id with the number of the part in its upper bits. So a replica may get several
parts of one request, one after the other. Where a request has several parts, ends are counted for
``first_k`` here. The draws of a sample do not depend on where it runs.

A replica that starts anew first gets the commands that still count, such as new weights, then
requests. While there is no replica, requests and commands wait for one.

An engine with one replica has no router.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from tokasaurus.errors import ReplicasLost
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    LoadCartridge,
    UnloadCartridge,
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
    Pooling,
    PromptLogprobs,
    RequestRejected,
    RequestStage,
    SequenceUpdates,
    Statistics,
    StopSequence,
    ToServer,
)
from tokasaurus.protocol.watching import Outlook, Watch
from tokasaurus.text.broadcasts import Broadcasts
from tokasaurus.text.expected_lengths import ExpectedLengths
from tokasaurus.text.generation import Generation
from tokasaurus.text.numbering import PART_SHIFT, REQUEST_MASK
from tokasaurus.text.placing import as_int32, progress_of, shares_of
from tokasaurus.text.prefix_places import Blocks, PrefixPlaces
from tokasaurus.text.replica_answers import Endings, merged_statistics, without_state
from tokasaurus.text.replica_reports import Loss, Losses, Report, Seats
from tokasaurus.text.routes import Part, Replica, Route

__all__ = ["Find", "Replicas"]

Find: TypeAlias = Callable[[int], Generation | None]
"""Finds the generation in flight with a request id."""


class Replicas:
    """Several managers as one.

    Args:
        senders: give a message to the manager of each replica; they must not block.
        seats: what each has room for.

    Attributes:
        losses: what the ends of replicas have cost so far.
    """

    def __init__(
        self, senders: Sequence[Callable[[FromServer], None]], seats: Sequence[Seats]
    ) -> None:
        self._seats = tuple(seats)
        self._replicas: dict[int, Replica] = {}  # that live, by number
        self._routes: dict[int, Route] = {}  # by request id
        self._broadcasts = Broadcasts()
        self._places = PrefixPlaces()
        self._lengths = ExpectedLengths()
        self._past: Statistics | None = None  # the totals of lost replicas
        self._sums: Statistics | None = None  # of all; None if they are to be added again
        self._starting: set[int] = set()  # lost replicas that are started again
        self._chosen: list[Replica] | None = None  # None if another choice is due
        self.losses = Losses()
        self._find: Find = lambda _: None
        self._on_seats: Callable[[], None] = lambda: None
        for number, send in enumerate(senders):
            self._add(number, send)

    def attach(self, find: Find, on_seats: Callable[[], None]) -> None:
        """Joins the router to the table of generations.

        Args:
            find: finds generations in flight.
            on_seats: called when ``num_seats`` or ``num_stuck`` may have changed.
        """
        self._find, self._on_seats = find, on_seats
        on_seats()

    @property
    def living(self) -> Sequence[Replica]:
        """The replicas that live."""
        return list(self._replicas.values())

    @property
    def num_seats(self) -> int:
        """The sequences that can run at once."""
        return sum(replica.num_seats for replica in self._choice())

    @property
    def num_stuck(self) -> int:
        """The samples at stalled replicas, while others go on."""
        choice = self._choice()
        return sum(each.num_open for each in self._replicas.values() if each not in choice)

    def reports(self) -> dict[int, Report]:
        """How each replica is, by number."""
        return {number: self._report(number) for number in range(len(self._seats))}

    def _report(self, number: int) -> Report:
        replica = self._replicas.get(number)
        if replica is None:
            return Report("starting" if number in self._starting else "ended")
        state = "ok"
        if replica.is_stalled:
            state = "stalled"
        elif replica.obstacle is not None:
            state = "waiting for weights"
        elif replica.catching_up:
            state = "catching up"
        return Report(state, replica.num_open, replica.work, replica.statistics)

    @property
    def statistics(self) -> Statistics | None:
        """The latest figures of all replicas as those of one manager; None before the first.

        They are added when they are asked for, and not for each report, since reports are as many
        as replicas.
        """
        if self._sums is None:
            each = (self._past, *(replica.statistics for replica in self._replicas.values()))
            known = [statistics for statistics in each if statistics is not None]
            self._sums = merged_statistics(known) if known else None
        return self._sums

    def outlooks(self) -> dict[int, Outlook]:
        """The latest forecast of each replica that has sent one, by number."""
        found = ((each.number, each.outlook) for each in self._replicas.values())
        return {number: outlook for number, outlook in found if outlook is not None}

    def obstacle(self, replica: int) -> str | None:
        """Why a replica that lives gets no requests before an update of the weights, if so."""
        return self._replicas[replica].obstacle

    @property
    def is_starting(self) -> bool:
        """Whether a lost replica is being started again."""
        return bool(self._starting)

    def is_awaited(self, replica: int) -> bool:
        """Whether a replica has something that it must answer sooner or later."""
        its = self._replicas.get(replica)
        return its is not None and (its.num_open > 0 or self._broadcasts.is_awaited(its))

    def marks(self) -> dict[int, tuple[int, int] | None]:
        """Of each replica that gets requests and is not stalled: what changes when it goes on.

        None for a replica that has nothing to do.
        """
        return {
            each.number: each.mark if self.is_awaited(each.number) else None
            for each in self._choice()
            if not each.is_stalled
        }

    def set_stalled(self, stalled: Collection[int]) -> None:
        """These replicas make no progress: the others get all further requests, if there are any.

        What the stalled ones have stays there.
        """
        for replica in self._replicas.values():
            replica.is_stalled = replica.number in stalled
        self._on_change()

    def _choice(self) -> list[Replica]:
        """The replicas that get requests; none if all wait to be started."""
        if self._chosen is None:
            fit = [replica for replica in self._replicas.values() if replica.is_fit]
            self._chosen = [replica for replica in fit if not replica.is_stalled] or fit
        return self._chosen

    def _on_change(self) -> None:
        """Other replicas may get requests from now on."""
        self._chosen = None
        self._on_seats()

    # --- replicas come and go ---------------------------------------------------------------------

    def _add(self, number: int, send: Callable[[FromServer], None]) -> Replica:
        seats = self._seats[number]
        replica = self._replicas[number] = Replica(number, send, seats.num_sequences)
        self._chosen = None
        self._places.add(number, seats.num_cached_tokens)
        return replica

    def join(self, number: int, send: Callable[[FromServer], None]) -> list[ToServer]:
        """A replica that was lost has been started again. It gets requests when it has caught up.

        Args:
            number: of the replica.
            send: gives a message to its new manager; must not block.

        Returns:
            For the text core, as ``absorb`` does.
        """
        self._starting.discard(number)
        self._broadcasts.join(self._add(number, send))
        self._chosen = None
        return self._settled()

    def absent(self, number: int, *, starts_again: bool) -> None:
        """A lost replica is on its way, or is not."""
        self._starting.discard(number)
        if starts_again:
            self._starting.add(number)

    @property
    def needs_first_weights(self) -> bool:
        """Whether a replica must start with the weights that the engine started with."""
        return self._broadcasts.needs_first_weights

    def _settled(self) -> list[ToServer]:
        """Sends what waits for a replica, if there is one now."""
        self._chosen = None
        endings = Endings()
        for route in list(self._routes.values()) if self._choice() else ():
            held, route.held = route.held, set()
            if held:
                self._go_on(route, held, endings)
        self._on_seats()
        return list(endings.messages())

    def lost(self, number: int, reason: str, *, starts_again: bool = False) -> Loss:
        """Lets everything that a replica had go on elsewhere, now or when there is a replica.

        Args:
            number: of the replica.
            reason: why it ended.
            starts_again: it is on its way back.
        """
        dead = self._replicas.pop(number)
        self._chosen = None
        self.absent(number, starts_again=starts_again)
        self._places.drop(number)
        self._close_account(dead)
        endings, failed = Endings(), {}
        num_moved = num_begun_again = 0
        for route in list(self._routes.values()):
            indices = self._taken_from(route, dead)
            if not indices:
                continue
            if route.moved_because is not None and not route.is_aborted:
                request_id = route.request.request_id
                failed[request_id] = ReplicasLost(route.moved_because, reason)
                self._forget(route)
                continue
            route.moved_because = reason
            moved = self._go_on(route, indices, endings)
            num_moved += len(moved)
            num_begun_again += sum(not num_tokens for num_tokens in moved.values())
        messages: list[ToServer] = [*endings.messages(), *self._broadcasts.lost(dead)]
        self._on_seats()
        self.losses.num_moved += num_moved
        self.losses.num_begun_again += num_begun_again
        return Loss(messages, failed, num_moved, num_begun_again)

    def _close_account(self, dead: Replica) -> None:
        """Keeps the totals of a replica, and counts what is lost with it."""
        self.losses.num_replicas += 1
        self._sums = None
        last = dead.statistics
        if last is not None:
            past = without_state(last)
            self._past = past if self._past is None else merged_statistics([self._past, past])
            self.losses.num_lost_tokens += max(0, last.num_generated_tokens - dead.num_delivered)

    def _taken_from(self, route: Route, dead: Replica) -> set[int]:
        """Takes the samples that a replica has out of a route."""
        indices: set[int] = set()
        for part in [part for part in route.parts.values() if part.replica is dead]:
            del route.parts[part.part_id]
            indices |= part.num_tokens.keys()
        return indices

    def _go_on(self, route: Route, indices: set[int], endings: Endings) -> dict[int, int]:
        """Lets samples without a replica go on, with the tokens that the server has.

        Returns:
            The tokens of each sample that goes on, by index.
        """
        generation = self._find(route.request.request_id)
        moved: dict[int, int] = {}
        if generation is not None:
            samples, request = generation.samples, route.request
            rest = sorted(index for index in indices if samples[index].finish_reason is None)
            # The others have a stop string, of which the manager had not heard or had not told.
            for index in sorted(indices.difference(rest)):
                endings.add(request, samples[index].num_cached_tokens, index, FinishReason.STOP)
                self._count_finished(route)
            if route.is_aborted or route.has_enough:
                for index in rest:
                    cached = samples[index].num_cached_tokens
                    endings.add(request, cached, index, FinishReason.ABORT)
            elif rest:
                if generation.has_prompt_logprobs:
                    route.request = msgspec.structs.replace(request, num_prompt_logprobs=-1)
                generated = {index: samples[index].token_ids for index in rest}
                self._place(route, rest, generated)
                moved = {index: len(ids) for index, ids in generated.items()}
        if route.is_over:
            del self._routes[route.request.request_id]
        return moved

    def _forget(self, route: Route) -> None:
        """Drops a request of which the text core hears no more, and ends it at its replicas."""
        del self._routes[route.request.request_id]
        for part in route.parts.values():
            part.leave()
            part.replica.send(AbortRequest(part.part_id))

    # --- from the text core -----------------------------------------------------------------------

    def send(self, message: FromServer) -> None:
        """Passes a message on to the replicas that it concerns."""
        if isinstance(message, Acknowledge):
            self._acknowledge(message)
        elif isinstance(message, GenerateRequest):
            route = self._routes[message.request_id] = Route(message)
            self._place(route, range(message.n), {})
        elif isinstance(message, StopSequence):
            part = self._part_of(message.request_id, message.sample_index)
            if part is not None:
                part.replica.send(StopSequence(part.part_id, message.sample_index))
        elif isinstance(message, AbortRequest):
            route_or_none = self._routes.get(message.request_id)
            if route_or_none is not None:
                self._abort_parts(route_or_none)
        elif isinstance(message, Ping | Watch):
            for replica in self._replicas.values():
                replica.send(message)
        else:
            self._broadcast(message)

    def _acknowledge(self, message: Acknowledge) -> None:
        rows: dict[Replica, list[tuple[int, int, int]]] = {}
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
            replica.send(
                Acknowledge(np.array(part_ids, np.int64), as_int32(indices), as_int32(counts))
            )

    def _part_of(self, request_id: int, sample_index: int) -> Part | None:
        route = self._routes.get(request_id)
        parts = () if route is None else route.parts.values()
        return next((part for part in parts if sample_index in part.num_tokens), None)

    def _broadcast(self, command: Command) -> None:
        if aborts_all(command.action):
            for route in self._routes.values():
                route.is_aborted = True
        if isinstance(command.action, LoadCartridge):
            self._places.register(command.action.name, command.action.num_tokens)
        elif isinstance(command.action, UnloadCartridge):
            self._places.unregister(command.action.name)
        self._broadcasts.send(command, self._replicas.values())

    def _abort_parts(self, route: Route) -> None:
        route.is_aborted = True
        for part in route.parts.values():
            part.replica.send(AbortRequest(part.part_id))

    # --- choosing replicas ------------------------------------------------------------------------

    def _place(self, route: Route, indices: Sequence[int], generated: dict[int, list[int]]) -> None:
        """Sends samples to replicas, with the tokens that they have."""
        request, choice = route.request, self._choice()
        if not choice:
            route.held.update(indices)
            return
        blocks = self._places.blocks(request.prompt_ids, request.cartridge)
        num_tokens = self._places.num_before(request.cartridge) + len(request.prompt_ids)
        # Others take nothing from the cache but a cartridge.
        takes_hits = request.num_prompt_logprobs < 0 and request.pooling is Pooling.NONE
        taken = blocks if takes_hits else blocks[: int(num_tokens > len(request.prompt_ids))]
        cached = self._places.cached(taken)
        shares = shares_of(request, len(indices), choice, cached)
        route.is_split |= len(shares) > 1
        start = 0
        for replica, count in shares:
            num_computed = num_tokens - cached.get(replica.number, 0)
            part_indices = indices[start : start + count]
            self._send_part(route, replica, part_indices, generated, num_computed, blocks)
            start += count

    def _send_part(
        self,
        route: Route,
        replica: Replica,
        indices: Sequence[int],
        generated: dict[int, list[int]],
        num_computed: int,
        blocks: Blocks,
    ) -> None:
        request, number = route.request, route.num_parts
        part_id = request.request_id | number << PART_SHIFT
        route.num_parts += 1
        route.parts[part_id] = Part(
            part_id,
            replica,
            {index: len(generated.get(index, ())) for index in indices},
            self._lengths.expect(request.max_tokens),
            num_computed + sum(len(generated.get(index, ())) for index in indices),
        )
        self._places.note(replica.number, blocks)
        if number or len(indices) < request.n:
            request = msgspec.structs.replace(
                request,
                request_id=part_id,
                first_k=0 if route.is_split else request.first_k,
                progress=progress_of(indices, generated, route.num_finished),
            )
        replica.send(request)

    # --- from the managers ------------------------------------------------------------------------

    def absorb(self, replica: int, message: ToServer) -> list[ToServer]:
        """Takes a message of a replica; returns what it says to the text core, if anything."""
        sender = self._replicas.get(replica)
        if sender is None:  # lost: what it says belongs to samples that go on elsewhere
            return []
        if isinstance(message, SequenceUpdates):
            return [self._absorb_updates(sender, message)]
        if isinstance(message, (PromptLogprobs, PooledState, RequestStage)):
            return [_renamed(message)]
        if isinstance(message, RequestRejected):
            return self._absorb_rejection(message)
        if isinstance(message, Eta):
            return [self._merged_eta(sender, message)]
        if isinstance(message, Statistics):
            sender.statistics, self._sums = message, None
            return []
        if isinstance(message, Outlook):
            sender.outlook = message
            return []
        return self._absorb_answer(sender, message)

    def _absorb_updates(self, sender: Replica, message: SequenceUpdates) -> SequenceUpdates:
        part_ids = message.request_ids
        sender.num_delivered += len(message.token_ids)
        for part_id, index, count, reason in zip(
            part_ids.tolist(),
            message.sample_indices.tolist(),
            message.num_tokens.tolist(),
            message.finish_reasons.tolist(),
            strict=True,
        ):
            route = self._routes.get(part_id & REQUEST_MASK)
            part = None if route is None else route.parts.get(part_id)
            if route is None or part is None:
                continue  # another part was refused
            if count:
                part.advance(index, count)
            if reason != FinishReason.RUNNING:
                self._end_sample(route, part, index, reason)
        if (part_ids > REQUEST_MASK).any():
            return msgspec.structs.replace(message, request_ids=part_ids & REQUEST_MASK)
        return message

    def _end_sample(self, route: Route, part: Part, index: int, reason: int) -> None:
        num_tokens = part.end(index)
        if not part.num_tokens:
            del route.parts[part.part_id]
        if reason != FinishReason.ABORT:
            self._lengths.learn(route.request.max_tokens, num_tokens)
            self._count_finished(route)
        if route.is_over:
            del self._routes[route.request.request_id]

    def _count_finished(self, route: Route) -> None:
        """Counts a sample that ended by itself; aborts the others if they are not needed."""
        had_enough = route.has_enough
        route.num_finished += 1
        if route.is_split and route.has_enough and not had_enough:
            self._abort_parts(route)

    def _absorb_rejection(self, message: RequestRejected) -> list[ToServer]:
        """The first part that is refused ends the request."""
        route = self._routes.get(message.request_id & REQUEST_MASK)
        part = None if route is None else route.parts.pop(message.request_id, None)
        if route is not None and part is not None:
            part.leave()
            self._forget(route)
        return [_renamed(message)]

    def _merged_eta(self, sender: Replica, message: Eta) -> Eta:
        """The sender's predictions; for a request in several parts, that of the last part."""
        sender.backlog_s = message.backlog_seconds
        seconds: dict[int, float] = {}
        for part_id, eta_s in zip(
            message.request_ids.tolist(), message.seconds.tolist(), strict=True
        ):
            route = self._routes.get(part_id & REQUEST_MASK)
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

    def _absorb_answer(
        self, sender: Replica, message: CommandDone | CommandFailed
    ) -> list[ToServer]:
        was_fit = sender.is_fit
        messages: list[ToServer] = [
            *self._broadcasts.absorb(sender, message, self._replicas.values())
        ]
        if self._broadcasts.has_emptied_caches:
            self._places.clear()
        if sender.is_fit and not was_fit:
            messages += self._settled()
        return messages


def _renamed(
    message: PromptLogprobs | PooledState | RequestRejected | RequestStage,
) -> PromptLogprobs | PooledState | RequestRejected | RequestStage:
    """The message with the id of the request instead of its part's."""
    request_id = message.request_id & REQUEST_MASK
    if request_id == message.request_id:
        return message
    return msgspec.structs.replace(message, request_id=request_id)
