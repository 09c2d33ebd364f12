"""Stand-ins for what surrounds the server: a tokenizer, a manager with a model, a web server."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import math
import random
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import openai
from known_cartridges import KnownCartridges
from loop_clock import LoopClock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.resolve import resolve
from tokasaurus.config.slices import ModelFacts, ServerConfig
from tokasaurus.launch.serving import http_server
from tokasaurus.protocol.commands import (
    AbortAll,
    Action,
    Command,
    CommandDone,
    CommandFailed,
    FlushCache,
    Pause,
    PauseMode,
    ReceiveWeights,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    UpdateWeights,
)
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FinishReason,
    FromServer,
    GenerateRequest,
    PooledState,
    PromptLogprobs,
    RequestRejected,
    SequenceUpdates,
    StopSequence,
)
from tokasaurus.protocol.watching import Watch
from tokasaurus.server.routes.batches import batch_runner, open_store
from tokasaurus.server.state import EngineState
from tokasaurus.text import tokenizer as server_tokenizer
from tokasaurus.text.cartridges import Cartridges
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.receipts import Receipts

T = TypeVar("T")

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + m['role']) }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if shout is defined and shout %}SHOUT{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = (BOS, EOS, "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
STOP_LAG = 16
PATIENCE_S = 60  # how long tests wait; they succeed sooner on any machine


def make_wrapped() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, naïve élan, hello world"] * 9, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE
    )


WRAPPED = make_wrapped()
VOCAB_SIZE = len(WRAPPED) + 5  # padded, as models are
EOS_ID = WRAPPED.eos_token_id
TOKENIZER = server_tokenizer.Tokenizer(WRAPPED, VOCAB_SIZE, [EOS_ID], trusts_templates=True)
UNTRUSTING = server_tokenizer.Tokenizer(WRAPPED, VOCAB_SIZE, [EOS_ID])

FACTS = ModelFacts(
    path="",
    vocab_size=VOCAB_SIZE,
    num_layers=64,
    hidden_size=64,
    num_heads=64,
    num_kv_heads=64,
    intermediate_size=64,
    max_position_embeddings=512,
    kv_elements_per_token=1,
    num_parameters=0,
    num_product_parameters=0,
    num_product_rows=0,
    activation_elements_per_token=0,
    eos_token_ids=(EOS_ID,),
)
CHOICES = EngineConfig(
    model="org/tiny-model-source",
    served_model_name="org/tiny-model",
    host="127.0.0.1",
    max_queued_requests=4096,
    max_body_bytes=1 << 20,
    max_n=1 << 16,
    max_request_priority=1_000_000,
    max_seqs_per_forward=64,
    max_topk_logprobs=20,
    stats_report_seconds=0.0,
    shutdown_timeout_s=5.0,
    trust_request_chat_template=True,
    uvicorn_log_level="warning",
)
# The defaults of all other flags; without a directory for files there are no batches.
CONFIG = replace(resolve(CHOICES, FACTS, num_cuda_devices=0, memory_bytes=None).server, data_dir="")
PREPARER = Preparer(CONFIG, TOKENIZER)
# Of the fake model, whose answers depend on nothing but the request.
IDENTITY = WorkerIdentity(
    is_deterministic=True,
    determinism_reason="it is not real",
    model={"architecture": "fake"},
    configuration={"dtype": "float32"},
    kernels={},
    environment={"threads": 1},
    weight_files=(),
)


def ids_of(text: str) -> list[int]:
    return TOKENIZER._encode(text, add_special_tokens=False)


def random_ids(request: GenerateRequest, index: int) -> list[int]:
    """The default answer of the fake model, which depends on the seed and the sample only.

    It begins with a letter: a part of a character would wait for the rest, and a stream that is
    held there would have no event.
    """
    rng = random.Random(f"{request.seed if request.sampling.temperature else 0}:{index}")
    (first,) = ids_of(rng.choice(string.ascii_letters))
    return [
        first,
        *(rng.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(request.max_tokens - 1)),
    ]


def logprob_row(token_id: int, number: int) -> tuple[float, list[int], list[float]]:
    """The logprob of a token, and the ``number`` best; every third id is the second best."""
    ids = [(token_id + 7 * i) % VOCAB_SIZE for i in range(max(number, 2))]
    values = [float(np.float32(-0.1 - 0.37 * i)) for i in range(max(number, 2))]
    if token_id % 3 == 0:
        ids[0], ids[1] = ids[1], ids[0]
    return values[ids.index(token_id)], ids[:number], values[:number]


def pooled_state(request: GenerateRequest) -> np.ndarray:
    """[8], not of length 1; depends on the prompt and the kind of pooling."""
    rng = np.random.default_rng([int(request.pooling), *request.prompt_ids.tolist()])
    return (3 * rng.standard_normal(8)).astype(np.float32)


@dataclass(eq=False)
class _Sequence:
    request: GenerateRequest
    index: int
    ids: list[int]
    position: int = 0
    acknowledged: int = 0
    # Generated, but not sent: ids, and the version of the weights that drew each.
    pending: list[tuple[int, int]] = field(default_factory=list)


class FakeEngine:
    """A manager with a model behind it, as far as the server can tell. It checks its messages.

    Attributes:
        script: the ids of a sample of a request; an EOS ends it early.
        received: every message from the server.
        num_sent_tokens: of all samples, including cancelled ones.
        paused: no sequence moves.
        hold_at: number of tokens at which every sequence stops moving; None: no such number.
        largest_step: tokens of a sequence in one update.
        most_running: largest number of samples that ran at once.
        weights_version: of the tokens that come from now on.
        obeys: carries commands out; otherwise it only answers them.
        refuse: answers commands of this type with an error.
        forgets_weights: a restore does not read the weights again.
        receives_all: the next tensors of a trainer are the last ones of the model.
        answers_commands: otherwise a command never ends.
    """

    def __init__(self, seed: int = 0) -> None:
        self.script: Callable[[GenerateRequest, int], list[int]] = random_ids
        self.received: list[FromServer] = []
        self.rng = random.Random(seed)
        self.reject: str | None = None
        self.num_cached_tokens = 0
        self.num_sent_tokens = 0
        self.paused = False
        self.hold_at: int | None = None
        self.largest_step = 3
        self.most_running = 0
        self.weights_version = 0
        self.obeys = True
        self.forgets_weights = self.receives_all = False
        self.answers_commands = True
        self.refuse: dict[type, tuple[str, str | None]] = {}
        self._is_held = False  # by a Pause
        self._released: set[str] = set()
        self._draining: tuple[int, set[tuple[int, int]]] | None = None  # command, sequences
        self._running: dict[tuple[int, int], _Sequence] = {}
        self._num_finished: Counter[int] = Counter()  # samples of each request
        self._outbox: list[object] = []

    # --- what the server calls ------------------------------------------------------------------

    def send(self, message: FromServer) -> None:
        self.received.append(message)
        if isinstance(message, GenerateRequest):
            self._begin(message)
        elif isinstance(message, AbortRequest):
            self._abort(message.request_id)
        elif isinstance(message, Command):
            self._carry_out(message.command_id, message.action)
        elif isinstance(message, StopSequence):
            sequence = self._running.get((message.request_id, message.sample_index))
            if sequence is not None:
                self._end(sequence, FinishReason.STOP)
        elif not isinstance(message, Watch):
            assert isinstance(message, Acknowledge)
            for request_id, index, count in zip(
                message.request_ids.tolist(),
                message.sample_indices.tolist(),
                message.num_tokens.tolist(),
                strict=True,
            ):
                if (request_id, index) in self._running:
                    self._running[request_id, index].acknowledged = count

    # --- what a test calls ----------------------------------------------------------------------

    @property
    def requests(self) -> list[GenerateRequest]:
        return [message for message in self.received if isinstance(message, GenerateRequest)]

    @property
    def aborted(self) -> set[int]:
        return {m.request_id for m in self.received if isinstance(m, AbortRequest)}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_moving(self) -> bool:
        """Whether more messages will come without a message to the engine."""
        if self.paused or (self._is_held and self._draining is None) or self._released:
            return bool(self._outbox)
        limit = math.inf if self.hold_at is None else self.hold_at
        return bool(self._outbox) or any(s.position < limit for s in self._running.values())

    def reset(self) -> None:
        """Restore the initial settings; running sequences stay."""
        self.obeys, self.answers_commands, self._is_held = True, True, False
        self.refuse, self._draining, self.forgets_weights = {}, None, False
        self.receives_all = False
        self._released.clear()
        self.script, self.reject, self.paused = random_ids, None, False
        self.hold_at, self.num_cached_tokens, self.largest_step = None, 0, 3
        self.received.clear()

    def forget(self) -> None:
        """Forget requests that have ended."""
        self.received.clear()
        self._num_finished.clear()

    def step(self) -> list[object]:
        """Take one turn: let every running sequence move, and return messages for the server."""
        messages, self._outbox = self._outbox, []
        rows = []
        for sequence in self._moving():
            if (sequence.request.request_id, sequence.index) not in self._running:
                continue  # cancelled, since enough others have ended
            row = self._advance(sequence)
            if row is not None:
                rows.append(row)
        if self._draining is not None and not self._draining[1] & self._running.keys():
            messages.append(CommandDone(self._draining[0]))
            self._draining = None
        self.rng.shuffle(rows)  # rows of one sequence stay in order: they are one entry
        flat = [row for each in rows for row in each]
        return [*messages, updates(flat)] if flat else messages

    def run(self, generations: Generations) -> None:
        """Take turns until nothing runs."""
        for _ in range(100_000):
            messages = self.step()
            if not messages and not self._running:
                return
            for message in messages:
                generations.absorb(message)
        raise AssertionError("the engine never comes to rest")

    # --- inside ---------------------------------------------------------------------------------

    def _moving(self) -> list[_Sequence]:
        if self.paused or self._released or (self._is_held and self._draining is None):
            return []
        if self._draining is None:
            return list(self._running.values())
        return [self._running[name] for name in self._draining[1] & self._running.keys()]

    def _carry_out(self, command_id: int, action: Action) -> None:
        if type(action) in self.refuse:
            reason, name = self.refuse[type(action)]
            self._outbox.append(CommandFailed(command_id, reason, name))
            return
        if not self.answers_commands:
            return
        done = CommandDone(command_id, weights_version=self.weights_version)
        if isinstance(action, FlushCache):
            done = CommandDone(command_id, 3, 48)
        elif isinstance(action, UpdateWeights):
            assert action.version > self.weights_version
            self.weights_version = action.version
            done = CommandDone(command_id, weights_version=action.version)
        elif isinstance(action, ReceiveWeights):
            done = CommandDone(
                command_id,
                weights_version=self.weights_version,
                has_all_tensors=self.receives_all,
            )
        elif not self.obeys:
            pass
        elif isinstance(action, AbortAll) or (
            isinstance(action, Pause) and action.mode is PauseMode.ABORT
        ):
            done = CommandDone(command_id, num_sequences=len(self._running))
            for sequence in list(self._running.values()):
                self._end(sequence, FinishReason.ABORT)
        if isinstance(action, Pause) and self.obeys:
            self._is_held = True
            if action.mode is PauseMode.DRAIN:
                self._draining = (command_id, {*self._running})
                return
        elif isinstance(action, Resume):
            self._is_held = False
        elif isinstance(action, UpdateWeights) and self.obeys:
            self._released.discard("weights")
        elif isinstance(action, ReleaseMemory | RestoreMemory) and self.obeys:
            for kind in ("weights", "kv_cache"):
                if getattr(action, kind) and isinstance(action, ReleaseMemory):
                    self._released.add(kind)
                elif getattr(action, kind):
                    self._released.discard(kind)
            is_there = isinstance(action, RestoreMemory) and "weights" not in self._released
            if is_there and self.forgets_weights:
                done = CommandDone(command_id, lacks_weights=True)
        self._outbox.append(done)

    def _begin(self, request: GenerateRequest) -> None:
        assert request.prompt_ids.dtype == np.int32
        assert request.max_tokens >= 1
        if self.reject is not None:
            self._outbox.append(RequestRejected(request.request_id, self.reject, "prompt"))
            return
        for index in range(request.n):
            ids = self.script(request, index)[: request.max_tokens]
            self._running[request.request_id, index] = _Sequence(request, index, ids)
        self.most_running = max(self.most_running, self.num_running)
        if request.pooling:
            assert (request.n, request.max_tokens) == (1, 1)
            self._outbox.append(PooledState(request.request_id, pooled_state(request)))
        if request.num_prompt_logprobs >= 0:
            self._outbox += _prompt_logprobs(request)

    def _advance(self, sequence: _Sequence) -> list[tuple] | None:
        """The rows of one sequence: of each version of the weights, in order."""
        request = sequence.request
        count = self.rng.randint(0, self.largest_step)
        if self.hold_at is not None:
            count = max(0, min(count, self.hold_at - sequence.position))
        if request.hold_for_acks:
            count = min(count, sequence.acknowledged + STOP_LAG - sequence.position)
        new = sequence.ids[sequence.position : sequence.position + count]
        for number, token_id in enumerate(new):
            if token_id in request.stop_token_ids:
                new = new[: number + 1]
        sequence.position += len(new)
        sequence.pending += [(token_id, self.weights_version) for token_id in new]
        if new and new[-1] in request.stop_token_ids and sequence.position < request.max_tokens:
            return self._end(sequence, FinishReason.STOP, report=False)
        if sequence.position >= len(sequence.ids):
            return self._end(sequence, FinishReason.LENGTH, report=False)
        if not (request.stream or request.hold_for_acks) or not new:
            return None
        return self._rows(sequence, FinishReason.RUNNING)

    def _rows(self, sequence: _Sequence, reason: FinishReason) -> list[tuple]:
        pending, sequence.pending = sequence.pending, []
        self.num_sent_tokens += len(pending)
        runs = [
            ([token_id for token_id, _ in run], version)
            for version, run in itertools.groupby(pending, key=lambda each: each[1])
        ] or [([], self.weights_version)]
        reasons = [FinishReason.RUNNING] * (len(runs) - 1) + [reason]
        return [
            (sequence.request, sequence.index, ids, each, self.num_cached_tokens, version)
            for (ids, version), each in zip(runs, reasons, strict=True)
        ]

    def _end(
        self, sequence: _Sequence, reason: FinishReason, *, report: bool = True
    ) -> list[tuple]:
        request_id = sequence.request.request_id
        del self._running[request_id, sequence.index]
        rows = self._rows(sequence, reason)
        if report:
            self._outbox.append(updates(rows))
        if reason is not FinishReason.ABORT:
            self._num_finished[request_id] += 1
            if self._num_finished[request_id] == sequence.request.first_k:
                self._abort(request_id)
        return rows

    def _abort(self, request_id: int) -> None:
        for index in [i for r, i in self._running if r == request_id]:
            self._end(self._running[request_id, index], FinishReason.ABORT)


def updates(rows: list[tuple]) -> SequenceUpdates:
    """A message of rows (request, sample index, new ids, finish reason, cached tokens, version).

    The version of the weights may be left out.
    """
    chosen, top_ids, top_logprobs = [], [], []
    for request, _, ids, *_ in rows:
        if request.num_logprobs >= 0:
            for token_id in ids:
                one, best, values = logprob_row(token_id, request.num_logprobs)
                chosen.append(one)
                top_ids += best
                top_logprobs += values
    return SequenceUpdates(
        request_ids=np.array([row[0].request_id for row in rows], np.int64),
        sample_indices=np.array([row[1] for row in rows], np.int32),
        num_tokens=np.array([len(row[2]) for row in rows], np.int32),
        finish_reasons=np.array([row[3] for row in rows], np.int32),
        num_cached_tokens=np.array([row[4] for row in rows], np.int32),
        num_logprobs=np.array([row[0].num_logprobs for row in rows], np.int32),
        weights_versions=np.array([(*row, 0)[5] for row in rows], np.int32),
        token_ids=np.array([i for row in rows for i in row[2]], np.int32),
        logprobs=np.array(chosen, np.float32),
        top_ids=np.array(top_ids, np.int32),
        top_logprobs=np.array(top_logprobs, np.float32),
    )


def _prompt_logprobs(request: GenerateRequest) -> list[PromptLogprobs]:
    """Two pieces; the second one comes twice, as after a preemption."""
    number, ids = request.num_prompt_logprobs, request.prompt_ids.tolist()
    middle = max(1, len(ids) // 2)
    pieces = []
    for first, last in ((1, middle), (middle, len(ids)), (middle, len(ids))):
        rows = [logprob_row(token_id, number) for token_id in ids[first:last]]
        pieces.append(
            PromptLogprobs(
                request.request_id,
                first,
                np.array([row[0] for row in rows], np.float32),
                np.array([1 + (token_id % 3 == 0) for token_id in ids[first:last]], np.int32),
                np.array([row[1] for row in rows], np.int32).reshape(len(rows), number),
                np.array([row[2] for row in rows], np.float32).reshape(len(rows), number),
            )
        )
    return pieces


@dataclass(frozen=True)
class Answer:
    """An answer over HTTP."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> dict:
        assert b"\n" not in self.content
        return json.loads(self.content)

    @property
    def error(self) -> dict:
        """The error, in the shape that OpenAI's clients expect."""
        body = self.json
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return body["error"]

    @property
    def events(self) -> list[dict]:
        """The chunks of a finished stream, read as the strictest client reads them."""
        assert self.headers["content-type"].startswith("text/event-stream")
        *lines, last, end = self.content.split(b"\n\n")
        assert (last, end) == (b"data: [DONE]", b"")
        assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
        return [json.loads(line.removeprefix(b"data: ")) for line in lines]


