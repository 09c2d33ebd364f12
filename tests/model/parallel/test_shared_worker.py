"""Workers that share each layer carry out everything that one worker alone does."""

from __future__ import annotations

import random
from collections import deque

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE
from rows import named
from safetensors.torch import save_file
from worker_driver import Driver, Enter, worker_config
from worker_script import ints, load_vocabulary, run, script

from tokasaurus.checkpoint_files import checkpoint_files
from tokasaurus.errors import ConfigError
from tokasaurus.model.linear_methods.base import LinearMethod
from tokasaurus.model.linear_methods.sharded import ShardedLinear
from tokasaurus.model.linear_methods.tiled import TiledLinear
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.commands import (
    Control,
    ControlDone,
    ReleaseMemory,
    RestoreMemory,
    UpdateWeights,
    WriteCartridge,
)
from tokasaurus.protocol.messages import ForwardResult, Sampling

SCRIPT = {"num_slots": 12, "num_pages": 200}


def worker_of(meeting, path, **fields):
    config = worker_config(path, rank=meeting.rank, tp_size=meeting.size, **fields)
    return Worker(config, load_vocabulary, meeting.rendezvous)


def carried_out(meeting, path, messages, in_flight, fields):
    worker = worker_of(meeting, path, **fields)
    results = run(worker, messages, in_flight)
    return results if worker.ranks.samples else [type(each) for each in results]


def assert_close(result, expected):
    """Equal but for the last bits of logprobs and hidden states."""
    assert (result is None) == (expected is None)
    for name in ForwardResult.__struct_fields__:
        one, other = getattr(result, name), getattr(expected, name)
        if name in ("device_s", "waited_s"):
            continue
        with named(name):
            if isinstance(other, np.ndarray) and other.dtype.kind == "f":
                np.testing.assert_allclose(one, other, atol=1e-4)
            elif isinstance(other, np.ndarray):
                assert one.tolist() == other.tolist()
            else:
                assert one == other


def controls_among(path, cartridge, batches):
    """Some batches come after an update, a refused one, a cartridge, and released memory."""
    free = ints(*sorted(set(range(200)) - {int(p) for b in batches for p in b.table_pages})[:2])
    same = tuple(map(str, checkpoint_files(path)))
    actions = [
        UpdateWeights(1, same),
        UpdateWeights(2, ("/absent",)),
        WriteCartridge((str(cartridge),), 20, free),
        ReleaseMemory(weights=True, kv_cache=False),
        RestoreMemory(weights=True, kv_cache=True),
    ]
    messages = []
    for number, batch in enumerate(batches):
        for action in actions if number in (1, 8) else ():
            messages.append(Control(len(messages), action))
        messages.append(msgspec.structs.replace(batch, number=len(messages)))
    return messages, len(actions)


def save_cartridge(path):
    generator = torch.Generator().manual_seed(0)
    names = [f"{kind}.{layer}" for layer in range(3) for kind in ("keys", "values")]
    save_file({name: torch.randn(20, 2, 16, generator=generator) for name in names}, path)


def test_grammars_penalties_forks_pooling_and_controls(checkpoint, ranks, tmp_path):
    save_cartridge(tmp_path / "cartridge")
    for architecture, size, in_flight in (("llama", 2, 1), ("qwen2", 4, 3)):
        path = checkpoint(architecture, tied=True)
        batches = script(worker_config(path, **SCRIPT))
        expected = run(Worker(worker_config(path, **SCRIPT), load_vocabulary), batches, 1)
        messages, num_actions = controls_among(path, tmp_path / "cartridge", batches)
        results, *others = ranks.run(size, carried_out, path, messages, in_flight, SCRIPT)
        assert others == [[type(each) for each in results]] * (size - 1)
        drawn = [each for each in results if isinstance(each, ForwardResult)]
        for number, (one, other) in enumerate(zip(drawn, expected, strict=True)):
            with named(f"{architecture}, {size} ranks, batch {number}"):
                assert_close(msgspec.structs.replace(one, number=other.number), other)
        answers = [each for each in results if isinstance(each, ControlDone)]
        first = [(each.error or "", each.weights_ready) for each in answers[:num_actions]]
        ready, refused = ("", True), ("/absent: No such file or directory", True)
        assert [ready, refused, ready, ("", False), ready] == [
            (refused[0] if "/absent" in error else error, is_ready) for error, is_ready in first
        ]


def written_heads(meeting, path, cartridge):
    worker = worker_of(meeting, path)
    worker.submit(Control(0, WriteCartridge((str(cartridge),), 20, ints(3, 5)))).collect()
    cache = worker._cache
    return [tensor[[3, 5]].transpose(0, 1).flatten(1, 2)[:, :20] for tensor in cache.keys]


def test_each_rank_writes_its_heads_of_a_cartridge(checkpoint, ranks, tmp_path):
    save_cartridge(tmp_path / "cartridge")
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(20, 2, 16, generator=generator) for _ in range(6)]
    for size, heads in ((2, (0, 1)), (4, (0, 0, 1, 1))):
        written = ranks.run(size, written_heads, checkpoint(tied=True), tmp_path / "cartridge")
        for own, head in zip(written, heads, strict=True):
            for layer, keys in enumerate(own):
                assert torch.equal(keys, tensors[2 * layer][:, head][None])


def refused_at_one_rank(meeting, path, files):
    """The last rank cannot read the files. Returns the answer, and whether tokens are the same."""
    worker = worker_of(meeting, path)
    driver = Driver(worker, worker_config(path))
    before = next_tokens(driver)
    if meeting.rank == meeting.size - 1:
        files = ("/absent",)
    answer = driver.control(UpdateWeights(1, files))
    return answer.error, before == next_tokens(driver)


