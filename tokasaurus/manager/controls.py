"""The server's commands: pauses, flushes, and what the worker must do between two batches.

Owns whether batches may be planned, and the controls in flight. Commands are carried out one after
the other, in the order in which they came. One that is not finished holds up those behind it, and
nothing else: requests, aborts, stops and acknowledgements work at any time. There are three
exceptions:

- An AbortAll is like an abort of every request: it is carried out at once.
- A cartridge is registered and forgotten at once, as a request is taken in.
- An unfinished drain may take long. A Pause, a Resume, a FlushCache or what concerns the group of a
  trainer does not wait for it. A pause
  with ABORT finishes it, a second drain ends together with it, and a Resume or a pause with KEEP
  cancels it: then the drain fails.

What concerns the group of a trainer is sent in its turn, and then holds up nothing: it goes on
beside batches and other commands (``Transfers``).

The plans ask for cartridges to be written. These controls are no commands: they hold up none, and
batches run behind them.

What is asked for already is done at once: a Resume where nothing is paused, a release of what is
released, a restore of what is there. A command that contradicts the state fails, and changes
nothing:

- an update whose version is not greater than the present one;
- a Resume while memory is released or there are no weights, since nothing could run;
- a drain in this state, if there are sequences that could not run to their ends;
- a load of a cartridge that is loaded, or that is larger than the KV cache;
- an unload of a cartridge that a request names.

A pause lasts until a Resume, whatever else happens. Without a pause, batches are planned again as
soon as an update or a restore has succeeded, and after an update that was refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tokasaurus.errors import EngineError
from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.slots import IndexArray
from tokasaurus.manager.transfers import Transfers
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.commands import (
    AbortAll,
    Action,
    Command,
    CommandDone,
    CommandFailed,
    Control,
    ControlDone,
    DeviceAction,
    FlushCache,
    GroupAction,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    LoadCartridge,
    Pause,
    PauseMode,
    ReceiveWeights,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    TransferDone,
    UnloadCartridge,
    UpdateWeights,
    WriteCartridge,
)
from tokasaurus.protocol.messages import ToWorker
from tokasaurus.rounding import ceil_div

__all__ = ["MAX_WEIGHTS_VERSION", "TIME_LIMITS_S", "Controls"]

MAX_WEIGHTS_VERSION = 2**31 - 1

# The worker may take this time for a control, counted from when those before it are done. It is so
# long that only a worker that hangs exceeds it: weights may come from a slow disk.
TIME_LIMITS_S: Mapping[type[DeviceAction], float] = {
    UpdateWeights: 1800.0,
    ReleaseMemory: 120.0,
    RestoreMemory: 1800.0,
    WriteCartridge: 300.0,
    # These only begin something, or end it.
    JoinWeightsGroup: 120.0,
    LeaveWeightsGroup: 120.0,
    ReceiveWeights: 120.0,
}


class _Waiting(NamedTuple):
    """A command that has not begun."""

    command_id: int
    action: Action
    request_ids: list[int]  # of the requests that had come before it


class _Sent(NamedTuple):
    """A control in flight: what a command asks for, or the writing of a cartridge."""

    control: Control
    command_id: int = -1
    cartridge: Cartridge | None = None

    @property
    def holds_up(self) -> bool:
        """Whether commands and batches wait for the worker's answer."""
        return self.cartridge is None and not isinstance(self.control.action, GroupAction)