class _Connections:
    """One connection to a server for each thread, kept alive."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._own = threading.local()
        self._open: list[http.client.HTTPConnection] = []

    def ask(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> Answer:
        kept = getattr(self._own, "connection", None)
        if kept is not None:
            # The server may have closed the connection since.
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionError):
                return _ask(kept, method, path, data, headers)
        self._own.connection = http.client.HTTPConnection(
            "127.0.0.1", self._port, timeout=PATIENCE_S
        )
        self._open.append(self._own.connection)
        return _ask(self._own.connection, method, path, data, headers)

    def close(self) -> None:
        for each in self._open:
            each.close()


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    data: bytes | None,
    headers: dict[str, str],
) -> Answer:
    try:
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.headers), answer.read())
    except BaseException:
        connection.close()
        raise


def wait_for(condition: Callable[[], object]) -> None:
    """Return once a condition is true; fail after ``PATIENCE_S``."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never comes true"
        time.sleep(0.001)


def submit(
    generations: Generations, prompt_ids: list[int], params: SamplingParams, **options: object
) -> Generation:
    """Prepare a prompt under CONFIG, and start it."""
    return generations.start(PREPARER.prepare(prompt_ids, params), **options)


class RunningServer:
    """A server on a loopback port, in a thread, with a fake engine behind it."""

    def __init__(
        self, config: ServerConfig = CONFIG, *, ready: bool = True, directory: Path | None = None
    ) -> None:
        self.engine = FakeEngine()
        self._woken = asyncio.Event()  # the engine has a message
        self.state = EngineState()
        tokenizer = TOKENIZER if config.trust_request_chat_template else UNTRUSTING
        self.receipts = Receipts(config, tokenizer)
        self.receipts.adopt([IDENTITY])
        self.generations = Generations(
            config, tokenizer, self._send, self.state.metrics, self.receipts
        )
        self.preparer = Preparer(config, tokenizer, self.receipts)
        self.store = KnownCartridges(config.cartridge_shape)
        self.cartridges = Cartridges(
            self.store,
            config.cartridge_shape,
            config.max_request_tokens,
            self.generations.command,
        )
        self.disk: CartridgeStore | None = None  # for the routes that manage cartridges
        if config.data_dir:
            place = replace(config.cartridges, directory=f"{config.data_dir}/cartridges")
            self.disk = CartridgeStore(place)
        if ready:
            self.become_ready()
        self.batches = None
        if config.data_dir:
            self.batches = batch_runner(config, self.state, open_store(config))
        # A socket made from its number knows that it is TCP, so that asyncio sets TCP_NODELAY on
        # its connections. Without it, each answer but a connection's first takes 40 ms.
        self._listener = socket.socket(fileno=socket.create_server(("127.0.0.1", 0)).detach())
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = http_server(config, self.state, self.batches, directory)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clock: LoopClock | None = None
        self._connections = _Connections(self.port)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def _send(self, message: FromServer) -> None:
        self.engine.send(message)
        self._woken.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = LoopClock(self._loop)
        steps = asyncio.create_task(self._step_forever())
        if self.batches is not None:
            await self.batches.start()
        await self._server.serve(sockets=[self._listener])
        if self.batches is not None:
            await self.batches.close()
        steps.cancel()

    async def _step_forever(self) -> None:
        while True:
            self._woken.clear()
            for message in self.engine.step():
                self.generations.absorb(message)
            if self.engine.is_moving:
                await asyncio.sleep(0)
            else:
                with contextlib.suppress(asyncio.TimeoutError):  # a test may change the engine
                    await asyncio.wait_for(self._woken.wait(), 0.003)

    def become_ready(self) -> None:
        """Tell the server that the model is loaded; once it runs, on the event loop only."""
        self.state.ready(self.preparer, self.generations, self.cartridges, self.disk)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the event loop, and wait for it."""
        done = threading.Event()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(PATIENCE_S)

    def settle(self) -> None:
        """Return when the event loop has read what it was sent so far."""
        for _ in range(2):
            self.call(lambda: None)

    def advance(self, seconds: float) -> None:
        """Move the clock of the event loop: time limits that are over by then end now."""
        self.settle()
        assert self._clock is not None
        self._clock.advance(seconds)
        self.settle()

    def on_loop(self, work: Coroutine[Any, Any, T], timeout_s: float = PATIENCE_S) -> T:
        """Run a coroutine on the event loop, and wait for its result."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def has_connection(self, client: socket.socket) -> bool:
        """Whether the server has accepted a client's connection."""
        connections = list(self._server.server_state.connections)
        return any(each.client == client.getsockname() for each in connections)

    def post(self, path: str, body: object, **headers: str) -> Answer:
        """Post JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", path, data, {"Content-Type": "application/json", **headers})

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask("GET", path, None, headers)

    def _ask(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> Answer:
        return self._connections.ask(method, path, data, headers)

    async def call_app(self, path: str, data: bytes) -> Answer:
        """Post JSON to the application without a connection; runs on the event loop."""
        done, messages = asyncio.Event(), [{"type": "http.request", "body": data}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", self.port),
        }
        await self._server.config.app(scope, receive, send)
        done.set()
        begin, *pieces = sent
        named = {name.decode().lower(): value.decode() for name, value in begin["headers"]}
        return Answer(begin["status"], named, b"".join(each.get("body", b"") for each in pieces))

    def client(self, **options: object) -> openai.OpenAI:
        """OpenAI's client without retries, and without certificates, which take long to load."""
        values: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
        http = openai.DefaultHttpxClient(verify=False)
        base_url = f"{self.url}/v1"
        return openai.OpenAI(base_url=base_url, http_client=http, **values | options)

    def async_client(self) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(verify=False)
        return openai.AsyncOpenAI(
            api_key="none",
            base_url=f"{self.url}/v1",
            http_client=http,
            max_retries=0,
            timeout=PATIENCE_S,
        )

    def wait_idle(self) -> None:
        """Return once nothing is in flight in the server or in the engine."""
        wait_for(lambda: not len(self.generations) and not self.engine.num_running)

    def check_nothing_is_left(self) -> None:
        """Check that no table keeps anything of the requests so far; the engine forgets them."""
        self.wait_idle()
        turnstile = self.generations._turnstile
        assert (turnstile.num_open, turnstile.num_held) == (0, 0)
        assert not self.generations._num_of_client
        self.engine.forget()
        assert self.get("/health").json == {"status": "ok", "running": 0}

    @contextlib.contextmanager
    def running(self) -> Iterator[RunningServer]:
        self._thread.start()
        wait_for(lambda: self._server.started)
        assert self._clock is not None
        try:
            yield self
        finally:
            self._connections.close()
            self._server.should_exit = True
            while self._thread.is_alive():
                # uvicorn checks ten times a second whether it should exit.
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._clock.advance(0.1)
                self._thread.join(0.01)


def with_config(**changes: object) -> ServerConfig:
    return replace(CONFIG, **changes)
