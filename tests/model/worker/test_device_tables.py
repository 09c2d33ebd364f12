"""The device's tables say what the host's say, and from step to step almost nothing is sent."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path

import torch
from rows import named
from torch.utils._python_dispatch import TorchDispatchMode
from worker_driver import Driver, Enter, worker_config

from tokasaurus.model import upload
from tokasaurus.model.sampling.kinds import draw_rows
from tokasaurus.model.worker.slot_state import SlotState
from tokasaurus.protocol.messages import Sampling

KERNELS = object()
"""That there are kernels is all that planning asks."""


def make(num_slots=8, kernels=KERNELS):
    config = worker_config(Path(), num_slots=num_slots, num_pages=256)
    state = SlotState(
        num_slots=num_slots,
        num_pages=config.num_pages,
        page_size=config.page_size,
        max_request_tokens=config.max_request_tokens,
        vocab_size=100,
        device=torch.device("cpu"),
        kernels=kernels,
    )
    return Driver(None, config), state


def start(driver, slot, seed):
    sampling = Sampling(temperature=seed % 3 / 2, top_k=seed % 5, top_p=1 - seed % 2 / 4)
    driver.start(slot, sampling, seed=seed, sample_index=slot, num_generated=seed % 4)


def check(state, planned, before):
    """``before`` has the host's parameters before the batch."""
    sequences, sampling = planned.sequences, planned.sampling
    assert planned.positions.tolist() == sequences.positions.tolist()
    assert planned.positions.dtype == planned.inputs.dtype == torch.int64
    count = sequences.num_decodes
    for found, expected in (
        (sequences.decode_slots, sequences.slots[:count]),
        (sequences.decode_lengths, sequences.kv_lengths[:count]),
        (sampling.device_slots.tensor, sampling.slots),
    ):
        assert found.tolist() == expected.tolist()
    used = state.lengths > 0
    assert state._tables.lengths.numpy()[used].tolist() == state.lengths[used].tolist()
    if len(sampling.slots):
        draws = (
            sampling.parts[0].draws.rows.tensor.numpy().reshape(-1).view(draw_rows(before).dtype)
        )
        expected = draw_rows(before.take(sampling.slots))
        # If all are greedy, nothing else of a row matters.
        for name in draws.dtype.names:
            is_drawn = expected["temperature"] > 0
            assert draws[name][is_drawn].tolist() == expected[name][is_drawn].tolist(), name
        assert draws["temperature"].tolist() == expected["temperature"].tolist()


def random_batch(source, driver, running, number):
    """Prompts in chunks, forks, and decodes of the same or of other sequences."""
    starting = []
    if source.random() < 0.3:
        free = [slot for slot in range(8) if slot not in running]
        starting = source.sample(free, min(len(free), source.randint(0, 3)))
    decoding = running if source.random() < 0.7 else source.sample(running, len(running) // 2)
    if source.random() < 0.2:
        source.shuffle(running)
    decoding = [slot for slot in decoding if driver.lengths[slot] < 200]
    chunks = []
    for slot in starting:
        start(driver, slot, number * 8 + slot)
        chunks.append(Enter(slot, [7] * source.randint(1, 40), 0, source.random() < 0.8))
    batch = driver.batch(decoding, chunks)
    running += [chunk.slot for chunk in chunks if chunk.ends_prompt]
    for chunk in chunks:
        if not chunk.ends_prompt:
            driver.lengths.pop(chunk.slot, None)
    for slot in running[:]:
        if source.random() < 0.06:
            running.remove(slot)
    return batch


def test_random_batches_leave_both_sides_with_the_same_numbers():
    for seed in range(30):
        source, (driver, state), running = random.Random(seed), make(), []
        with named(seed):
            for number in range(40):
                batch = random_batch(source, driver, running, number)
                before = state.sampling.take(slice(None))
                before = type(before)(before._rows.copy())
                if batch.parameters is not None:
                    before.assign(batch.parameters)
                planned = state.apply(batch)
                check(state, planned, before)
                tokens = torch.arange(len(planned.sampling.slots)) + number
                state.record(planned.sampling, tokens)
                last = state.last_tokens[torch.from_numpy(planned.sampling.slots).long()]
                assert last.tolist() == tokens.tolist()
            state.clear()
            assert not state._tables.lengths.any()


class CountedCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_of_the_same_sequences_sends_new_pages_only(monkeypatch):
    """However many they are, it makes as many calls."""
    sizes, send = [], upload._sent

    def counted(host, device):
        sizes.append(host.numel())
        return send(host, device)

    monkeypatch.setattr(upload, "_sent", counted)
    num_calls = set()
    for num_sequences in (1, 64):
        driver, state = make(num_slots=64)
        slots = list(range(num_sequences))
        for slot in slots:
            start(driver, slot, slot)
        state.apply(driver.batch(prefill=[Enter(slot, [7] * 3) for slot in slots]))
        sent = []
        for _ in range(16):
            sizes.clear()
            batch = driver.batch(slots)
            with CountedCalls() as counter:
                state.apply(batch)
            sent.append(sum(sizes))
            if sent[-1] == 0:
                num_calls.add(counter.count)
        # Other sequences than in the batch before, and the pages of the 17th position: slots and
        # columns in 8 bytes each, and pages in 4.
        assert sent.pop(0) > 0
        assert sent == [0] * 12 + [20 * num_sequences] + [0] * 2
    assert len(num_calls) == 1


def test_nothing_of_a_buffer_is_kept_when_its_batch_is_done(monkeypatch):
    """A batch may have sent long prompts, and its slots may then decode for a long time."""
    driver, state = make()
    staged: list[weakref.ref] = []
    add = upload.Staging.add

    def noted(*args, **fields):
        result = add(*args, **fields)
        staged.append(weakref.ref(result))
        return result

    monkeypatch.setattr(upload.Staging, "add", noted)
    for slot in range(3):
        start(driver, slot, slot)
    state.apply(driver.batch(prefill=[Enter(slot, [5] * 40) for slot in range(3)]))
    for slots in ([0, 1, 2], [0, 1, 2], [0, 2]):
        state.apply(driver.batch(slots))
    gc.collect()
    assert staged
    assert not [ref() for ref in staged if ref() is not None]