class Controls:
    """The state of the commands of one replica.

    Attributes:
        paused: the mode of the present pause; None if there is none.

    Args:
        running: the sequences in slots.
        backlog: the requests.
        preempt: takes the pages of the sequences in these slots.
        abort: ends the requests with these ids, as far as they live, and gets their updates ready
            to be sent; returns the number of sequences that it ended.
        reject: ends the requests with these ids, which live; takes the field and the reason.
        answer: takes an answer to the server, to be sent after these updates.
    """

    def __init__(
        self,
        running: RunningSequences,
        backlog: Backlog,
        preempt: Callable[[IndexArray], None],
        abort: Callable[[list[int]], int],
        reject: Callable[[list[int], str, str], None],
        answer: Callable[[CommandDone | CommandFailed], None],
    ) -> None:
        self.paused: PauseMode | None = None
        self._running = running
        self._backlog = backlog
        self._preempt = preempt
        self._abort = abort
        self._reject = reject
        self._answer = answer
        self._waiting: deque[_Waiting] = deque()
        self._orders: list[ToWorker] = []
        # The answers to pauses, for when they are done.
        self._pausing: list[CommandDone] = []
        self._transfers = Transfers(self._transferred, self._failed, self._leave)
        self._sent: deque[_Sent] = deque()
        self._oldest_since = 0.0  # when the oldest control in flight could begin
        self._has_weights_memory = self._has_kv_cache = self._has_weights = True

    @property
    def is_active(self) -> bool:
        """Whether a command is not finished: a turn may have to ``advance`` it."""
        return bool(self._sent or self._pausing or self._waiting)

    @property
    def may_plan(self) -> bool:
        """Whether batches may be planned now; in a drain, of sequences that have begun."""
        if not (self._has_weights and self._has_weights_memory and self._has_kv_cache):
            return False
        if self.paused is not None and self.paused is not PauseMode.DRAIN:
            return False
        return not self._waits_for_worker

    @property
    def rests(self) -> bool:
        """Whether requests wait for a command: a Resume, a restore or an update."""
        return self.paused is not None or self._lack is not None

    @property
    def deadline(self) -> float | None:
        """When the oldest control in flight has taken too long; None if there is none."""
        if not self._sent:
            return None
        return self._oldest_since + TIME_LIMITS_S[type(self._sent[0].control.action)]

    def check_deadline(self, now: float) -> None:
        """Checks that the worker does not hang.

        Raises:
            EngineError: it has taken too long for a control.
        """
        if self.deadline is not None and now >= self.deadline:
            control = self._sent[0].control
            limit_s = TIME_LIMITS_S[type(control.action)]
            raise EngineError(
                f"the worker has not finished {type(control.action).__name__} (control"
                f" {control.number}) within its limit of {limit_s:g} seconds"
            )

    def take(self, command: Command, now: float) -> None:
        """Takes a command, and carries it out if none before it holds it up.

        The results that came before must be absorbed, and their updates collected.
        """
        request_ids, action = list(self._backlog.requests), command.action
        if isinstance(action, AbortAll):
            self._done(command.command_id, num_sequences=self._abort(request_ids))
            return
        if isinstance(action, LoadCartridge):
            self._load(command.command_id, action, now)
            return
        if isinstance(action, UnloadCartridge):
            self._unload(command.command_id, action.name)
            return
        self._waiting.append(_Waiting(command.command_id, action, request_ids))
        self.advance(now)

    def absorb(self, done: ControlDone, now: float) -> None:
        """Takes the worker's answer to the oldest control in flight.

        The results that came before must be absorbed, and their updates collected.

        Raises:
            ProtocolError: it answers something else.
        """
        self._running.in_flight.land_control(done)
        sent = self._sent.popleft()
        self._oldest_since = now
        if sent.cartridge is not None:
            self._has_written(sent.cartridge, done)
        elif isinstance(sent.control.action, GroupAction):
            self._transfers.answered(done.number, sent.command_id, sent.control.action, done.error)
        elif done.error is not None:
            self._failed(sent.command_id, done.error)
        else:
            self._done(sent.command_id, num_pages=self._has_done(sent.control.action, done))
        self.advance(now)

    def absorb_report(self, report: TransferDone, now: float) -> None:
        """Takes a rank's report of a transfer that the worker has carried out beside batches."""
        self._transfers.reported(report)
        self.advance(now)

    def advance(self, now: float) -> None:
        """Answers the pauses that are done, and carries out what waited for them."""
        while True:
            self._finish_pauses()
            if not self._waiting or self._must_wait(self._waiting[0].action):
                return
            self._carry_out(self._waiting.popleft(), now)

    def take_orders(self) -> list[ToWorker]:
        """Takes out what the worker is to do."""
        orders, self._orders = self._orders, []
        return orders

    # --- order ------------------------------------------------------------------------------------

    def _must_wait(self, action: Action) -> bool:
        """Whether a command before this one holds it up."""
        if self._waits_for_worker:
            return True
        may_interrupt = isinstance(action, Pause | Resume | FlushCache | GroupAction)
        return bool(self._pausing) and not (self.paused is PauseMode.DRAIN and may_interrupt)

    def _finish_pauses(self) -> None:
        if not self._pausing or self._running.in_flight.num_batches:
            return
        if self.paused is PauseMode.DRAIN and self._running.num_begun:
            return
        done, self._pausing = self._pausing, []
        for answer in done:
            self._answer(answer)

    def _cancel_drain(self, reason: str) -> None:
        """Fails the drains that have not finished."""
        for answer in self._pausing:
            self._failed(answer.command_id, reason)
        self._pausing = []

    # --- commands ---------------------------------------------------------------------------------

    def _carry_out(self, command: _Waiting, now: float) -> None:
        command_id, action = command.command_id, command.action
        if isinstance(action, FlushCache):
            self._done(command_id, num_pages=self._running.pages.flush())
        elif isinstance(action, Pause):
            self._pause(command, action.mode)
        elif isinstance(action, Resume):
            self._resume(command_id)
        elif isinstance(action, UpdateWeights):
            self._update_weights(command_id, action, now)
        elif isinstance(action, GroupAction):
            self._transfers.sent(self._running.in_flight.next_number, command_id, action)
            self._send(action, now, command_id=command_id)
        elif isinstance(action, ReleaseMemory):
            rest = ReleaseMemory(
                weights=action.weights and self._has_weights_memory,
                kv_cache=action.kv_cache and self._has_kv_cache,
            )
            self._change_memory(command_id, rest, now)
        elif isinstance(action, RestoreMemory):
            missing = RestoreMemory(
                weights=action.weights and not self._has_weights_memory,
                kv_cache=action.kv_cache and not self._has_kv_cache,
            )
            self._change_memory(command_id, missing, now)
        else:
            self._failed(command_id, f"{type(action).__name__} is not supported")

    def _pause(self, command: _Waiting, mode: PauseMode) -> None:
        command_id = command.command_id
        if mode is PauseMode.DRAIN:
            if self._lack is not None and self._running.num_begun:
                self._failed(command_id, f"sequences cannot run to their ends: {self._lack}")
                return
            self._hold_back()
        else:
            self._backlog.let_go()
        num_aborted = 0
        if mode is PauseMode.ABORT:
            num_aborted = self._abort(command.request_ids)
        elif mode is PauseMode.KEEP:
            self._cancel_drain("another pause preempted the sequences before they had ended")
        self.paused = mode
        if mode is not PauseMode.DRAIN:
            self._preempt_all()
        self._pausing.append(
            CommandDone(
                command_id,
                num_sequences=num_aborted,
                weights_version=self._running.weights_version,
            )
        )

    def _resume(self, command_id: int) -> None:
        if self._lack is not None:
            self._failed(command_id, f"nothing can run: {self._lack}")
            return
        self._cancel_drain("it was resumed before all sequences had ended")
        self.paused = None
        self._backlog.let_go()
        self._done(command_id)

    def _update_weights(self, command_id: int, action: UpdateWeights, now: float) -> None:
        present = self._running.weights_version
        if not present < action.version <= MAX_WEIGHTS_VERSION:
            reason = f"version is {action.version}; it must be greater than {present}, that of the"
            reason += f" present weights, and at most {MAX_WEIGHTS_VERSION}"
            self._failed(command_id, reason, "version")
        else:
            self._preempt_all()  # what they have computed is lost
            self._send(action, now, command_id=command_id)

    def _change_memory(
        self, command_id: int, action: ReleaseMemory | RestoreMemory, now: float
    ) -> None:
        if action.weights or action.kv_cache:
            self._preempt_all()
            self._send(action, now, command_id=command_id)
        else:
            self._done(command_id)

    def _leave(self, group: str) -> None:
        """Lets the workers leave a group, without an answer to the server."""
        self._waiting.append(_Waiting(-1, LeaveWeightsGroup(group), []))

    def _send(
        self,
        action: DeviceAction,
        now: float,
        *,
        command_id: int = -1,
        cartridge: Cartridge | None = None,
    ) -> None:
        control = Control(self._running.in_flight.next_number, action)
        self._running.in_flight.add_control(control)
        if not self._sent:
            self._oldest_since = now
        self._sent.append(_Sent(control, command_id, cartridge))
        self._orders.append(control)

    def _has_done(self, action: DeviceAction, done: ControlDone) -> int:
        """The worker has carried out a control; returns how many pages left the prefix cache.

        Nothing was planned since the control was sent, so no sequence holds a page.
        """
        num_pages = 0
        if isinstance(action, UpdateWeights):
            old, self._running.weights_version = self._running.weights_version, action.version
            num_pages = self._running.pages.replace_namespace(old, action.version)
            self._running.cartridges.publish_all(action.version)
            self._has_weights_memory = True  # it restores released weights
            self._has_weights = done.weights_ready
        elif isinstance(action, ReleaseMemory):
            self._has_weights_memory &= not action.weights
            self._has_kv_cache &= not action.kv_cache
            self._has_weights = done.weights_ready
            if action.kv_cache:
                num_pages = self._lose_cartridges() + self._running.pages.flush()
        elif isinstance(action, RestoreMemory):
            self._has_weights_memory |= action.weights
            self._has_kv_cache |= action.kv_cache
            self._has_weights = done.weights_ready
        return num_pages

    # --- cartridges -------------------------------------------------------------------------------

    def write_cartridges(self, now: float) -> list[ToWorker]:
        """Writes the cartridges that the latest plan has given pages to.

        Returns:
            The orders for the worker, which come behind the batch of this plan.
        """
        for cartridge in self._running.cartridges.take_unwritten():
            action = WriteCartridge(cartridge.paths, cartridge.num_tokens, cartridge.pages)
            cartridge.written_by(self._running.in_flight.next_number)
            self._send(action, now, cartridge=cartridge)
        return self.take_orders()

    def _load(self, command_id: int, action: LoadCartridge, now: float) -> None:
        refusal = self._why_not_load(action)
        if refusal is not None:
            field, reason = refusal
            self._failed(command_id, reason, field)
            return
        self._running.cartridges.register(action.name, action.paths, action.num_tokens, now)
        self._done(command_id)

    def _why_not_load(self, action: LoadCartridge) -> tuple[str, str] | None:
        """The field that is wrong and the reason, where a cartridge cannot be registered."""
        pages, cartridges = self._running.pages, self._running.cartridges
        if not action.name:
            return "name", "the name of a cartridge is empty"
        if cartridges.find(action.name) is not None:
            return "name", f"cartridge {action.name!r} is loaded already"
        if not action.paths:
            return "paths", "a cartridge needs at least one file"
        if action.num_tokens < 1:
            return "num_tokens", f"num_tokens is {action.num_tokens}; it must be at least 1"
        if action.num_tokens > cartridges.num_ids_left:
            return "num_tokens", "the pseudo ids of this engine are used up; start it again"
        num_pages, limit = ceil_div(action.num_tokens, pages.page_size), pages.pool.num_pages
        if num_pages > limit:
            wanted = f"a cartridge of {action.num_tokens} tokens takes {num_pages} pages"
            return "num_tokens", f"{wanted}, and the KV cache has {limit}"
        return None

    def _unload(self, command_id: int, name: str) -> None:
        cartridge = self._running.cartridges.find(name)
        if cartridge is None:
            self._failed(command_id, f"no cartridge {name!r} is loaded", "name")
        elif cartridge.num_users:
            reason = f"a request that has not ended names cartridge {name!r}"
            self._failed(command_id, reason, "name")
        else:
            num_pages, num_tokens = self._running.cartridges.remove(cartridge)
            self._done(command_id, num_pages=num_pages, num_tokens=num_tokens)

    def _has_written(self, cartridge: Cartridge, done: ControlDone) -> None:
        """The worker has written a cartridge, or could not. Its pages may be gone by now."""
        if not cartridge.is_answered_by(done.number):
            return
        if done.error is None:
            self._running.cartridges.finish(cartridge, self._running.weights_version)
            self._running.claims.is_written(cartridge)
            self._running.wake()
            return
        users = [
            request_id
            for request_id, request in self._backlog.requests.items()
            if request.cartridge is cartridge
        ]
        self._reject(users, "cartridges", f"cartridge {cartridge.name!r}: {done.error}")
        self._running.cartridges.lose(cartridge)

    def _lose_cartridges(self) -> int:
        """The KV cache is gone; returns how many pages came free. No sequence holds one."""
        self._running.claims.drop_all()
        cartridges = self._running.cartridges
        num_pages = sum(cartridges.lose(cartridge) for cartridge in cartridges.all())
        self._running.wake()
        return num_pages

    # --- state ------------------------------------------------------------------------------------

    @property
    def _waits_for_worker(self) -> bool:
        """Whether what a command asks for is in flight."""
        return any(sent.holds_up for sent in self._sent)

    @property
    def _lack(self) -> str | None:
        """Why nothing can run, whether it is paused or not; None if it can."""
        if not (self._has_weights_memory and self._has_kv_cache):
            return "memory of the device is released; restore it first"
        if not self._has_weights:
            return "the weights were released and could not be read again; update them first"
        return None

    def _preempt_all(self) -> None:
        self._preempt((self._running.slots.order >= 0).nonzero()[0])

    def _hold_back(self) -> None:
        """Leaves only sequences in the queue that have begun."""
        for sequence in self._backlog.hold_back():
            self._running.leave_queue(sequence)
        for sequence in self._running.claims.sequences():
            if not sequence.has_begun:
                self._running.claims.drop(sequence)
        self._running.recall()

    def _done(
        self,
        command_id: int,
        num_pages: int = 0,
        num_tokens: int | None = None,
        num_sequences: int = 0,
        has_all_tensors: bool = False,
    ) -> None:
        if num_tokens is None:
            num_tokens = num_pages * self._running.pages.page_size
        self._answer(
            CommandDone(
                command_id,
                num_pages=num_pages,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                weights_version=self._running.weights_version,
                lacks_weights=self._has_weights_memory and not self._has_weights,
                has_all_tensors=has_all_tensors,
            )
        )

    def _transferred(self, command_id: int, has_all_tensors: bool) -> None:
        self._done(command_id, has_all_tensors=has_all_tensors)

    def _failed(self, command_id: int, reason: str, field: str | None = None) -> None:
        self._answer(CommandFailed(command_id, reason, field))
