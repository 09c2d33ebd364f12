"""The manager: events in, actions out.

``take_turn`` takes what happened (requests, aborts, acknowledgements, results of batches), brings
the state up to date, and plans batches until enough are in flight. Uses no clock, socket, thread or
randomness: the same events lead to the same actions, so simulations drive the same object that
serves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.controls import Controls
from tokasaurus.manager.counters import Counters, Gauges, statistics
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.eta import StepTimer, eta
from tokasaurus.manager.forecast.outlook import outlook
from tokasaurus.manager.held_slots import find_holding_slots
from tokasaurus.manager.in_flight import PromptPiece
from tokasaurus.manager.invariants import check_invariants
from tokasaurus.manager.look_ahead import LookAhead
from tokasaurus.manager.outbox import Outbox
from tokasaurus.manager.progress import progress_refusal
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.scheduler import Scheduler
from tokasaurus.manager.sequence import Request, Sequence, SequenceState
from tokasaurus.manager.shares import Shares, middle
from tokasaurus.manager.slots import IndexArray
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.commands import (
    Command,
    CommandDone,
    CommandFailed,
    ControlDone,
    TransferDone,
)
from tokasaurus.protocol.messages import (
    MAX_PRIORITY,
    AbortRequest,
    Acknowledge,
    Eta,
    FinishReason,
    ForwardResult,
    FromServer,
    FromWorker,
    GenerateRequest,
    Ping,
    PooledState,
    Pooling,
    PromptLogprobs,
    RequestRejected,
    Statistics,
    StopSequence,
    ToServer,
    ToWorker,
)
from tokasaurus.protocol.watching import Outlook, Watch
from tokasaurus.rounding import ceil_div

__all__ = ["Actions", "Manager"]


@dataclass(frozen=True, eq=False, slots=True)
class Actions:
    """What to send after a turn, each list in order."""

    to_worker: list[ToWorker]
    messages: list[ToServer]  # to the server


class Manager:
    """Continuous batching over a paged KV cache, for the workers of one replica.

    Args:
        config: the manager's slice.
    """

    def __init__(self, config: ManagerConfig) -> None:
        self.counters = Counters()
        self._config = config
        shares = Shares(
            lambda priority: middle(self._running.slots, priority),
            lambda max_tokens: self._admission.mean_tokens(max_tokens),
        )
        self._backlog = Backlog(config.stop_lag, shares)
        self._running = RunningSequences(config, self._backlog, self.counters)
        self._admission = AdmissionControl(config, self._running, self.counters)
        self._scheduler = Scheduler(
            config, self._running, self._backlog, self._admission, self.counters
        )
        self._look_ahead = LookAhead(config.scheduling_steps_ahead)
        self._step_timer = StepTimer()
        self._outbox = Outbox()
        self._controls = Controls(
            self._running,
            self._backlog,
            preempt=self._scheduler.preempt,
            abort=self._abort_requests,
            reject=self._reject_requests,
            answer=self._answer,
        )
        self._messages: list[ToServer] = []  # of this turn
        self._now = 0.0
        self._watched_until = 0.0
        self._num_steps = 0  # that began with batches of which this turn brings the results
        self._is_ordinary = True  # whether this turn has no command and no control
        # In this turn these ended: sequences, those of them that hold pages, and whole requests.
        self._ended: list[tuple[Sequence, FinishReason]] = []
        self._retiring: list[Sequence] = []
        self._closing: list[Request] = []
        # Slots to free once their tokens are in messages to the server.
        self._departing: list[int] = []

    @property
    def idle(self) -> bool:
        """Whether no sequence lives, and no batch or control is in flight."""
        return not self._backlog.requests and not self._running.in_flight

    @property
    def at_rest(self) -> bool:
        """Whether no batch or control is in flight: only a message of the server changes that.

        Sequences may wait for one: for acknowledgements, or for the end of a pause.
        """
        return not self._running.in_flight

    @property
    def deadline(self) -> float | None:
        """When the worker will have taken too long for a control; None if none is in flight.

        A time on the clock of ``take_turn``, which must be called then, if need be without events.
        """
        return self._controls.deadline

    @property
    def num_in_flight(self) -> int:
        """Batches that were sent and have not come back."""
        return self._running.in_flight.num_batches

    @property
    def awaited_batch(self) -> int | None:
        """The number of the batch that the worker must answer next; None if that is a control."""
        return self._running.in_flight.awaited_batch

    def take_turn(self, events: Iterable[FromServer | FromWorker], now: float) -> Actions:
        """Takes one turn. Afterwards there is nothing to do until the next event comes.

        Args:
            events: in the order they came.
            now: seconds on any clock that does not run backwards; it is measured with, and no
                decision but that about the ``deadline`` depends on it.

        Raises:
            ProtocolError: a result is not that of the oldest batch in flight.
            EngineError: the ``deadline`` has passed.
        """
        self._num_steps = 0
        self._is_ordinary = True
        if self.num_in_flight:
            self.counters.active_s += now - self._now
        self._now = now
        for event in events:
            self._take(event, now)
        self._settle()
        to_worker: list[ToWorker] = []
        if self._controls.is_active:
            self._controls.advance(now)
            self._controls.check_deadline(now)
            to_worker = self._controls.take_orders()
        if self._controls.may_plan:
            to_worker += self._plan(now)
        self._step_timer.absorbed(now, self._num_steps, self.num_in_flight == 0)
        if self._config.check_invariants:
            check_invariants(self._running, self._backlog)
        messages, self._messages = self._messages, []
        messages += self._running.stages.take()
        return Actions(to_worker, messages)

    def turn_took(self, seconds: float) -> None:
        """Takes the time of a turn: from when events came until everything that followed was sent.

        Where this is never called, ``scheduling_steps_ahead`` batches are in flight, and one more
        for each further lane. Otherwise there are no more than the device needs to stay busy. Turns
        with a command or a control do not count.
        """
        if self._config.adapt_steps_ahead and self._is_ordinary:
            self._look_ahead.turn_took(seconds)

    def eta(self) -> Eta | None:
        """When requests will have ended.

        None if nothing runs, if no step was measured yet, and as long as requests wait for a
        command: the server keeps the last predictions until then.
        """
        if self.idle or self._controls.rests or not self._step_timer.seconds:
            return None
        return eta(self._running, self._backlog, self._admission, self._step_timer.seconds)

    def outlook(self) -> Outlook | None:
        """The forecast; None unless it is watched, and as long as requests wait for a command."""
        if self._now >= self._watched_until or self._controls.rests:
            return None
        return outlook(self._running, self._backlog, self._admission, self._step_timer.seconds)

    def statistics(self) -> Statistics:
        """The counters, and the state of this moment."""
        cartridges = self._running.cartridges
        return statistics(
            self.counters,
            self.gauges(),
            self._step_timer.seconds,
            cartridges.tally(),
            cartridges.states(self._now),
        )

    def gauges(self) -> Gauges:
        """The state of this moment, for statistics."""
        slots, pages = self._running.slots, self._running.pages
        num_running = self._running.num_running
        num_prefilling = len(self._running.prefilling)
        num_in_slots = slots.num_slots - slots.num_free
        num_preempted = int(np.count_nonzero(slots.absorbing)) - num_running
        return Gauges(
            num_requests=len(self._backlog.requests),
            num_queued=len(self._backlog),
            num_parked=self._backlog.num_sequences
            - len(self._backlog)
            - num_running
            - num_preempted,
            num_prefilling=num_prefilling,
            num_decoding=num_running - num_prefilling,
            num_draining=num_in_slots - num_running,
            num_in_flight=self.num_in_flight,
            num_pages=pages.pool.num_pages,
            num_free_pages=pages.pool.num_free,
            num_evictable_pages=pages.pool.num_evictable + pages.num_idle,
            num_cartridge_pages=pages.num_pinned + pages.num_idle,
            num_evicted_pages=pages.cache.num_evicted,
            num_seats=self._config.max_running,
            page_size=self._config.page_size,
            weights_version=self._running.weights_version,
            paused=self._controls.rests,
        )

    def _plan(self, now: float) -> list[ToWorker]:
        orders: list[ToWorker] = []
        self._scheduler.recall()
        while self.num_in_flight < self._scheduler.num_lanes - 1 + self._look_ahead.depth:
            batch = self._scheduler.plan(now)
            if batch is not None:
                orders.append(batch)
            if self._scheduler.may_find_more:
                orders += self._controls.write_cartridges(now)
            elif batch is None:
                break
        return orders

    def _take(self, event: FromServer | FromWorker, now: float) -> None:
        if isinstance(event, ForwardResult):
            self._absorb(event)
        elif isinstance(event, Acknowledge):
            self._acknowledge(event)
        elif isinstance(event, GenerateRequest):
            self._accept(event, now)
        elif isinstance(event, StopSequence):
            sequence = self._backlog.find(event.request_id, event.sample_index)
            if sequence is not None:
                self._end(sequence, FinishReason.STOP)
        elif isinstance(event, AbortRequest):
            request = self._backlog.requests.get(event.request_id)
            if request is not None:
                self._abort(request)
        elif isinstance(event, Command | ControlDone):
            self._take_control(event, now)
        elif isinstance(event, TransferDone):
            self._controls.absorb_report(event, now)
        elif isinstance(event, Ping):
            self._messages.append(self.statistics())
        elif isinstance(event, Watch):
            self._watched_until = now + event.seconds
        else:
            raise ProtocolError(f"the manager takes no {type(event).__name__}")

    # --- from the server -------------------------------------------------------------------------

    def _accept(self, request: GenerateRequest, now: float) -> None:
        refusal = self._refusal(request)
        if refusal is None:
            cartridge = None
            if request.cartridge:
                cartridge = self._running.cartridges.find(request.cartridge)
            if cartridge is not None:
                cartridge.open()
            accepted = self._backlog.add(request, now, cartridge)
            accepted.device_s_before = self.counters.device_s
            if request.progress is not None:
                self._running.rest(accepted.sequences.values())
            self._admission.open(accepted)
            self.counters.num_requests += 1
        else:
            field, reason = refusal
            self._outbox.add(RequestRejected(request.request_id, reason, field))
            self.counters.num_rejected += 1

    def _refusal(self, request: GenerateRequest) -> tuple[str | None, str] | None:
        """The field that is wrong and the reason, where a request can never run; None if it can."""
        if len(request.prompt_ids) == 0:
            return "prompt", "the prompt is empty"
        if request.n < 1:
            return "n", f"n is {request.n}; it must be at least 1"
        if request.max_tokens < 1:
            return "max_tokens", f"max_tokens is {request.max_tokens}; it must be at least 1"
        if abs(request.priority) > MAX_PRIORITY:
            reason = f"it must be from {-MAX_PRIORITY} to {MAX_PRIORITY}"
            return "priority", f"priority is {request.priority}; {reason}"
        if not 0 <= request.first_k <= request.n:
            return "first_k", f"first_k is {request.first_k}; it must be from 1 to n={request.n}"
        if request.cartridge:
            problem = self._cartridge_refusal(request)
            if problem is not None:
                return "cartridges", problem
        problem = self._length_refusal(request)
        if problem is not None:
            return "max_tokens", problem
        if request.progress is not None:
            problem = progress_refusal(request, request.progress)
            if problem is not None:
                return "progress", problem
        if request.pooling and (request.n, request.max_tokens) != (1, 1):
            return "n", "a pooled request has one sample of one token"
        if request.request_id in self._backlog.requests:
            return None, f"request id {request.request_id} is already in use"
        return None

    def _cartridge_refusal(self, request: GenerateRequest) -> str | None:
        """Why a request cannot have its cartridge; None if it can."""
        if self._running.cartridges.find(request.cartridge) is None:
            return f"no cartridge {request.cartridge!r} is loaded"
        if request.pooling is Pooling.MEAN:
            return "the mean over a prompt behind a cartridge is not supported"
        return None

    def _length_refusal(self, request: GenerateRequest) -> str | None:
        """Why a request never has the pages that it may need; None if it fits."""
        config, page_size = self._config, self._config.page_size
        cartridge = self._running.cartridges.find(request.cartridge) if request.cartridge else None
        num_pseudo = 0 if cartridge is None else cartridge.num_tokens
        total = num_pseudo + len(request.prompt_ids) + request.max_tokens
        # The last token's KV is never needed.
        num_pages = ceil_div(total - 1, page_size)
        if cartridge is not None:  # the page in which it ends is copied
            num_pages += cartridge.num_pages - cartridge.num_full_pages
        if total <= config.max_request_tokens and num_pages <= config.num_pages:
            return None
        lengths = f"{len(request.prompt_ids)} prompt tokens and max_tokens={request.max_tokens}"
        if num_pseudo:
            lengths = f"a cartridge of {num_pseudo} tokens, {lengths}"
        if total > config.max_request_tokens:
            limit = config.max_request_tokens
            return f"{lengths} are more than the {limit} tokens a request may have"
        return f"{lengths} never fit the KV cache of {config.num_pages * page_size} tokens"

    def _abort(self, request: Request, *, is_told: bool = True) -> None:
        # The last sample first, so that no follower becomes a leader just before it ends.
        for sequence in reversed(list(request.sequences.values())):
            self._end(sequence, FinishReason.ABORT, is_told=is_told)

    def _acknowledge(self, event: Acknowledge) -> None:
        slots = find_holding_slots(self._running.slots, event.request_ids, event.sample_indices)
        is_found = slots >= 0
        self._running.acknowledge(slots[is_found], event.num_tokens[is_found])
        for row in (~is_found).nonzero()[0].tolist():
            name = (int(event.request_ids[row]), int(event.sample_indices[row]))
            sequence = self._backlog.find(*name)
            if sequence is None:
                continue
            if sequence.slot >= 0:
                slot = np.array([sequence.slot])
                self._running.acknowledge(slot, event.num_tokens[row : row + 1])
            else:
                self._backlog.acknowledged(sequence, int(event.num_tokens[row]))

    # --- commands --------------------------------------------------------------------------------

    def _take_control(self, event: Command | ControlDone, now: float) -> None:
        """Takes a command, or the end of a control, in its order among the events of the turn."""
        self._settle()
        if isinstance(event, Command):
            self._controls.take(event, now)
        else:
            self._controls.absorb(event, now)
            self._step_timer.interrupt()
        self._admission.pages_come_free()
        self._is_ordinary = False

    def _answer(self, answer: CommandDone | CommandFailed) -> None:
        self._messages.append(answer)

    def _abort_requests(self, request_ids: list[int]) -> int:
        num_before = self._backlog.num_sequences
        for request_id in request_ids:
            request = self._backlog.requests.get(request_id)
            if request is not None:
                self._abort(request)
        self._settle()
        return num_before - self._backlog.num_sequences

    def _reject_requests(self, request_ids: list[int], field: str, reason: str) -> None:
        for request_id in request_ids:
            self._abort(self._backlog.requests[request_id], is_told=False)
            self._outbox.add(RequestRejected(request_id, reason, field))
            self.counters.num_rejected += 1
        self._settle()

    # --- from the worker -------------------------------------------------------------------------

    def _absorb(self, result: ForwardResult) -> None:
        flight = self._running.in_flight.land(result)
        self._num_steps += flight.begins_step
        self._deliver_prompt_logprobs(flight.prompt_pieces, result)
        self._deliver_pooled_states(flight.pooled, result)
        rows, token_ids = flight.sampling_slots, result.token_ids
        is_cut = None
        if result.cut_rows is not None:
            is_cut = np.isin(np.arange(len(rows)), result.cut_rows)
        sampling_rows = None
        is_live = self._running.slots.absorbing[rows]
        if not is_live.all():
            sampling_rows = is_live.nonzero()[0]
            rows, token_ids = rows[sampling_rows], token_ids[sampling_rows]
            is_cut = None if is_cut is None else is_cut[sampling_rows]
        self._running.window.append(rows, result, sampling_rows)
        self._end_rows(rows, token_ids, is_cut)
        self._departing.extend(flight.departures)
        self.counters.num_generated_tokens += len(rows)
        self.counters.num_wasted_tokens += len(is_live) - len(rows)
        self.counters.num_grouped_tokens += result.num_grouped_tokens
        self.counters.num_grouped_prefill_tokens += result.num_grouped_prefill_tokens
        self.counters.device_s += result.device_s
        self.counters.waited_s += result.waited_s
        self.counters.num_recompiles = result.num_recompiles
        self._look_ahead.batch_took(result.device_s - result.waited_s)

    def _end_rows(
        self, rows: IndexArray, token_ids: Int32Array, is_cut: NDArray[np.bool_] | None
    ) -> None:
        """Ends the sequences for which this was the last token."""
        slots = self._running.slots
        is_full = slots.known[rows] == slots.max_tokens[rows]
        if is_cut is not None:
            is_full |= is_cut
        is_last = is_full | slots.is_stop(rows, token_ids)
        for slot, by_length in zip(rows[is_last].tolist(), is_full[is_last].tolist(), strict=True):
            sequence = slots.sequence(slot)
            # One before it may have been the last of first_k, and ended it.
            if sequence.state is not SequenceState.ENDED:
                self._end(sequence, FinishReason.LENGTH if by_length else FinishReason.STOP)

    def _deliver_prompt_logprobs(self, pieces: list[PromptPiece], result: ForwardResult) -> None:
        start = 0
        for piece in pieces:
            end = start + piece.num_tokens
            sequence = piece.sequence
            if sequence.state is not SequenceState.ENDED:
                if piece.num_tokens:
                    self._outbox.add(_prompt_logprobs(piece, result, start, end))
                if piece.ends_prompt:
                    sequence.whole_prompt_due = False
            start = end
        if start != len(result.prompt_logprobs):
            raise ProtocolError(
                f"batch {result.number} asks for {start} prompt logprobs,"
                f" its result has {len(result.prompt_logprobs)}"
            )

    def _deliver_pooled_states(self, sequences: list[Sequence], result: ForwardResult) -> None:
        states = () if result.pooled is None else result.pooled
        if len(states) != len(sequences):
            raise ProtocolError(
                f"batch {result.number} asks for {len(sequences)} pooled states,"
                f" its result has {len(states)}"
            )
        for sequence, state in zip(sequences, states, strict=True):
            if sequence.state is not SequenceState.ENDED:
                self._outbox.add(PooledState(sequence.request.message.request_id, state))

    # --- ends ------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, reason: FinishReason, *, is_told: bool = True) -> None:
        """Ends a sequence, as all ends do; its pages and its slot follow at the end of the turn.

        Args:
            sequence: that ends.
            reason: of the end.
            is_told: whether the server gets its last row.
        """
        request = sequence.request
        if is_told:
            self._outbox.add_final(sequence, reason)
        self._ended.append((sequence, reason))
        self._running.stages.ended(sequence, reason)
        if sequence.slot >= 0:
            self._running.slots.stop_absorbing(sequence.slot)
        if sequence.state is SequenceState.RUNNING:
            self._retiring.append(sequence)
        elif sequence.state is SequenceState.PREEMPTED:
            self._running.preempted.remove(sequence)
        else:
            self._running.leave_queue(sequence)
            self._running.resting.pop(sequence, None)
        self._backlog.end(sequence)
        if not request.sequences:
            self._closing.append(request)
        self.counters.num_finished += 1
        if reason is not FinishReason.ABORT:
            request.num_finished += 1
            if request.num_finished == request.message.first_k:
                self._abort(request)

    def _settle(self) -> None:
        """Collects messages; does what is left to do for all sequences that have ended, at once."""
        slots, window = self._running.slots, self._running.window
        self._running.stages.note_first_tokens(slots)
        self._messages += self._running.stages.take()
        self._messages += self._outbox.collect(slots, window, self._running.weights_version)
        if self._ended:
            self._admission.end(
                [sequence for sequence, _ in self._ended],
                [reason is not FinishReason.ABORT for _, reason in self._ended],
            )
            self._running.wake()
        for request in self._closing:
            self._admission.close(request)
        if self._retiring:
            rows = np.array([sequence.slot for sequence in self._retiring], np.intp)
            self._admission.release(rows)
            self._departing += self._running.retire(self._retiring)
        for request in self._closing:
            if request.cartridge is not None:
                request.cartridge.close(self._now)
        self._running.depart(self._departing)
        self._ended, self._closing, self._retiring, self._departing = [], [], [], []


def _prompt_logprobs(
    piece: PromptPiece, result: ForwardResult, start: int, end: int
) -> PromptLogprobs:
    width = piece.num_logprobs
    return PromptLogprobs(
        request_id=piece.sequence.request.message.request_id,
        first_position=piece.first_position,
        logprobs=result.prompt_logprobs[start:end],
        ranks=result.prompt_ranks[start:end],
        top_ids=result.prompt_top_ids[start:end, :width],
        top_logprobs=result.prompt_top_logprobs[start:end, :width],
    )
