"""Random requests that run beside each other, and what each of them gets.

A manager and a worker run in this process. A *composition* is a choice of requests, with the turns
in which they arrive, and of some that are aborted. Everything follows from a seed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from checkpoints import EOS_ID, VOCAB_SIZE
from simulation import make_config
from worker_driver import worker_config
from worker_script import load_vocabulary

from tokasaurus.manager.manager import Manager
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.commands import Command, FlushCache
from tokasaurus.protocol.messages import (
    AbortRequest,
    Adjustments,
    FinishReason,
    FromServer,
    FromWorker,
    GenerateRequest,
    LogprobsMode,
    PooledState,
    Pooling,
    PromptLogprobs,
    RequestRejected,
    Sampling,
    SequenceUpdates,
    ToServer,
)
from tokasaurus.rounding import ceil_div

__all__ = ["Answer", "Engine", "Setting", "composition", "differences", "random_requests"]

MAX_REQUEST_TOKENS = 1600
MAX_LOGPROBS = 6


@dataclass(frozen=True)
class Setting:
    """How an engine runs. Its results should not depend on the fields below ``dtype``."""

    instruction_set: str = "auto"
    dtype: str = "float32"
    page_size: int = 16
    num_threads: int = 1
    max_tokens_per_forward: int = MAX_REQUEST_TOKENS
    max_seqs_per_forward: int = 16
    use_groups: bool = False
    force_preemption: bool = False
    steps_ahead: int = 1
    # Of the KV cache. Few make sequences preempt one another.
    num_tokens: int = 16 * MAX_REQUEST_TOKENS

    @staticmethod
    def random(chance: random.Random, instruction_set: str, dtype: str, **fields) -> Setting:
        """Another setting for the same results."""
        choices = {
            "page_size": chance.choice((1, 7, 16, 64)),
            "num_threads": chance.choice((1, 2)),
            "max_tokens_per_forward": chance.choice((24, 65, 200, 1000)),
            "max_seqs_per_forward": chance.choice((3, 8, 16)),
            "use_groups": chance.random() < 0.6,
            "force_preemption": chance.random() < 0.3,
            "steps_ahead": chance.choice((1, 2, 4)),
            "num_tokens": chance.choice((2 * MAX_REQUEST_TOKENS, 16 * MAX_REQUEST_TOKENS)),
        }
        return Setting(instruction_set, dtype, **{**choices, **fields})


@dataclass
class Answer:
    """What a request gets: bytes, so that every bit counts."""

    samples: dict[int, dict[str, bytes]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    prompt: dict[int, tuple[bytes, ...]] = field(default_factory=dict)  # by position
    pooled: bytes = b""
    rejected: str = ""

    def absorb(self, sample: int, **arrays: np.ndarray) -> None:
        """Adds tokens to a sample."""
        known = self.samples.setdefault(sample, dict.fromkeys(arrays, b""))
        for name, array in arrays.items():
            known[name] += array.tobytes()


def differences(one: Answer, other: Answer) -> list[str]:
    """Where two answers differ, with the first token that does."""
    found = []
    if one.rejected or other.rejected:
        return [f"rejected: {one.rejected!r}, {other.rejected!r}"]
    if one.reasons != other.reasons:
        found.append(f"reasons {one.reasons} and {other.reasons}")
    for sample, arrays in one.samples.items():
        for name, value in arrays.items():
            beside = other.samples.get(sample, {}).get(name, b"")
            if value != beside:
                a, b = np.frombuffer(value, np.int32), np.frombuffer(beside, np.int32)
                count = min(len(a), len(b))
                places = np.flatnonzero(a[:count] != b[:count])[:5].tolist()
                found.append(f"sample {sample}: {name} at {places} of {len(a)} and {len(b)}")
    positions = [p for p in one.prompt if one.prompt[p] != other.prompt.get(p)]
    if positions or len(one.prompt) != len(other.prompt):
        found.append(f"prompt logprobs at {positions[:5]} of {len(one.prompt)}")
    if one.pooled != other.pooled:
        found.append("the pooled state")
    return found


class Engine:
    """A manager and a worker.

    Args:
        path: of a checkpoint.
        setting: of both.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        shared = {
            "page_size": setting.page_size,
            "num_pages": ceil_div(setting.num_tokens, setting.page_size),
            "num_slots": 2 * setting.max_seqs_per_forward,
            "max_seqs_per_forward": setting.max_seqs_per_forward,
            "max_tokens_per_forward": setting.max_tokens_per_forward,
            "max_request_tokens": MAX_REQUEST_TOKENS,
        }
        self.manager = Manager(
            make_config(
                **shared,
                use_groups=setting.use_groups,
                min_group_size=2,
                min_prefix_len=1,
                force_preemption=setting.force_preemption,
                scheduling_steps_ahead=setting.steps_ahead,
                adapt_steps_ahead=False,
            )
        )
        self._threads = setting.num_threads
        before = torch.get_num_threads()
        # The probe runs with them.
        torch.set_num_threads(setting.num_threads)
        config = worker_config(
            path,
            **shared,
            dtype=setting.dtype,
            instruction_set=setting.instruction_set,
            use_groups=setting.use_groups,
            deterministic=True,
            max_topk_logprobs=MAX_LOGPROBS,
        )
        try:
            self._worker = Worker(config, load_vocabulary)
        finally:
            torch.set_num_threads(before)
        self._pending: deque = deque()
        self._results: list[FromWorker] = []
        self._now, self._next_id, self._num_commands = 0.0, 0, 0
        self.num_batches = self.num_grouped = 0

    def alone(self, request: GenerateRequest) -> Answer:
        """What a request gets by itself, without a cached prefix."""
        self._num_commands += 1
        self._turn([Command(self._num_commands, FlushCache())])
        ((answer),) = self.run([request], [0], [None])
        return answer

    def run(
        self,
        requests: list[GenerateRequest],
        arrivals: list[int],
        aborts: list[int | None],
    ) -> list[Answer]:
        """Runs requests beside each other.

        Args:
            requests: their ids are replaced.
            arrivals: the turn of each.
            aborts: the turn after which each is aborted; None for those that are not.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return self._run(requests, arrivals, aborts)
        finally:
            torch.set_num_threads(before)

    def _run(
        self, requests: list[GenerateRequest], arrivals: list[int], aborts: list[int | None]
    ) -> list[Answer]:
        first = self._next_id
        self._next_id += len(requests)
        answers = [Answer() for _ in requests]
        last = max([0, *arrivals, *(turn or 0 for turn in aborts)])
        for turn in range(1_000_000):
            if turn > last and self.manager.idle and not self._results and not self._pending:
                return answers
            events: list[FromServer] = [
                msgspec.structs.replace(request, request_id=first + number)
                for number, request in enumerate(requests)
                if arrivals[number] == turn
            ]
            events += [
                AbortRequest(first + number)
                for number, abort in enumerate(aborts)
                if abort is not None and abort == turn
            ]
            for message in self._turn(events):
                _receive(message, first, answers)
        raise AssertionError("the requests do not end")

    def _turn(self, events: list[FromServer]) -> list[ToServer]:
        self._now += 0.001
        actions = self.manager.take_turn([*events, *self._results], self._now)
        self._results = []
        for order in actions.to_worker:
            self._pending.append(self._worker.submit(order))
            self.num_batches += 1
        if self._pending:
            result = self._pending.popleft().collect()
            self.num_grouped += getattr(result, "num_grouped_tokens", 0)
            self._results.append(result)
        return actions.messages


def _receive(message: ToServer, first: int, answers: list[Answer]) -> None:
    if isinstance(message, SequenceUpdates):
        _receive_updates(message, first, answers)
    elif isinstance(message, PromptLogprobs):
        answer = answers[message.request_id - first]
        for row in range(len(message.logprobs)):
            arrays = (message.logprobs, message.ranks, message.top_ids, message.top_logprobs)
            answer.prompt[message.first_position + row] = tuple(
                array[row].tobytes() for array in arrays
            )
    elif isinstance(message, PooledState):
        answers[message.request_id - first].pooled = message.state.tobytes()
    elif isinstance(message, RequestRejected):
        answers[message.request_id - first].rejected = message.reason


def _receive_updates(message: SequenceUpdates, first: int, answers: list[Answer]) -> None:
    token = logprob = top = 0
    for row, request_id in enumerate(message.request_ids.tolist()):
        answer = answers[request_id - first]
        count, depth = int(message.num_tokens[row]), int(message.num_logprobs[row])
        asked, wanted = (count if depth >= 0 else 0), count * max(depth, 0)
        sample = int(message.sample_indices[row])
        answer.absorb(
            sample,
            token_ids=message.token_ids[token : token + count],
            logprobs=message.logprobs[logprob : logprob + asked],
            top_ids=message.top_ids[top : top + wanted],
            top_logprobs=message.top_logprobs[top : top + wanted],
        )
        token, logprob, top = token + count, logprob + asked, top + wanted
        reason = FinishReason(int(message.finish_reasons[row]))
        if reason is not FinishReason.RUNNING:
            answer.reasons[sample] = reason


# --- random requests ------------------------------------------------------------------------------

_GRAMMARS = ("start: /[a-z]{3,40}/", "start: /a+b[ab]{10}/", "start: /(ab|cd)*x/")


def random_requests(
    seed: int, count: int, vocab_size: int = VOCAB_SIZE, longest: int = 1000
) -> list[GenerateRequest]:
    """Requests of all kinds. Many share a prefix.

    Args:
        seed: decides everything.
        count: how many.
        vocab_size: ids are below it.
        longest: tokens of a prompt, about.
    """
    chance = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [chance.randrange(vocab_size) for _ in range(length)]

    lengths = (10, 64, 150, 500)
    prefixes = [[], *(ids(min(length, longest // 2)) for length in lengths)]
    prompts: list[list[int]] = []
    requests = []
    for number in range(count):
        length = chance.choice((1, 2, 5, 30, 63, 64, 65, 130, chance.randint(1, longest // 2)))
        prompt = chance.choice(prefixes) + ids(length)
        if prompts and chance.random() < 0.1:
            prompt = chance.choice(prompts)
        prompts.append(prompt)
        requests.append(_random_request(chance, number, prompt, vocab_size))
    return requests


def _random_request(
    chance: random.Random, number: int, prompt: list[int], vocab_size: int
) -> GenerateRequest:
    common = {
        "request_id": number,
        "prompt_ids": np.array(prompt, np.int32),
        "seed": chance.randrange(1 << 60),
        "stop_token_ids": (EOS_ID,) if chance.random() < 0.5 else (),
        "stream": chance.random() < 0.3,
    }
    if chance.random() < 0.1:
        pooling = chance.choice((Pooling.MEAN, Pooling.LAST))
        return GenerateRequest(n=1, max_tokens=1, sampling=Sampling(), pooling=pooling, **common)
    has_grammar = vocab_size == VOCAB_SIZE and chance.random() < 0.15
    if has_grammar:
        # A text that is complete ends, as the server sees to.
        common["stop_token_ids"] = load_vocabulary().eos_token_ids
    return GenerateRequest(
        n=chance.choice((1, 1, 1, 2, 3)),
        max_tokens=chance.choice((1, 2, 8, 8, 20, 20, 70)),
        sampling=_random_sampling(chance, vocab_size),
        num_logprobs=chance.choice((0, 0, 1, 5)),
        num_prompt_logprobs=chance.choice((-1, -1, -1, 0, 3)),
        grammar=chance.choice(_GRAMMARS) if has_grammar else "",
        **common,
    )


def _random_sampling(chance: random.Random, vocab_size: int) -> Sampling:
    def maybe(share: float, value: Callable[[], float], default: float) -> float:
        return value() if chance.random() < share else default

    return Sampling(
        temperature=chance.choice((0.0, 0.3, 1.0, 1.0, 1.7)),
        top_k=int(maybe(0.3, lambda: chance.choice((1, 5, 40, 200)), 0)),
        top_p=maybe(0.4, lambda: chance.choice((0.1, 0.8, 0.95)), 1.0),
        min_p=maybe(0.3, lambda: chance.choice((0.01, 0.2)), 0.0),
        logprobs_mode=chance.choice(list(LogprobsMode)),
        adjustments=_random_adjustments(chance, vocab_size) if chance.random() < 0.4 else None,
    )


def _random_adjustments(chance: random.Random, vocab_size: int) -> Adjustments:
    def token() -> int:
        return chance.randrange(vocab_size)

    return Adjustments(
        bad_words=tuple(
            tuple(token() for _ in range(chance.choice((1, 2, 3))))
            for _ in range(chance.choice((0, 0, 3)))
        ),
        min_tokens=chance.choice((0, 3)),
        late_ids=(EOS_ID,),
        bias=tuple((token(), chance.uniform(-3, 3)) for _ in range(chance.choice((0, 2, 9)))),
        repetition_penalty=chance.choice((1.0, 1.0, 1.3)),
        frequency_penalty=chance.choice((0.0, 0.4)),
        presence_penalty=chance.choice((0.0, 0.4)),
    )


def composition(chance: random.Random, count: int) -> tuple[list[int], list[int], list[int | None]]:
    """Which of ``count`` requests run, with their turns of arrival and of being aborted."""
    chosen = [chance.randrange(count) for _ in range(chance.choice((1, 2, 4, 8, 12)))]
    spread = chance.choice((0, 3, 30))
    arrivals = [chance.randint(0, spread) for _ in chosen]
    aborts = [
        arrival + chance.randint(0, 15) if chance.random() < 0.1 else None for arrival in arrivals
    ]
    return chosen, arrivals, aborts
