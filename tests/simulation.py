"""A seeded world around a manager: clients come and go, a server lags, results are late.

After every turn: the manager's own invariants (``check_invariants``), the device's checks (see
``fake_device``), and here:

- Each sequence gets exactly the oracle's tokens, in order, and ends once. Each token is the one
  that the weights of its row's version draw.
- Each command is answered once, in order, and fails only if it must. Nothing is planned while
  something forbids it.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from fake_device import (
    BAD_FILES,
    BAD_NAMES,
    EMPTY_CONTEXT,
    GOOD_FILES,
    VOCAB_SIZE,
    FakeDevice,
    Oracle,
    cartridge_digest,
    pooled_oracle,
    prompt_logprobs_oracle,
)

from tokasaurus.common_types import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import AdmissionConfig, ManagerConfig, ModelFacts
from tokasaurus.manager import token_window
from tokasaurus.manager.controls import MAX_WEIGHTS_VERSION
from tokasaurus.manager.invariants import check_invariants
from tokasaurus.manager.manager import Manager
from tokasaurus.protocol.commands import (
    AbortAll,
    Action,
    Command,
    CommandDone,
    CommandFailed,
    Control,
    ControlDone,
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
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    Adjustments,
    Eta,
    FinishReason,
    ForwardBatch,
    FromServer,
    FromWorker,
    GenerateRequest,
    PooledState,
    Pooling,
    PromptLogprobs,
    RequestRejected,
    RequestStage,
    Sampling,
    SequenceUpdates,
    SlotParameters,
    Stage,
    StopSequence,
    ToServer,
    ToWorker,
)
from tokasaurus.rounding import ceil_div

DEFAULTS = (
    resolve(
        EngineConfig(model="any"),
        ModelFacts(
            path="",
            vocab_size=VOCAB_SIZE,
            num_layers=64,
            hidden_size=64,
            num_heads=64,
            num_kv_heads=64,
            intermediate_size=64,
            max_position_embeddings=4096,
            kv_elements_per_token=1,
            num_parameters=0,
            num_product_parameters=0,
            num_product_rows=0,
            activation_elements_per_token=0,
            eos_token_ids=(),
        ),
        num_cuda_devices=0,
        memory_bytes=None,
    )
    .replicas[0]
    .manager
)


def make_config(**changes: Any) -> ManagerConfig:
    """A small manager."""
    small = dataclasses.replace(
        DEFAULTS,
        page_size=4,
        num_pages=32,
        num_slots=12,
        max_seqs_per_forward=8,
        max_tokens_per_forward=24,
        max_request_tokens=64,
        scheduling_steps_ahead=3,
        stop_lag=4,
        use_groups=True,
        min_group_size=2,
        min_prefix_len=1,
    )
    return dataclasses.replace(small, **changes)


def make_admission(**changes: Any) -> AdmissionConfig:
    """The defaults of the flags."""
    return dataclasses.replace(DEFAULTS.admission, **changes)


def make_request(request_id: int, prompt: object, max_tokens: int, **changes: object):
    """A request with defaults; the device knows it by its seed."""
    values: dict[str, object] = {
        "request_id": request_id,
        "prompt_ids": np.array(prompt, np.int32),
        "n": 1,
        "max_tokens": max_tokens,
        "sampling": Sampling(),
        "seed": 10_000 + request_id,
        "stop_token_ids": (),
    }
    return GenerateRequest(**{**values, **changes})  # type: ignore[arg-type]


def prompt(length: int, start: int = 0) -> list[int]:
    """Ids that differ from each other, and from those of another start."""
    return [(start + 7 * index) % VOCAB_SIZE for index in range(length)]


def acknowledge(request_id: int, count: int) -> Acknowledge:
    """The server has searched ``count`` tokens of the only sample of a request."""
    return Acknowledge(np.array([request_id]), np.array([0], np.int32), np.array([count], np.int32))


@dataclass
class Answer:
    """What the server has received of one sequence, and what it did."""

    expected: Oracle
    ids: list[int] = field(default_factory=list)
    weights_versions: list[int] = field(default_factory=list)  # of each token
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    num_messages: int = 0
    num_cached_tokens: int = 0
    reason: FinishReason = FinishReason.RUNNING
    acked: int = 0  # as the manager was told
    stop_at: int | None = None  # tokens after which the server finds a stop string
    stop_sent: bool = False


class World:
    """One manager, one device, one server; ``turn`` passes on what the caller chooses."""

    def __init__(self, config: ManagerConfig) -> None:
        self.config = config
        # A short window, so that sequences outgrow it.
        with mock.patch.object(token_window, "MIN_COLUMNS", 4):
            self.manager = Manager(config)
        self.device = FakeDevice(config)
        self.requests: dict[int, GenerateRequest] = {}
        self.request_ids: dict[int, int] = {}  # by seed
        self.answers: dict[tuple[int, int], Answer] = {}
        self.living: dict[tuple[int, int], None] = {}  # names of those that have not ended
        self.aborted: set[int] = set()
        self.num_finished: Counter[int] = Counter()  # by request: those that were not aborted
        # By request and position: the versions of weights that may have computed the logprob.
        self.prompt_logprobs: dict[int, dict[int, set[int]]] = {}
        self.pooled: dict[int, set[int]] = {}  # versions, as above
        self.num_commands = 0
        self.commands: dict[int, Command] = {}
        self.command_answers: dict[int, CommandDone | CommandFailed] = {}
        self.stages: defaultdict[int, list[Stage]] = defaultdict(list)  # by request
        self.doomed: dict[int, list[int]] = {}  # by command: the requests that it is to abort
        self.weights_versions = [0]  # all so far, as the answers say
        self.is_quiet = False  # a pause is done that lets nothing run
        self.begun: set[tuple[int, int]] = set()  # names of those that the device has seen
        self.rejected: dict[int, RequestRejected] = {}
        self.results: deque[FromWorker] = deque()
        self.batches: list[ForwardBatch] = []
        self.controls: list[Control] = []
        self.last_named: dict[int, int] = {}
        self.num_absorbed = 0
        self.num_turns = 0
        self.check_interval = 1  # turns
        self.now = 0.0
        # Cartridges by name, as the server knows them: the loads that were done.
        self.cartridges: dict[str, LoadCartridge] = {}
        self.writes: dict[int, WriteCartridge] = {}  # by number of the control
        self.failures: dict[tuple[str, ...], str] = {}  # by paths: why a write failed
        self.group_controls: set[int] = set()  # numbers of those that concern a trainer's group
        # What the ranks will say of transfers that have begun, in any order.
        self.reports: list[TransferDone] = []
        self.counts: Counter[str] = Counter()  # what happened to cartridges
        self.behind: dict[int, int] = {}  # by request id: the digest of its cartridge
        self.num_pseudo: dict[int, int] = {}  # by request id

    def turn(
        self, *events: FromServer, num_results: int = 0, reports: Sequence[TransferDone] = ()
    ) -> None:
        """One turn of the manager, with these events and some of the results that are ready."""
        arrived: list[FromServer | FromWorker] = [*reports, *events]
        for event in events:
            self._note(event)
        for _ in range(min(num_results, len(self.results))):
            arrived.append(self.results.popleft())
            self._note_written(arrived[-1])
            self.num_absorbed += 1
        self.now += 0.001
        actions = self.manager.take_turn(arrived, self.now)
        self.num_turns += 1
        if self.num_turns % self.check_interval == 0:
            check_invariants(self.manager._running, self.manager._backlog)
        for message in actions.messages:
            self._receive(message)
        for order in actions.to_worker:
            self._send(order)
        assert self.manager.num_in_flight <= self.config.max_in_flight
        assert self.manager.at_rest == (not self.results)
        is_waited_for = any(isinstance(result, ControlDone) for result in self.results)
        assert (self.manager.deadline is not None) == is_waited_for
        if self.is_quiet or not all(map(self._lets_batches_run, self.results)):
            assert not self.manager._running.num_running, "a sequence holds pages in a pause"

    def command(self, action: Action, num_results: int = 0) -> int:
        """Sends a command in a turn of its own; returns its id."""
        command = self.make_command(action)
        self.turn(command, num_results=num_results)
        return command.command_id

    def make_command(self, action: Action) -> Command:
        """A command with an id of its own."""
        self.num_commands += 1
        return Command(self.num_commands, action)

    @property
    def done(self) -> list[int]:
        """The commands that were done, in order."""
        return [name for name, answer in self.command_answers.items() if _is_done(answer)]

    @property
    def failed(self) -> dict[int, str]:
        """Why commands failed."""
        answers = self.command_answers.items()
        return {name: answer.reason for name, answer in answers if not _is_done(answer)}

    def open_up(self) -> None:
        """Sends the commands after which everything runs again, whatever came before."""
        self.command(RestoreMemory(weights=True, kv_cache=True))
        self.command(UpdateWeights(self.next_version, GOOD_FILES))
        self.command(Resume())

    @property
    def next_version(self) -> int:
        """Greater than that of any update so far."""
        actions = [command.action for command in self.commands.values()]
        return max([0, *(a.version for a in actions if isinstance(a, UpdateWeights))]) + 1

    def finish(self, request: GenerateRequest) -> None:
        """Runs a request by itself."""
        self.turn(request)
        self.drain()

    def drain(self, max_turns: int = 10_000) -> None:
        """Lets all living sequences end, with a server that acknowledges all it gets."""
        for _ in range(max_turns):
            if self.manager.idle and not self.reports:
                break
            acks = self.acknowledgements()
            before = len(self.results)
            reports, self.reports = self.reports, []
            self.turn(*acks, num_results=2, reports=reports)
            assert before or acks or self.results or self.manager.idle, "the manager is stuck"
        assert self.manager.idle, "the manager does not come to an end"
        self.check_all_ended()
        self.check_empty()
        assert self.command_answers.keys() == self.commands.keys(), "a command has no answer"

    @property
    def num_events(self) -> int:
        """Sequences that arrived, aborts, stops, preemptions and commands so far."""
        stops = sum(answer.reason is FinishReason.STOP for answer in self.answers.values())
        aborts = sum(answer.reason is FinishReason.ABORT for answer in self.answers.values())
        num_preemptions = self.manager.counters.num_preemptions
        return len(self.answers) + stops + aborts + num_preemptions + len(self.commands)

    def acknowledgements(self) -> list[FromServer]:
        """The events that a server that has caught up would send."""
        events: list[FromServer] = []
        columns: list[tuple[int, int, int]] = []
        for request_id, sample_index in self.living:
            answer = self.answers[request_id, sample_index]
            if not self.requests[request_id].hold_for_acks:
                continue
            if answer.stop_at is not None and len(answer.ids) >= answer.stop_at:
                if not answer.stop_sent:
                    answer.stop_sent = True
                    events.append(StopSequence(request_id, sample_index))
            elif len(answer.ids) > answer.acked:
                columns.append((request_id, sample_index, len(answer.ids)))
        if columns:
            ids, indices, counts = zip(*columns, strict=True)
            events.append(
                Acknowledge(
                    np.array(ids, np.int64), np.array(indices, np.int32), np.array(counts, np.int32)
                )
            )
        return events

    def check_all_ended(self) -> None:
        for name, answer in self.answers.items():
            assert answer.reason, f"sequence {name} never ended"
        for request_id, request in self.requests.items():
            if request_id not in self.aborted and request_id not in self.rejected:
                assert self.num_finished[request_id] == (request.first_k or request.n)
            samples = [answer for name, answer in self.answers.items() if name[0] == request_id]
            has_tokens = request.progress is None and any(answer.ids for answer in samples)
            if request.report_stages and has_tokens:
                assert Stage.FIRST_TOKEN in self.stages[request_id]

    def check_empty(self) -> None:
        """No trace of any sequence is left."""
        running, backlog = self.manager._running, self.manager._backlog
        assert not backlog.requests
        assert backlog.num_sequences == len(backlog) == len(backlog.waiting()) == 0
        assert not backlog._heap
        assert not backlog._held
        assert running.slots.num_free == self.config.num_slots
        assert not running.prefilling
        assert not running.preempted
        assert not running.resting
        assert not running.in_progress.sequences()
        assert not running.prefixes.num_holders.any()
        assert (running.prefixes.leaf == -1).all()
        assert not running.in_flight.flights
        assert not running.stages._awaited
        assert not running.claims.sequences()
        assert not running.claims.aside()
        assert not running.claims._refused_at
        assert running.pages.num_pinned == 0
        assert running.pages.num_available == self.config.num_pages
        assert running.pages.pool.references.sum() == running.pages.num_idle
        assert not running.table_changes._entries
        assert all(
            sequence.name.startswith("sample") and sequence.slot == -1
            for sequence, _ in running.table_changes._patches
        )
        assert not self.manager._departing
        assert self.device.remembers == set(running.left_slots)  # for the next batch to say

    # --- to the manager --------------------------------------------------------------------------

    def _note(self, event: FromServer) -> None:
        if isinstance(event, GenerateRequest):
            self.requests[event.request_id] = event
            self._note_cartridge(event)
            self.request_ids[event.seed] = event.request_id
            for sample_index in range(event.n):
                answer = Answer(Oracle(event, sample_index, self.behind[event.request_id]))
                self.answers[event.request_id, sample_index] = answer
                self.living[event.request_id, sample_index] = None
            self.prompt_logprobs[event.request_id] = {}
        elif isinstance(event, AbortRequest):
            self.aborted.add(event.request_id)
        elif isinstance(event, StopSequence):
            self.answers[event.request_id, event.sample_index].stop_sent = True
        elif isinstance(event, Acknowledge):
            for request_id, sample_index, count in zip(
                event.request_ids.tolist(),
                event.sample_indices.tolist(),
                event.num_tokens.tolist(),
                strict=True,
            ):
                answer = self.answers[request_id, sample_index]
                answer.acked = max(answer.acked, count)
        elif isinstance(event, Command):
            assert event.command_id not in self.commands
            self.commands[event.command_id] = event
            action = event.action
            if isinstance(action, AbortAll) or action_mode(action) is PauseMode.ABORT:
                doomed = list({request_id: None for request_id, _ in self.living})
                self.doomed[event.command_id] = doomed
                self.aborted.update(doomed)
            elif isinstance(action, Resume) or action_mode(action) is PauseMode.DRAIN:
                self.is_quiet = False

    # --- cartridges ------------------------------------------------------------------------------

    def load(self, name: str, num_tokens: int, path: str = "") -> CommandDone | CommandFailed:
        """Registers a cartridge; returns the answer."""
        command_id = self.command(LoadCartridge(name, (path or name,), num_tokens))
        return self.command_answers[command_id]

    def unload(self, name: str) -> CommandDone | CommandFailed:
        """Unloads a cartridge; returns the answer."""
        return self.command_answers[self.command(UnloadCartridge(name))]

    def is_named(self, cartridge: str) -> bool:
        """Whether a sequence of which the server has not seen the end has this cartridge."""
        return any(
            cartridge == self.requests[request_id].cartridge for request_id, _ in self.living
        )

    def _note_cartridge(self, request: GenerateRequest) -> None:
        """Without a cartridge, or with one that is not loaded, nothing comes before the prompt."""
        load = self.cartridges.get(request.cartridge)
        digest, num_pseudo = EMPTY_CONTEXT, 0
        if load is not None:
            digest, num_pseudo = cartridge_digest(load.paths, load.num_tokens), load.num_tokens
        self.behind[request.request_id] = digest
        self.num_pseudo[request.request_id] = num_pseudo

    def _lets_batches_run(self, result: FromWorker) -> bool:
        """Whether it is no answer to a control, or to one that goes on beside batches."""
        if not isinstance(result, ControlDone):
            return True
        return result.number in self.writes or result.number in self.group_controls

    def _note_written(self, result: FromWorker) -> None:
        if isinstance(result, ControlDone) and result.number in self.writes:
            paths = self.writes[result.number].paths
            self.counts["writes" if result.error is None else "failed writes"] += 1
            if result.error is not None:
                self.failures[paths] = result.error

    def _check_rejection(self, message: RequestRejected) -> None:
        request = self.requests[message.request_id]
        if request.cartridge:
            load = self.cartridges.get(request.cartridge)
            is_wrong = load is None or request.pooling is Pooling.MEAN
            error = None if load is None else self.failures.get(load.paths)
            if message.field == "cartridges" and not is_wrong:
                assert message.reason == f"cartridge {request.cartridge!r}: {error}"
                self.counts["rejections"] += 1
            else:
                assert (message.field == "cartridges") == is_wrong, message

    def _check_cartridge_done(
        self, answer: CommandDone, action: LoadCartridge | UnloadCartridge
    ) -> None:
        if isinstance(action, LoadCartridge):
            assert action.name not in self.cartridges
            assert (answer.num_pages, answer.num_tokens) == (0, 0)
            self.cartridges[action.name] = action
            self.counts["loads"] += 1
            return
        load = self.cartridges.pop(action.name)
        num_pages = ceil_div(load.num_tokens, self.config.page_size)
        if answer.num_pages:
            num_behind = answer.num_pages - num_pages
            assert num_behind >= 0
            assert answer.num_tokens == load.num_tokens + num_behind * self.config.page_size
        else:
            assert answer.num_tokens == 0
        assert not self.is_named(action.name), "an unloaded cartridge is in use"

    def _check_cartridge_failed(
        self, answer: CommandFailed, action: LoadCartridge | UnloadCartridge
    ) -> None:
        is_loaded = action.name in self.cartridges
        if isinstance(action, UnloadCartridge):
            assert answer.field == "name"
            assert not is_loaded or self.is_named(action.name)
        else:
            assert (answer.field == "name") == (is_loaded or not action.name)
            assert answer.field in ("name", "num_tokens", "paths")

    # --- from the manager ------------------------------------------------------------------------

    def _send(self, order: ToWorker) -> None:
        assert all(map(self._lets_batches_run, self.results)), "something is sent behind a control"
        if isinstance(order, Control):
            self.controls.append(order)
            if isinstance(order.action, WriteCartridge):
                self.writes[order.number] = order.action
            done = self.device.carry_out(order)
            self.results.append(done)
            if isinstance(order.action, GroupAction):
                self.group_controls.add(order.number)
                if done.error is None and not isinstance(order.action, LeaveWeightsGroup):
                    self.reports += self._reports_of(order)
        else:
            assert not self.is_quiet, "a batch is planned in a pause"
            self._send_batch(order)

    def _reports_of(self, control: Control) -> list[TransferDone]:
        """What each of three ranks will say."""
        return [TransferDone(control.number, rank, 3, None, True) for rank in range(3)]

    def _send_batch(self, batch: ForwardBatch) -> None:
        if batch.parameters is not None:
            self._note_begun(batch.parameters)
            for slot in batch.parameters.slots.tolist():
                last = self.last_named.get(slot, -1)
                assert last < self.num_absorbed, (
                    "a slot is reused before its last batch is absorbed"
                )
        for slot in batch.decode_slots.tolist() + batch.prefill_slots.tolist():
            self.last_named[slot] = batch.number
        self.batches.append(batch)
        self.results.append(self.device.run(batch))
        for slot in batch.decode_slots.tolist() + batch.draw_slots.tolist():
            self._check_stop_lag(slot)

    def _note_begun(self, parameters: SlotParameters) -> None:
        request_ids = [self.request_ids[seed] for seed in parameters.seed.tolist()]
        names = set(zip(request_ids, parameters.sample_index.tolist(), strict=True))
        if self.manager._controls.paused is PauseMode.DRAIN:
            assert names <= self.begun, "a sequence begins in a drain"
        self.begun |= names

    def _check_stop_lag(self, slot: int) -> None:
        """No token is drawn beyond ``max_tokens``, or too far beyond the acknowledged ones."""
        state = self.device.slots[slot]
        request = self.requests[self.request_ids[state.seed]]
        name = (request.request_id, state.sample_index)
        if name in self.living:
            drawn = self.device.num_drawn[state.seed, state.sample_index]
            assert drawn <= request.max_tokens
            if request.hold_for_acks:
                assert drawn <= self.answers[name].acked + self.config.stop_lag

    def _receive(self, message: ToServer) -> None:
        if isinstance(message, RequestRejected):
            self.rejected[message.request_id] = message
            self._check_rejection(message)
            for name in [name for name in self.answers if name[0] == message.request_id]:
                del self.answers[name]
                self.living.pop(name, None)
        elif isinstance(message, PromptLogprobs):
            self._receive_prompt_logprobs(message)
        elif isinstance(message, PooledState):
            request = self.requests[message.request_id]
            assert not self.answers[message.request_id, 0].reason, "a pooled state after the end"
            assert message.request_id not in self.pooled, "a prompt was pooled twice"
            versions = {
                version
                for version in self.weights_versions
                if message.state.tolist()
                == pooled_oracle(request, version, self.behind[request.request_id])
            }
            assert versions, "a pooled state is wrong"
            self.pooled[message.request_id] = versions
        elif isinstance(message, CommandDone | CommandFailed):
            self._receive_answer(message)
        elif isinstance(message, RequestStage):
            self._receive_stage(message)
        elif isinstance(message, Eta):
            pass  # a prediction: nothing depends on it
        else:
            self._receive_updates(message)

    def _receive_stage(self, message: RequestStage) -> None:
        """A stage comes in its order, and before the last row that it is about."""
        request_id, stage = message.request_id, message.stage
        assert self.requests[request_id].report_stages, "nobody asked for the stages of a request"
        before = self.stages[request_id]
        assert bool(before) == (stage is not Stage.ADMITTED), "a request is not admitted once"
        assert stage is Stage.PREEMPTED or stage not in before, "a first token came twice"
        if stage is Stage.FIRST_TOKEN and self.requests[request_id].progress is None:
            samples = [answer for name, answer in self.answers.items() if name[0] == request_id]
            assert not any(answer.ids for answer in samples if answer.reason), "it came too late"
        before.append(stage)

    def _receive_prompt_logprobs(self, message: PromptLogprobs) -> None:
        assert not self.answers[message.request_id, 0].reason, "prompt logprobs after the end"
        assert len(message.logprobs) > 0
        request = self.requests[message.request_id]
        expected = {
            version: prompt_logprobs_oracle(request, version, self.behind[request.request_id])
            for version in self.weights_versions
        }
        assert message.top_ids.shape == (len(message.logprobs), request.num_prompt_logprobs)
        for index, logprob in enumerate(message.logprobs.tolist()):
            position = message.first_position + index
            tops = list(
                zip(
                    message.top_ids[index].tolist(),
                    message.top_logprobs[index].tolist(),
                    strict=True,
                )
            )
            answer = (logprob, int(message.ranks[index]), tops)
            versions = {
                version for version in expected if answer == expected[version][position - 1]
            }
            assert versions, "a prompt logprob is wrong"
            self.prompt_logprobs[message.request_id][position] = versions

    def _receive_answer(self, answer: CommandDone | CommandFailed) -> None:
        assert answer.command_id not in self.command_answers, "a command is answered twice"
        self.command_answers[answer.command_id] = answer
        action = self.commands[answer.command_id].action
        is_done_at_once = isinstance(
            action, AbortAll | LoadCartridge | UnloadCartridge | GroupAction
        )
        if not is_done_at_once and action_mode(action) is not PauseMode.DRAIN:
            before = itertools.takewhile(lambda name: name != answer.command_id, self.commands)
            assert all(
                name in self.command_answers
                or isinstance(self.commands[name].action, GroupAction)
                or action_mode(self.commands[name].action) is PauseMode.DRAIN
                for name in before
            ), "commands are answered in another order"
        if isinstance(answer, CommandDone):
            self._check_done(answer, action)
        else:
            self._check_failed(answer, action)

    def _check_done(self, answer: CommandDone, action: Action) -> None:
        if isinstance(action, LoadCartridge | UnloadCartridge):
            self._check_cartridge_done(answer, action)
        else:
            assert answer.num_tokens == answer.num_pages * self.config.page_size
        if isinstance(action, UpdateWeights):
            assert action.files != BAD_FILES
            assert action.version > self.weights_versions[-1]
            self.weights_versions.append(action.version)
        assert answer.weights_version == self.weights_versions[-1]
        doomed = self.doomed.get(answer.command_id, [])
        assert not {request_id for request_id, _ in self.living} & set(doomed)
        if isinstance(action, Pause):
            if action.mode is PauseMode.DRAIN:
                self._check_drained(answer.command_id)
            names = list(self.commands)
            later = names[names.index(answer.command_id) + 1 :]
            is_last = not any(isinstance(self.commands[n].action, Pause | Resume) for n in later)
            self.is_quiet = is_last and action.mode is not PauseMode.DRAIN

    def _check_drained(self, command_id: int) -> None:
        """No begun sequence lives, but for those that came after an abort that ended the drain."""
        left = self.begun & self.living.keys()
        names = list(self.commands)
        for name in names[names.index(command_id) + 1 :]:
            if action_mode(self.commands[name].action) is PauseMode.ABORT:
                left = {each for each in left if each[0] in self.doomed[name]}
        assert not left, "a drain ends too early"

    def _check_failed(self, answer: CommandFailed, action: Action) -> None:
        if isinstance(action, UpdateWeights):
            is_old = not self.weights_versions[-1] < action.version <= MAX_WEIGHTS_VERSION
            assert is_old or action.files == BAD_FILES
            assert (answer.field == "version") == is_old
        elif isinstance(action, LoadCartridge | UnloadCartridge):
            self._check_cartridge_failed(answer, action)
        elif isinstance(action, Resume):
            assert "nothing can run" in answer.reason
        elif isinstance(action, GroupAction):
            self.counts["failed transfers"] += 1
            is_bad = isinstance(action, ReceiveWeights) and action.names == BAD_NAMES
            is_refused = answer.field == "names"
            assert is_refused <= is_bad
            said = ("it does not use",) if is_refused else ("rank 2 says no", "the group")
            assert answer.reason.startswith(said), answer
        else:
            assert action_mode(action) is PauseMode.DRAIN
            assert answer.reason.startswith(("it was", "another pause", "sequences cannot"))

    def _receive_updates(self, message: SequenceUpdates) -> None:
        names = list(
            zip(message.request_ids.tolist(), message.sample_indices.tolist(), strict=True)
        )
        versions = message.weights_versions.tolist()
        rows = list(zip(names, versions, strict=True))
        assert len(set(rows)) == len(rows), "a sequence has two rows of one version in a message"
        last_row = {name: row for row, name in enumerate(names)}
        for name in last_row:
            self.answers[name].num_messages += 1
        at_token = at_logprob = at_top = 0
        for row, name in enumerate(names):
            answer, request = self.answers[name], self.requests[name[0]]
            assert not answer.reason, f"sequence {name} was updated after its end"
            count, width = int(message.num_tokens[row]), int(message.num_logprobs[row])
            answer.ids += message.token_ids[at_token : at_token + count].tolist()
            answer.weights_versions += [versions[row]] * count
            answer.expected.generate(count, versions[row])
            assert versions[row] in self.weights_versions
            assert answer.weights_versions == sorted(answer.weights_versions)
            at_token += count
            assert width == request.num_logprobs
            if width >= 0:
                answer.logprobs += message.logprobs[at_logprob : at_logprob + count].tolist()
                at_logprob += count
                end = at_top + count * width
                ids = message.top_ids[at_top:end].reshape(count, width).tolist()
                values = message.top_logprobs[at_top:end].reshape(count, width).tolist()
                answer.tops += [
                    list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)
                ]
                at_top = end
            answer.num_cached_tokens = int(message.num_cached_tokens[row])
            answer.reason = FinishReason(int(message.finish_reasons[row]))
            self._check_answer(name, answer, request, is_last=row == last_row[name])
            if answer.reason:
                del self.living[name]
        assert at_token == len(message.token_ids)
        assert at_logprob == len(message.logprobs)
        assert at_top == len(message.top_ids) == len(message.top_logprobs)

    def _check_answer(
        self, name: tuple[int, int], answer: Answer, request: GenerateRequest, *, is_last: bool
    ) -> None:
        expected = answer.expected
        assert answer.ids == expected.ids, f"sequence {name} got other tokens"
        if request.num_logprobs >= 0:
            assert answer.logprobs == expected.logprobs
            assert answer.tops == expected.tops
        assert answer.num_cached_tokens <= len(request.prompt_ids) - 1
        found = answer.num_cached_tokens
        assert found == 0 or (found + self.num_pseudo[name[0]]) % self.config.page_size == 0
        if not (request.stream or request.hold_for_acks):
            assert bool(answer.reason) == is_last, "an update of a sequence that does not stream"
            assert answer.num_messages == 1
        if answer.reason is FinishReason.ABORT:
            enough = request.first_k and self.num_finished[name[0]] == request.first_k
            assert enough or name[0] in self.aborted
        elif answer.reason:
            self.num_finished[name[0]] += 1
            assert self.num_finished[name[0]] <= (request.first_k or request.n)
        if answer.reason in (FinishReason.STOP, FinishReason.LENGTH) and not answer.stop_sent:
            assert expected.has_ended, f"sequence {name} ended early"
            by_length = answer.reason is FinishReason.LENGTH
            assert by_length == expected.by_length
        if answer.reason in (FinishReason.STOP, FinishReason.LENGTH) and name[1] == 0:
            if expected.has_ended:
                assert (name[0] in self.pooled) == bool(request.pooling)
                if request.pooling:
                    assert answer.weights_versions[-1] in self.pooled[name[0]]
            if request.num_prompt_logprobs >= 0 and expected.has_ended:
                pieces = self.prompt_logprobs[name[0]]
                assert sorted(pieces) == list(range(1, len(request.prompt_ids)))
                assert not pieces or set.intersection(*pieces.values()), "weights are mixed"


def _is_done(answer: CommandDone | CommandFailed) -> bool:
    return isinstance(answer, CommandDone)


def action_mode(action: Action) -> PauseMode | None:
    """The mode of a pause; None for other actions."""
    return action.mode if isinstance(action, Pause) else None


@dataclass(frozen=True)
class Habits:
    """How a simulated world behaves. Rates are means for one turn of the manager."""

    num_requests: int = 150
    arrivals: float = 1.0
    aborts: float = 0.1
    stops: float = 0.1  # of any sequence, whether it has stop strings or not
    results: float = 1.5
    acks: float = 0.5
    flushes: float = 0.02
    commands: float = 0.0  # of all kinds
    pooled: float = 0.1  # share of the requests
    max_prompt: int = 20
    max_tokens: int = 12
    max_samples: int = 4
    loads: float = 0.0  # of cartridges
    unloads: float = 0.0
    with_cartridges: float = 0.0  # share of the requests
    num_clients: int = 1


class Simulation(World):
    """A world that runs by itself.

    Args:
        seed: of everything that is left to chance.
        config: of the manager.
        habits: of the clients, the server and the device.
    """

    def __init__(self, seed: int, config: ManagerConfig, habits: Habits) -> None:
        super().__init__(config)
        self.habits = habits
        self._random = random.Random(seed)
        self._num_loads = 0
        self._leaving: set[str] = set()  # cartridges that no further request names
        # Few beginnings, so that prompts share prefixes of any length.
        self._beginnings = [self._ids(habits.max_prompt) for _ in range(3)]

    @staticmethod
    def of_seed(seed: int) -> Simulation:
        """A world of random size; its cache is often as small as possible."""
        chance = random.Random(seed)
        page_size = chance.choice([1, 4, 16])
        habits = Habits(
            arrivals=chance.choice([1.0, 3.0, 8.0]),
            aborts=chance.choice([0.0, 0.2, 1.0]),
            stops=chance.choice([0.0, 0.2, 1.0]),
            results=chance.choice([1.0, 2.0, 5.0]),
            acks=chance.choice([0.2, 0.8]),
            max_prompt=chance.choice([6, 20, 40]),
            max_tokens=chance.choice([3, 8, 24]),
            max_samples=chance.choice([1, 4, 10, 40]),
        )
        longest = habits.max_prompt + habits.max_tokens
        num_pages = ceil_div(longest - 1, page_size)
        max_seqs = chance.choice([3, 8, 24])
        config = make_config(
            page_size=page_size,
            num_pages=int(num_pages * chance.choice([1, 1.5, 3, 10])),
            num_slots=max_seqs + chance.choice([1, 4, 16]),
            max_seqs_per_forward=max_seqs,
            max_tokens_per_forward=chance.choice([5, 24, 64]),
            max_request_tokens=longest,
            scheduling_steps_ahead=chance.choice([1, 2, 3, 6]),
            stop_lag=chance.choice([1, 4, 16]),
            admission=make_admission(
                predict_lengths=chance.random() < 0.8,
                learn_lengths=chance.random() < 0.8,
                length_memory=chance.choice([8, 2048]),
                num_lengths_awaited=chance.choice([0, 4, 1000]),
                prior_mean=chance.choice([None, 0.0, 0.5, 1.0]),
                std_scale=chance.choice([0.0, 0.25, 2.0]),
                # Where too much is promised, running sequences soon need the pages of others.
                target_utilization=chance.choice([0.3, 1.0, 1.5, 1000.0]),
                greedy_prefill=chance.random() < 0.7,
                prefill_round_up_multiple=chance.choice([1, 16]),
            ),
            use_groups=chance.random() < 0.8,
            min_group_size=chance.choice([2, 4]),
            min_prefix_len=chance.choice([1, 8]),
            force_preemption=chance.random() < 0.3,
        )
        world = Simulation(seed, config, habits)
        world.check_interval = chance.choice([1, 8])
        return world

    @staticmethod
    def commanded_of_seed(seed: int) -> Simulation:
        """A world of random size that is given commands, with many batches in flight."""
        world = Simulation.of_seed(seed)
        chance = random.Random(seed)
        config = dataclasses.replace(world.config, scheduling_steps_ahead=8)
        habits = dataclasses.replace(world.habits, commands=chance.choice([0.05, 0.2]))
        commanded = Simulation(seed, config, habits)
        commanded.check_interval = 1
        return commanded

    @staticmethod
    def shared_of_seed(seed: int) -> Simulation:
        """A world of several clients, of which one has most of the requests."""
        chance = random.Random(seed)
        make_world = chance.choice([Simulation.of_seed, Simulation.crowded_of_seed])
        world = make_world(seed)
        config = dataclasses.replace(world.config, share_wait_s=chance.choice([0.0, 0.005, 0.02]))
        habits = dataclasses.replace(world.habits, num_clients=chance.choice([2, 3, 20]))
        shared = Simulation(seed, config, habits)
        shared.check_interval = world.check_interval
        return shared

    @staticmethod
    def crowded_of_seed(seed: int) -> Simulation:
        """A world in which most sequences wait long for room in the cache."""
        world = Simulation.of_seed(seed)
        habits = dataclasses.replace(
            world.habits, num_requests=60, aborts=0.02, stops=0.02, max_prompt=20, max_tokens=60
        )
        chance, page_size = random.Random(seed), world.config.page_size
        longest = habits.max_prompt + habits.max_tokens
        config = dataclasses.replace(
            world.config,
            num_pages=int(ceil_div(longest - 1, page_size) * chance.choice([1.2, 2, 4])),
            num_slots=48,
            max_seqs_per_forward=40,
            max_tokens_per_forward=64,
            max_request_tokens=longest,
            admission=dataclasses.replace(
                world.config.admission, target_utilization=chance.choice([0.6, 1.0])
            ),
        )
        crowded = Simulation(seed, config, habits)
        crowded.check_interval = world.check_interval
        return crowded

    @staticmethod
    def with_lanes_of_seed(seed: int) -> Simulation:
        """A world of any of these kinds, on a pipeline."""
        chance = random.Random(seed)
        make_world = chance.choice(
            [
                Simulation.of_seed,
                Simulation.of_seed,
                Simulation.commanded_of_seed,
                Simulation.shared_of_seed,
                Simulation.crowded_of_seed,
                Simulation.with_cartridges_of_seed,
                Simulation.commanded_with_cartridges_of_seed,
            ]
        )
        world = make_world(seed)
        config = dataclasses.replace(world.config, num_lanes=chance.choice([2, 3, 5]))
        laned = Simulation(seed, config, world.habits)
        laned.check_interval = world.check_interval
        return laned

    def run(self) -> None:
        """Runs until all requests have come and all sequences have ended."""
        habits = self.habits
        while len(self.requests) < habits.num_requests:
            first = len(self.requests)
            is_crowded = len(self.living) > 4 * self.config.max_seqs_per_forward
            num_arrivals = 0 if is_crowded else self._count(habits.arrivals)
            arrivals = [self._request(first + index) for index in range(num_arrivals)]
            events: list[FromServer] = [*arrivals]
            if self.living:
                names = list(self.living)
                for _ in range(self._count(habits.aborts)):
                    events.append(AbortRequest(self._random.choice(names)[0]))
                for _ in range(self._count(habits.stops)):
                    events.append(StopSequence(*self._random.choice(names)))
            for _ in range(self._count(habits.flushes)):
                events.append(self.make_command(FlushCache()))
            for _ in range(self._count(habits.commands)):
                events.insert(
                    self._random.randint(0, len(events)), self.make_command(self._action())
                )
                self.device.keeps_files = self._random.random() < 0.7
            if habits.loads:
                events += self._cartridge_commands()
            if self._random.random() < habits.acks:
                events += self.acknowledgements()
            reports = self._some_reports(0.3)
            self.turn(*events, num_results=self._count(habits.results), reports=reports)
        if habits.commands:
            self.open_up()
        self.drain()

    def _some_reports(self, share: float) -> list[TransferDone]:
        """Takes some of the reports of ranks, in any order; a few are failures."""
        self._random.shuffle(self.reports)
        count = sum(self._random.random() < share for _ in self.reports)
        some, self.reports = self.reports[:count], self.reports[count:]
        fails = [each.rank == 2 and self._random.random() < 0.3 for each in some]
        return [
            msgspec.structs.replace(each, error="rank 2 says no") if failed else each
            for each, failed in zip(some, fails, strict=True)
        ]

    def _group_action(self) -> GroupAction:
        group = self._random.choice("ab")
        names = self._random.choice([("good",), ("good",), BAD_NAMES])
        receive = ReceiveWeights(group, names, ("float32",), ((2,),), False, False, 1.0)
        join = JoinWeightsGroup(group, "host", 1, 1, 4, "gloo", 1.0)
        return self._random.choice([receive, receive, join, LeaveWeightsGroup(group)])

    def _action(self) -> Action:
        chance = self._random
        counts = {
            "pause": 4,
            "resume": 5,
            "update": 2,
            "release": 2,
            "restore": 5,
            "other": 1,
            "group": 3,
        }
        kind = chance.choice([kind for kind, count in counts.items() for _ in range(count)])
        if kind == "pause":
            return Pause(chance.choice([*PauseMode, PauseMode.KEEP, PauseMode.DRAIN]))
        if kind == "resume":
            return Resume()
        if kind == "update":
            files = chance.choice([GOOD_FILES, GOOD_FILES, GOOD_FILES, BAD_FILES])
            version = self.next_version - chance.choice([0, 0, 0, 0, 0, 1, 2])
            return UpdateWeights(max(0, version), files)
        if kind == "group":
            return self._group_action()
        parts = chance.choice([(True, False), (False, True), (True, True)])
        if kind == "release":
            return ReleaseMemory(*parts)
        if kind == "restore":
            return RestoreMemory(*parts)
        return chance.choice([AbortAll(), FlushCache()])

    # --- cartridges ------------------------------------------------------------------------------

    @staticmethod
    def with_cartridges_of_seed(seed: int) -> Simulation:
        """A world in which cartridges come, go, and come again as others of the same name."""
        return Simulation._with_cartridges(Simulation.of_seed(seed), seed)

    @staticmethod
    def crowded_with_cartridges_of_seed(seed: int) -> Simulation:
        """The same where most sequences wait long for room, some of several clients."""
        make_world = random.Random(seed).choice(
            [Simulation.crowded_of_seed, Simulation.shared_of_seed]
        )
        return Simulation._with_cartridges(make_world(seed), seed)

    @staticmethod
    def commanded_with_cartridges_of_seed(seed: int) -> Simulation:
        """The same among other commands: weights change, and what the cache held is lost."""
        world = Simulation._with_cartridges(Simulation.commanded_of_seed(seed), seed)
        # Often, so that a restore meets loaded cartridges.
        world.habits = dataclasses.replace(world.habits, arrivals=1.0, commands=0.5)
        return world

    @staticmethod
    def _with_cartridges(world: Simulation, seed: int) -> Simulation:
        chance, page_size = random.Random(seed), world.config.page_size
        longest = world.config.max_request_tokens + 4 * page_size + 1
        config = dataclasses.replace(
            world.config,
            # Room for the largest request with its cartridge of at most 5 pages, or for a few more.
            num_pages=min(world.config.num_pages, 2 * ceil_div(longest, page_size))
            + chance.choice([6, 6, 9, 20]),
            max_request_tokens=longest,
            share_wait_s=chance.choice([0.0, 0.005, 0.02, 1.0]),
        )
        habits = dataclasses.replace(
            world.habits,
            arrivals=min(3.0, world.habits.arrivals),
            loads=0.4,
            unloads=chance.choice([0.05, 0.2]),
            with_cartridges=chance.choice([0.6, 0.9]),
        )
        other = Simulation(seed, config, habits)
        other.check_interval = world.check_interval
        return other

    def unload_all(self) -> None:
        """Gives back every page that a cartridge has, when all sequences have ended."""
        for name in list(self.cartridges):
            assert isinstance(self.unload(name), CommandDone)
        pages = self.manager._running.pages
        assert pages.num_pinned == pages.num_idle == 0
        assert pages.num_available == self.config.num_pages
        ids = [np.frombuffer(node.ids, np.int32) for node in pages.cache.nodes()]
        assert all((run >= 0).all() for run in ids), "text behind a cartridge is still cached"

    def _cartridge_commands(self) -> list[FromServer]:
        """Loads of new versions, some of which fail; unloads, some of cartridges in use."""
        chance, actions = self._random, []
        for _ in range(self._count(self.habits.loads)):
            name = chance.choice("abcdef")
            self._num_loads += 1
            path = chance.choice([*[""] * 7, "missing "]) + f"{name} {self._num_loads}"
            num_tokens = chance.randint(1, chance.choice([2, 4]) * self.config.page_size + 1)
            actions.append(LoadCartridge(name, (path,), num_tokens))
        for _ in range(self._count(self.habits.unloads)):
            self._leaving.add(chance.choice("abcdef"))
        self._leaving &= set(self.cartridges)
        actions += [
            UnloadCartridge(name) for name in sorted(self._leaving) if chance.random() < 0.3
        ]
        return [self.make_command(action) for action in actions]

    def _count(self, mean: float) -> int:
        """A geometric random number."""
        count = 0
        while self._random.random() < mean / (mean + 1):
            count += 1
        return count

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(VOCAB_SIZE) for _ in range(count)]

    def _request(self, request_id: int) -> GenerateRequest:
        chance, habits = self._random, self.habits
        length = chance.randint(1, habits.max_prompt)
        shared = chance.choice(self._beginnings)[: chance.randint(0, length)]
        cartridge = ""
        if habits.with_cartridges and chance.random() < habits.with_cartridges:
            names = [name for name in self.cartridges if name not in self._leaving]
            cartridge = chance.choice(names or [""])
            if chance.random() < 0.02:
                cartridge = "unknown"
        pooling = Pooling.NONE
        if chance.random() < habits.pooled:
            pooling = chance.choice([Pooling.MEAN, Pooling.LAST])
        n = 1 if pooling else chance.choice([1, 1, chance.randint(1, habits.max_samples)])
        client = ""
        if habits.num_clients > 1 and chance.random() < 0.5:
            client = str(chance.randrange(1, habits.num_clients))
        return make_request(
            request_id,
            shared + self._ids(length - len(shared)),
            1 if pooling else chance.randint(1, habits.max_tokens),
            pooling=pooling,
            cartridge=cartridge,
            client=client,
            name=f"req-{request_id}" if request_id % 3 else "",
            report_stages=request_id % 2 == 0,
            n=n,
            priority=chance.choice([0, 0, 0, 0, -3, 1, 2]),
            first_k=chance.choice([0, 0, chance.randint(1, n)]),
            stop_token_ids=chance.choice([(), (3,), (5, 7), (11, 13, 17)]),
            num_logprobs=chance.choice([-1, -1, 0, 1, 3]),
            num_prompt_logprobs=chance.choice([-1, -1, -1, 0, 2]),
            stream=chance.random() < 0.3,
            hold_for_acks=chance.random() < 0.3,
            grammar=chance.choice(["", "", "", str(chance.randint(1, habits.max_tokens))]),
            sampling=Sampling(
                adjustments=chance.choice([None, None, Adjustments(frequency_penalty=1.0)])
            ),
        )
