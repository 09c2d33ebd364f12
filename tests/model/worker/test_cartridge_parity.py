"""A manager and a worker together: a cartridge stands for the tokens that made it.

The keys and values of a prompt's first tokens are saved as a cartridge. The rest of the prompt
behind it gets the same logprobs as in the whole prompt: to 1e-5, which a position that is off by
one would miss by far.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from checkpoints import VOCAB_SIZE
from rows import named
from safetensors.torch import load_file, save_file
from simulation import make_config
from worker_driver import generate, make_driver, worker_config

from tokasaurus.manager.manager import Manager
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.commands import (
    Action,
    Command,
    CommandDone,
    LoadCartridge,
    ReleaseMemory,
    RestoreMemory,
    UnloadCartridge,
)
from tokasaurus.protocol.messages import (
    FromServer,
    FromWorker,
    GenerateRequest,
    PromptLogprobs,
    RequestRejected,
    Sampling,
    SequenceUpdates,
    ToServer,
)

TOLERANCE = 1e-5


def make_ids(count: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(count)]


def save_cartridge(model: Path, ids: list[int], path: Path) -> None:
    """What a worker computes for these tokens, as a cartridge."""
    driver = make_driver(model)
    generate(driver, [*ids, 0], 1)
    cache, pages = driver.worker._cache, driver.held[0]
    save_file(
        {
            f"{kind}.{layer}": tensor[pages].transpose(1, 2).flatten(0, 1)[: len(ids)].contiguous()
            for kind, tensors in (("keys", cache.keys), ("values", cache.values))
            for layer, tensor in enumerate(tensors)
        },
        path,
    )


class Engine:
    """A manager and a worker in one process."""

    def __init__(self, model: Path, **changes: object) -> None:
        config = worker_config(model)
        sizes = {
            "page_size": config.page_size,
            "num_pages": config.num_pages,
            "num_slots": config.num_slots,
            "max_request_tokens": config.max_request_tokens,
            "max_tokens_per_forward": 13,
        }
        self.manager = Manager(make_config(**{**sizes, **changes}))
        self.worker = Worker(config)
        self.messages: list[ToServer] = []
        self.num_commands = 0

    def run(self, *events: FromServer) -> None:
        arrived: list[FromServer | FromWorker] = list(events)
        while arrived or not self.manager.idle:
            actions = self.manager.take_turn(arrived, 0.0)
            self.messages += actions.messages
            arrived = [self.worker.submit(order).collect() for order in actions.to_worker]

    def command(self, action: Action) -> None:
        self.num_commands += 1
        self.run(Command(self.num_commands, action))
        answer = self.messages[-1]
        assert isinstance(answer, CommandDone), answer

    def tokens(self) -> dict[tuple[int, int], list[tuple[int, float]]]:
        """The ids and logprobs of all sequences, by request and sample."""
        found = {}
        for update in self.messages:
            if not isinstance(update, SequenceUpdates):
                continue
            pairs = list(zip(update.token_ids.tolist(), update.logprobs.tolist(), strict=True))
            names = zip(update.request_ids.tolist(), update.sample_indices.tolist(), strict=True)
            ends = np.cumsum(update.num_tokens).tolist()
            for name, count, end in zip(names, update.num_tokens.tolist(), ends, strict=True):
                found[name] = pairs[end - count : end]
        return found

    def prompt_logprobs(self, request_id: int) -> dict[int, float]:
        """By position in the request's own prompt."""
        return {
            message.first_position + index: logprob
            for message in self.messages
            if isinstance(message, PromptLogprobs) and message.request_id == request_id
            for index, logprob in enumerate(message.logprobs.tolist())
        }


def request(request_id: int, ids: list[int], cartridge: str = "", n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_ids=np.array(ids, np.int32),
        n=n,
        max_tokens=8,
        sampling=Sampling(temperature=1.0),
        seed=7,
        stop_token_ids=(),
        num_logprobs=0,
        num_prompt_logprobs=0,
        cartridge=cartridge,
    )


def test_a_cartridge_stands_for_the_tokens_that_made_it(checkpoint, tmp_path) -> None:
    for architecture in ("llama", "qwen3"):
        model, ids = checkpoint(architecture), make_ids(60)
        for num_tokens in (1, 15, 16, 17, 33):
            with named((architecture, num_tokens)):
                path = tmp_path / f"{architecture} {num_tokens}"
                save_cartridge(model, ids[:num_tokens], path)
                check_cartridge(Engine(model), path, ids, num_tokens)


def check_cartridge(engine: Engine, path: Path, ids: list[int], num_tokens: int) -> None:
    engine.run(request(1, ids, n=3))
    scores = engine.prompt_logprobs(1)
    engine.command(LoadCartridge("a", (str(path),), num_tokens))
    for request_id in (2, 3):
        engine.run(request(request_id, ids[num_tokens:], "a", n=3))
        tokens = engine.tokens()
        for sample in range(3):
            found, expected = tokens[request_id, sample], tokens[1, sample]
            assert [token for token, _ in found] == [token for token, _ in expected]
            logprobs = [logprob for _, logprob in expected]
            assert [logprob for _, logprob in found] == pytest.approx(logprobs, abs=TOLERANCE)
        own = engine.prompt_logprobs(request_id)
        assert sorted(own) == list(range(1, len(ids) - num_tokens))
        expected_scores = [scores[num_tokens + position] for position in sorted(own)]
        assert [own[p] for p in sorted(own)] == pytest.approx(expected_scores, abs=TOLERANCE)
        # After a release the file is read again.
        engine.command(ReleaseMemory(weights=False, kv_cache=True))
        engine.command(RestoreMemory(weights=False, kv_cache=True))
    engine.command(UnloadCartridge("a"))