def next_tokens(driver):
    driver.start(0)
    ids = [driver.step(prefill=[Enter(0, list(range(3, 40)))]).token_ids.tolist()]
    return ids + [driver.step(decode=[0]).token_ids.tolist() for _ in range(5)]


def test_what_one_rank_refuses_all_refuse(checkpoint, ranks):
    path, other = checkpoint(tied=True, seed=1), checkpoint(tied=True, seed=2)
    files = tuple(map(str, checkpoint_files(other)))
    for error, is_same in ranks.run(2, refused_at_one_rank, path, files):
        assert "/absent" in error
        assert is_same


def compositions(meeting, path, fields):
    """What each sequence gets alone, and beside others that come in random chunks."""
    worker = worker_of(meeting, path, deterministic=True, num_slots=6, **fields)
    assert worker.is_deterministic, worker.determinism_reason
    is_tiled = any(
        isinstance(each.method, ShardedLinear) and isinstance(each.method.method, TiledLinear)
        for each in worker._model.modules()
        if isinstance(getattr(each, "method", None), LinearMethod)
    )
    config = worker_config(path, num_slots=6)
    driver = Driver(worker, config)
    found = []
    for seed in range(4):
        chance = random.Random(seed)
        chunks = {}
        for slot in range(5) if seed else (0, 1):
            ids = [random.Random(slot).randrange(VOCAB_SIZE) for _ in range(20 + 9 * slot)]
            driver.start(slot, Sampling(temperature=0.9, top_p=0.9), seed=slot, num_logprobs=0)
            chunks[slot] = deque(driver.chunks(slot, ids, chance.choice((7, 16, 100))))
        results = {slot: [] for slot in chunks}
        while min(map(len, results.values())) < 8:
            decode = [s for s in chunks if results[s] and (not seed or chance.random() < 0.7)]
            waiting = [s for s in chunks if chunks[s]]
            prefill = [chunks[s].popleft() for s in (waiting if seed else waiting[:1])]
            drawn = driver.step(decode, prefill)
            rows = decode + [each.slot for each in prefill if each.ends_prompt]
            if worker.ranks.samples:
                pairs = zip(drawn.token_ids.tolist(), drawn.logprobs.tolist(), strict=True)
                for slot, pair in zip(rows, pairs, strict=len(drawn.logprobs) > 0):
                    results[slot].append(pair)
            else:
                for slot in rows:
                    results[slot].append(None)
        found.append([results[0][:8], results[1][:8]])
    return found, is_tiled


@pytest.mark.parametrize("fields", [{}, {"linear": "plain"}, {"quantization": "int8"}], ids=str)
def test_a_sequence_gets_the_same_bits_whatever_runs_beside_it(checkpoint, ranks, fields):
    path = checkpoint("llama", hidden_size=64, attention_bias=True)
    for size in (2, 4):
        (alone, *beside), is_tiled = ranks.run(size, compositions, path, fields)[0]
        assert beside == [alone] * 3
        assert is_tiled == (fields.get("linear") == "plain")


def int8_tokens(meeting, path):
    driver = Driver(worker_of(meeting, path, quantization="int8"), worker_config(path))
    driver.start(0, num_logprobs=0)
    result = driver.step(prefill=[Enter(0, list(range(3, 40)))])
    return result.logprobs.tolist()


def test_quantized_products_are_close_to_those_of_one_device(checkpoint, ranks):
    path = checkpoint("qwen3", num_heads=8, num_kv_heads=4)
    driver = Driver(Worker(worker_config(path)), worker_config(path))
    driver.start(0, num_logprobs=0)
    expected = driver.step(prefill=[Enter(0, list(range(3, 40)))]).logprobs.tolist()
    for size in (2, 4):
        assert ranks.run(size, int8_tokens, path)[0] == pytest.approx(expected, abs=0.3)


def sizes_of_weights(meeting, path):
    """The numbers of each weight that this rank's methods were filled with."""
    filled = {}

    def watch(method):
        original = method.fill

        def fill(part, kind, tensor):
            filled[id(method)] = filled.get(id(method), 0) + tensor.numel()
            original(part, kind, tensor)

        method.fill = fill

    def watched(self, share, method, parallel, original=ShardedLinear.__init__):
        watch(method)
        original(self, share, method, parallel)

    ShardedLinear.__init__, original = watched, ShardedLinear.__init__
    try:
        worker = worker_of(meeting, path)
    finally:
        ShardedLinear.__init__ = original
    return sum(filled.values()), worker._cache.num_bytes


def test_each_rank_has_its_share_of_weights_and_kv(checkpoint, ranks):
    path = checkpoint("llama", num_heads=8, num_kv_heads=4, num_layers=2)
    whole = Worker(worker_config(path))
    norms = 128 * (2 * 2 + 1)
    products = whole.weights.num_parameters - norms
    for size in (2, 4):
        found = ranks.run(size, sizes_of_weights, path)
        assert sum(numbers for numbers, _ in found) == products
        # But for an id more or less.
        assert max(numbers for numbers, _ in found) <= products / size + 2 * 128
        assert {num_bytes for _, num_bytes in found} == {whole._cache.num_bytes // size}


def refusal_of_attention(meeting, path):
    """Why a worker does not start whose attention is another one than the first worker's."""
    try:
        worker_of(meeting, path, attention="reference" if meeting.rank else "compiled").warm_up()
    except ConfigError as error:
        return str(error)
    return None


def test_workers_with_different_attention_refuse_together(checkpoint, ranks):
    one, other = ranks.run(2, refusal_of_attention, checkpoint("llama"))
    assert one == other
    assert "worker 1 runs attention=reference" in one
