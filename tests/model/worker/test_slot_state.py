"""The rows that slot tables make of a batch. ``test_worker`` has the batches that are refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from rows import named
from sampling_driver import adjusted_by
from worker_driver import Driver, Enter, worker_config

from tokasaurus.errors import ProtocolError
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.worker.slot_state import SlotState
from tokasaurus.protocol.messages import AdjustedSlots, Adjustments, Sampling


@pytest.fixture
def driver():
    return Driver(None, worker_config(Path()))


@pytest.fixture
def state(driver):
    config = driver.config
    return SlotState(
        num_slots=config.num_slots,
        num_pages=config.num_pages,
        page_size=config.page_size,
        max_request_tokens=config.max_request_tokens,
        vocab_size=100,
        device=torch.device("cpu"),
    )


def test_only_ends_of_prompts_and_scored_rows_need_logits(driver, state):
    driver.start(0)
    driver.start(1)
    planned = state.apply(driver.batch(prefill=[Enter(0, [7] * 50, ends_prompt=False)]))
    assert planned.sampling.rows.tensor.tolist() == []
    assert planned.prompt is None
    planned = state.apply(driver.batch(prefill=[Enter(0, [7] * 50, 50), Enter(1, [8] * 9)]))
    assert planned.sampling.rows.tensor.tolist() == [49, 58]
    assert planned.prompt is None
    prompt = list(range(20, 29))
    planned = state.apply(driver.batch([0], [Enter(1, prompt, num_prompt_logprobs=0)]))
    assert planned.sampling.rows.tensor.tolist() == [0, 9]
    assert planned.prompt.rows.tensor.tolist() == list(range(1, 9))
    assert planned.prompt.next_ids.tensor.tolist() == prompt[1:]


def test_cleared_tables_are_as_new_and_stay_in_place(driver, state):
    """Recorded kernels read the tensors by address."""
    tensors = (state.page_table, state.last_tokens)
    addresses = [tensor.data_ptr() for tensor in tensors]
    adjustments = Adjustments(repetition_penalty=1.5, bias=((3, 1.0),))
    for slot in range(3):
        sampling = Sampling(temperature=0.5, top_k=3, adjustments=adjustments)
        driver.start(slot, sampling, seed=7, num_logprobs=2)
    batch = driver.batch(prefill=[Enter(slot, [7] * 20) for slot in range(3)])
    adjusted = (AdjustedSlots(np.array([0, 2], np.int32), 0, np.array([7], np.int32)),)
    parameters = msgspec.structs.replace(batch.parameters, adjusted=adjusted)
    planned = state.apply(msgspec.structs.replace(batch, parameters=parameters))
    state.record(planned.sampling, torch.tensor([4, 5, 6]))
    logits, slots = torch.ones(3, 100), np.arange(3, dtype=np.int32)
    assert adjusted_by(state.adjustments, logits, slots, slots * 0 + 1) is not logits
    state.clear()
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert not any(tensor.any() for tensor in tensors)
    assert not state.lengths.any()
    assert not state.pages_held.any()
    assert adjusted_by(state.adjustments, logits, slots, slots * 0 + 1) is logits
    neutral = SamplingParameters.neutral(driver.config.num_slots)
    for name in ("temperature", "top_k", "seed", "num_logprobs", "num_generated"):
        assert state.sampling[name].tolist() == neutral[name].tolist(), name


def grouped_batch(driver, state):
    """Slots 0 and 1 decode behind 20 tokens, slots 2 and 3 feed chunks from position 16 on."""
    for slot in range(4):
        driver.start(slot)
    state.apply(driver.batch(prefill=[Enter(slot, [7] * 20) for slot in (0, 1)]))
    driver.lengths = {0: 20, 1: 20}
    return driver.batch([0, 1], [Enter(2, [7] * 3, 16), Enter(3, [8], 16)])


def with_groups(batch, **columns):
    arrays = {f"group_{name}": np.array(values, np.int32) for name, values in columns.items()}
    return msgspec.structs.replace(batch, **arrays)


ONE_GROUP = {
    "first_decodes": [1],
    "num_decodes": [1],
    "first_chunks": [0],
    "num_chunks": [2],
    "first_columns": [0],
    "num_columns": [1],
}


def test_groups_name_sequences_of_the_batch(driver, state):
    batch = grouped_batch(driver, state)
    groups = state.apply(with_groups(batch, **ONE_GROUP)).sequences.groups
    assert (groups.first_decodes.tolist(), groups.num_decodes.tolist()) == ([1], [1])
    assert (groups.first_chunks.tolist(), groups.num_chunks.tolist()) == ([2], [2])


def test_a_group_may_have_no_chunks(driver, state):
    columns = {name: ONE_GROUP[name] for name in ONE_GROUP if "chunks" not in name}
    batch = with_groups(grouped_batch(driver, state), **columns)
    groups = state.apply(batch).sequences.groups
    assert (groups.num_decodes.tolist(), groups.num_chunks.tolist()) == ([1], [0])


IMPOSSIBLE_GROUPS = [
    (
        {"num_decodes": [2]},
        "group of 2 rows from 1 on and 2 chunks from 0 on, with pages 0 to 1, which",
    ),
    ({"num_chunks": [3]}, "which these do not fill"),
    ({"num_decodes": [0], "num_chunks": [0]}, "which these do not fill"),
    ({"num_columns": [2]}, "with pages 0 to 2, which these do not fill"),
    ({"num_columns": [0]}, "which these do not fill"),
    ({"num_chunks": [0], "num_columns": [2]}, "which these do not fill"),
    ({"first_decodes": [-1]}, "columns of its groups disagree"),
    ({"first_chunks": [-1]}, "columns of its groups disagree"),
    ({"num_columns": [1, 1]}, "columns of its groups disagree"),
]


def test_impossible_groups_are_refused(driver, state):
    for changes, message in IMPOSSIBLE_GROUPS:
        batch = with_groups(grouped_batch(driver, state), **{**ONE_GROUP, **changes})
        with named(changes), pytest.raises(ProtocolError, match=message):
            state.apply(batch)
