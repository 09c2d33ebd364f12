"""The rows that slot tables make of a batch. ``test_worker`` has the batches that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worker_driver import Driver, Enter, worker_config

from tokasaurus.model.worker.slot_state import SlotState


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
    assert planned.sampling.rows.tolist() == []
    assert planned.prompt is None
    planned = state.apply(driver.batch(prefill=[Enter(0, [7] * 50, 50), Enter(1, [8] * 9)]))
    assert planned.sampling.rows.tolist() == [49, 58]
    assert planned.prompt is None
    prompt = list(range(20, 29))
    planned = state.apply(driver.batch([0], [Enter(1, prompt, num_prompt_logprobs=0)]))
    assert planned.sampling.rows.tolist() == [0, 9]
    assert planned.prompt.rows.tolist() == list(range(1, 9))
    assert planned.prompt.next_ids.tolist() == prompt[1:]
