"""Batches with everything that a worker can be asked for, for tests that compare its results."""

from __future__ import annotations

import dataclasses
import random
from collections import deque

import msgspec
import numpy as np
from checkpoints import VOCAB_SIZE
from fake_vocabulary import VOCABULARY
from worker_driver import Driver, Enter

from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    Adjustments,
    ForwardBatch,
    ForwardResult,
    FromWorker,
    LogprobsMode,
    Pooling,
    Sampling,
    SlotGrammar,
    ToWorker,
)

PENALTIES = Adjustments(
    repetition_penalty=1.3, frequency_penalty=0.5, bad_words=((7,), (1, 2)), bias=((9, 2.0),)
)


def load_vocabulary(vocab_size=VOCAB_SIZE):
    padding = [b""] * (vocab_size - len(VOCABULARY.tokens))
    return dataclasses.replace(VOCABULARY, tokens=[*VOCABULARY.tokens, *padding])


def ids(count, seed):
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(count)]


def ints(*values):
    return np.array(values, np.int32)


def script(config) -> list[ForwardBatch]:
    """Chunks, forks, penalties, grammars, prompt logprobs and pooling, with changes of slots.

    Slots 0 and 1 have grammars, 2 and 3 penalties, 4 forks into 5 and 6, 7 gets prompt logprobs
    chunk by chunk, 8 is pooled, 9 has none of these. Half-way slots 0, 2 and 9 change sequences.
    """
    driver = Driver(None, config)
    batches = []

    def add(decode=(), prefill=(), grammars=(), adjusted=(), **changes):
        batch = driver.batch(list(decode), list(prefill))
        driver.number += 1
        if batch.parameters is not None:
            parameters = msgspec.structs.replace(
                batch.parameters, grammars=grammars, adjusted=adjusted
            )
            batch = msgspec.structs.replace(batch, parameters=parameters)
        batches.append(msgspec.structs.replace(batch, **changes))

    for slot in range(10):
        mode = list(LogprobsMode)[slot % len(LogprobsMode)]
        sampling = Sampling(
            temperature=0.9,
            top_p=0.95,
            logprobs_mode=mode,
            adjustments=PENALTIES if slot in (2, 3) else None,
        )
        driver.start(slot, sampling, seed=slot, num_logprobs=slot % 3 - 1)
    entering = [Enter(slot, ids(9, slot)) for slot in (0, 1, 2, 3, 9)]
    entering.append(Enter(4, ids(19, 4), forks=(5, 6)))
    scored = driver.chunks(7, ids(30, 7), 11, num_prompt_logprobs=2)
    pooled = driver.chunks(8, ids(30, 8), 11)
    add(
        prefill=[*entering, scored[0], pooled[0]],
        grammars=(
            SlotGrammar("start: /[a-z]{3,40}/", ints(0), ints(0), ints()),
            SlotGrammar("start: /a+b[ab]{30}/", ints(1), ints(0), ints()),
        ),
        adjusted=(AdjustedSlots(ints(2, 3), 2, ints(*ids(9, 2))),),
        prefill_pooling=ints(*[0] * len(entering), 0, Pooling.MEAN),
    )
    for part in (1, 2):
        add(
            range(7),
            [scored[part], pooled[part]],
            prefill_pooling=ints(Pooling.NONE, Pooling.MEAN),
        )
    for _ in range(4):
        add([6, 3, 0, 1, 2, 5, 4, 9, 7])
    add([1, 3, 4], left_slots=ints(2))
    for slot in (0, 2, 9):
        sampling = Sampling(temperature=0.7, adjustments=PENALTIES if slot == 0 else None)
        driver.start(slot, sampling, seed=slot + 20, num_logprobs=1)
    add(
        [1, 3, 4, 7],
        [Enter(slot, ids(12, slot + 20)) for slot in (0, 2, 9)],
        grammars=(SlotGrammar("start: /b[cd]+/", ints(9), ints(0), ints()),),
        adjusted=(AdjustedSlots(ints(0), 0, ints(*ids(12, 20))),),
    )
    for _ in range(4):
        add([9, 0, 2, 1, 3])
    return batches


def run(worker: Worker, messages: list[ToWorker], in_flight: int) -> list[FromWorker]:
    """Collects a message's result once this number of messages is in flight."""
    results, pending = [], deque()
    for message in messages:
        pending.append(worker.submit(message))
        if len(pending) == in_flight:
            results.append(pending.popleft().collect())
    return results + [each.collect() for each in pending]


def contents(result: ForwardResult) -> dict[str, object]:
    """Everything but the time."""
    values = {name: getattr(result, name) for name in ForwardResult.__struct_fields__}
    del values["device_s"]
    return {
        name: (str(value.dtype), value.shape, value.tobytes())
        if isinstance(value, np.ndarray)
        else value
        for name, value in values.items()
    }