def ids_of(engine: Engine) -> dict[tuple[int, int], list[int]]:
    return {name: [token for token, _ in pairs] for name, pairs in engine.tokens().items()}


def test_preempted_sequences_behind_a_cartridge_get_the_same_tokens(checkpoint, tmp_path) -> None:
    model, ids = checkpoint("llama"), make_ids(40)
    path = tmp_path / "cartridge"
    save_cartridge(model, ids[:21], path)
    requests = [request(i, ids[21:] + make_ids(4, i), "a", n=2) for i in range(4)]
    alone = Engine(model)
    alone.command(LoadCartridge("a", (str(path),), 21))
    for each in requests:
        alone.run(each)
    expected = ids_of(alone)
    assert len(expected) == 8
    for changes in ({"num_pages": 8}, {"force_preemption": True}):
        with named(changes):
            engine = Engine(model, **changes)
            engine.command(LoadCartridge("a", (str(path),), 21))
            engine.run(*requests)
            assert ids_of(engine) == expected
            assert engine.manager.counters.num_preemptions > 0


def test_cartridges_that_are_evicted_and_written_again_give_the_same_answers(
    checkpoint, tmp_path
) -> None:
    """There is room for one of two cartridges beside the text behind it, and their requests mix."""
    model, ids = checkpoint("llama"), make_ids(80)
    roomy, tight = Engine(model), Engine(model, num_pages=9)
    for name, own in (("a", ids[:61]), ("b", ids[10:80])):
        save_cartridge(model, own, tmp_path / name)
        for engine in (roomy, tight):
            engine.command(LoadCartridge(name, (str(tmp_path / name),), len(own)))
    requests = [request(i, make_ids(9, i), "ab"[i % 2]) for i in range(8)]
    for each in requests:
        roomy.run(each)
        tight.run(each)
    tight.run(*[msgspec.structs.replace(each, request_id=i + 8) for i, each in enumerate(requests)])
    expected, found = ids_of(roomy), ids_of(tight)
    for i in range(8):
        assert found[i, 0] == found[i + 8, 0] == expected[i, 0]
    assert roomy.manager.statistics().num_cartridge_loads == 2
    assert tight.manager.statistics().num_cartridge_evictions > 6


def test_several_files_are_one_cartridge(checkpoint, tmp_path) -> None:
    """A text's cartridge that is cut in two is the same cartridge again."""
    model, ids = checkpoint("qwen3"), make_ids(50)
    save_cartridge(model, ids[:37], tmp_path / "whole")
    tensors = load_file(tmp_path / "whole")
    cuts = {"first": slice(0, 21), "second": slice(21, 37)}
    for name, cut in cuts.items():
        save_file({key: each[cut].contiguous() for key, each in tensors.items()}, tmp_path / name)
    engine = Engine(model)
    engine.command(LoadCartridge("a", (str(tmp_path / "whole"),), 37))
    engine.command(LoadCartridge("b", tuple(str(tmp_path / name) for name in cuts), 37))
    engine.run(request(1, ids[37:], "a"))
    engine.run(request(2, ids[37:], "b"))
    found = engine.tokens()
    assert found[1, 0] == found[2, 0]


def test_a_file_that_cannot_be_read_ends_the_requests_that_name_it(checkpoint, tmp_path) -> None:
    model, ids = checkpoint("llama"), make_ids(40)
    engine = Engine(model)
    engine.command(LoadCartridge("a", (str(tmp_path / "absent"),), 21))
    engine.run(request(1, ids, "a"), request(2, ids))
    (rejection,) = [each for each in engine.messages if isinstance(each, RequestRejected)]
    assert (rejection.request_id, rejection.field) == (1, "cartridges")
    assert "absent cannot be read" in rejection.reason
    assert list(engine.tokens()) == [(2, 0)]
    # It has come in the meantime.
    save_cartridge(model, ids[:21], tmp_path / "absent")
    engine.run(request(3, ids[21:], "a"))
    assert len(engine.tokens()[3, 0]) == 8


def test_attention_reads_the_pages_of_a_cartridge_once_for_all_sequences(
    checkpoint, tmp_path
) -> None:
    model, ids = checkpoint("llama"), make_ids(100)
    save_cartridge(model, ids, tmp_path / "cartridge")
    requests = [request(i, make_ids(3, i), "a") for i in range(8)]
    found: list[dict[tuple[int, int], list[tuple[int, float]]]] = []
    for use_groups in (True, False):
        engine = Engine(model, use_groups=use_groups, max_tokens_per_forward=64)
        engine.command(LoadCartridge("a", (str(tmp_path / "cartridge"),), 100))
        engine.run(*requests)
        found.append(engine.tokens())
        num_decoded = engine.manager.counters.num_decode_tokens
        num_grouped = engine.manager.counters.num_grouped_tokens
        assert num_grouped == (num_decoded if use_groups else 0)
        assert (engine.manager.counters.num_grouped_prefill_tokens > 0) == use_groups
    for name, expected in found[1].items():
        assert [token for token, _ in found[0][name]] == [token for token, _ in expected]
        logprobs = [logprob for _, logprob in expected]
        assert [each for _, each in found[0][name]] == pytest.approx(logprobs, abs=TOLERANCE)
