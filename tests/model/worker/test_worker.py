"""The worker's own contract: numbers, slots, what a result holds, what is not computed."""

from __future__ import annotations

import dataclasses
import random

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE
from worker_driver import Driver, Enter, generate, make_driver, worker_config

from tokasaurus.errors import ModelError, ProtocolError
from tokasaurus.model.sampling import drawing as head_module
from tokasaurus.model.sampling.adjustments import AdjustmentTable
from tokasaurus.model.sampling.history import History
from tokasaurus.model.sampling.rows import PromptRows, SamplingRows
from tokasaurus.model.sampling.sampler import SamplingParameters
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import ForwardBatch, ForwardResult, Sampling
from tokasaurus.protocol.wire import Codec


@pytest.fixture
def driver(checkpoint):
    return make_driver(checkpoint("llama", tied=True))


def ids(count, seed=0):
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(count)]


def test_rows_are_decodes_then_prompts_that_end(driver):
    for slot in (4, 7, 2, 5):
        driver.start(slot, num_logprobs=0 if slot == 7 else -1)
    first = driver.step(prefill=[Enter(4, ids(5, 4)), Enter(7, ids(3, 7))])
    assert first.token_ids.shape == (2,)
    assert np.isnan(first.logprobs).tolist() == [True, False]
    assert first.top_ids.shape == (2, 0)
    mixed = driver.step(
        decode=[7, 4],
        prefill=[Enter(2, ids(6, 2), ends_prompt=False, next_id=1), Enter(5, ids(4, 5))],
    )
    assert mixed.token_ids.shape == (3,)
    assert np.isnan(mixed.logprobs).tolist() == [False, True, True]
    alone, _ = generate(driver, ids(4, 5), 1, slot=5)
    assert alone == [mixed.token_ids[2]]


def test_a_batch_without_requests_for_logprobs_has_none(driver):
    driver.start(0)
    result = driver.step(prefill=[Enter(0, ids(5))])
    assert result.logprobs.shape == (0,)
    assert result.top_ids.shape == result.top_logprobs.shape == (1, 0)
    assert result.prompt_logprobs.shape == (0,)


def test_rows_get_the_logprobs_they_asked_for(driver):
    for slot, wanted in enumerate((-1, 0, 2, 4)):
        driver.start(slot, num_logprobs=wanted)
    result = driver.step(prefill=[Enter(slot, ids(5, slot)) for slot in range(4)])
    assert (result.top_ids >= 0).sum(1).tolist() == [0, 0, 2, 4]
    for row in (2, 3):
        assert result.top_ids[row, 0] == result.token_ids[row]  # greedy
        assert result.top_logprobs[row, 0] == result.logprobs[row]


def test_results_and_batches_pass_the_wire(driver):
    batches, results = Codec(ForwardBatch), Codec(ForwardResult)
    driver.start(0, num_logprobs=3)
    first = batches.decode(batches.encode(driver.batch(prefill=[Enter(0, ids(5), 0, True, -1, 2)])))
    result = driver.worker.run(first)  # arrays are read-only now
    copy = results.decode(results.encode(result))
    for name in ForwardResult.__struct_fields__:
        np.testing.assert_array_equal(getattr(copy, name), getattr(result, name))


def test_a_batch_of_differences_only(driver):
    driver.start(0)
    empty = driver.step()
    assert empty.token_ids.shape == (0,)
    assert driver.step(prefill=[Enter(0, ids(5))]).token_ids.shape == (1,)


@pytest.fixture
def head_rows(monkeypatch):
    """How many rows went through the LM head, call by call."""
    seen = []
    original = head_module._logits

    def counting(model, hidden, rows):
        for part, logits in original(model, hidden, rows):
            seen.append(len(logits))
            yield part, logits

    monkeypatch.setattr(head_module, "_logits", counting)
    return seen


def test_the_head_runs_for_rows_that_need_it(driver, head_rows):
    driver.start(0)
    driver.start(1)
    driver.step(prefill=[Enter(0, ids(50), ends_prompt=False)])
    assert head_rows == []
    driver.step(prefill=[Enter(0, ids(50), 50), Enter(1, ids(9))])
    assert head_rows == [2]
    driver.step(prefill=[Enter(1, ids(9), 0, True, -1, 0)])
    assert head_rows == [2, 1, 8]


def test_logits_come_in_bounded_pieces(driver, head_rows, monkeypatch):
    prompt = ids(100)
    driver.start(0)
    (chunk,) = driver.chunks(0, prompt, 100, 1)
    whole = driver.step(prefill=[chunk])
    monkeypatch.setattr(head_module, "_MAX_LOGITS", 7 * VOCAB_SIZE)
    driver.start(0)
    pieces = driver.step(prefill=[chunk])
    assert max(head_rows[2:]) == 7
    np.testing.assert_allclose(pieces.prompt_logprobs, whole.prompt_logprobs, atol=1e-5)
    np.testing.assert_array_equal(pieces.prompt_ranks, whole.prompt_ranks)
    np.testing.assert_array_equal(pieces.prompt_top_ids, whole.prompt_top_ids)


def test_pieces_of_logits_change_no_number(monkeypatch):
    """Of logits that are the same, to the last bit; and no tensor of a piece is larger than it may be."""
    vocab_size, hidden_size, num_rows = 5000, 8, 40
    torch.manual_seed(0)
    # Products of small whole numbers are exact, however the rows are cut; what is added makes all differ.
    hidden = torch.randint(-3, 4, (num_rows, hidden_size)).float()
    weight = torch.randint(-3, 4, (vocab_size, hidden_size)).float()

    rows = []

    class Model:
        head = torch.nn.Linear(hidden_size, vocab_size)

        def logits(self, hidden):
            rows.append(len(hidden))
            return hidden @ weight.T + torch.arange(vocab_size) / 8192

    model = Model()
    asked = SamplingParameters.neutral(num_rows)
    asked.num_logprobs[:] = np.arange(num_rows) % 4 - 1
    asked.logprobs_mode[:] = np.arange(num_rows) % 3
    asked.temperature[:] = 0.7
    asked.top_k[:] = 50
    asked.seed[:] = np.arange(num_rows)
    prompt = PromptRows(torch.arange(num_rows), np.arange(num_rows) * 100, asked)
    drawn = SamplingRows(torch.arange(num_rows), np.arange(num_rows, dtype=np.int32), asked)
    device = torch.device("cpu")
    adjustments = AdjustmentTable(num_rows, vocab_size, History(num_rows, 1, 1, device), device)

    def run():
        rows.clear()
        tokens, logprobs = head_module.draw_tokens(model, hidden, drawn, adjustments, None)
        scored = head_module.score_prompts(model, hidden, prompt)
        return [tokens, *vars(logprobs).values(), *vars(scored).values()]

    whole = run()
    assert rows == [num_rows, num_rows]
    monkeypatch.setattr(head_module, "_MAX_LOGITS", 7 * vocab_size + 1)
    pieces = run()
    assert rows == [7, 7, 7, 7, 7, 5] * 2
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_a_gap_in_the_numbers(driver):
    driver.start(0)
    driver.step(prefill=[Enter(0, ids(5))])
    driver.number = 2
    with pytest.raises(ProtocolError, match="batch 2 came, batch 1 was due"):
        driver.step(decode=[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_slots": [0, 0]}, "names a slot twice"),
        ({"decode_slots": [0], "prefill_slots": [0]}, "names a slot twice"),
        ({"decode_slots": [8]}, "slots range from 1 to 8, the limit is 8"),
        ({"decode_slots": [-1]}, "slots range from -1"),
        ({"decode_slots": [3]}, "decodes a slot that has no tokens yet"),
        ({"prefill_ids": [VOCAB_SIZE]}, "prompt ids range .* the limit is 264"),
        ({"prefill_ids": [1, 2]}, "lengths and ids of its prompts disagree"),
        ({"prefill_lengths": [0], "prefill_ids": []}, "lengths and ids of its prompts disagree"),
        ({"prefill_starts": [16]}, "slot 1 would hold 17 tokens in 1 pages"),
        ({"table_pages": [64]}, "pages range from 64"),
        ({"draw_slots": [8]}, "slots that draw range from 8"),
        ({"draw_chunks": [1]}, "chunks to draw from range from 1"),
        ({"draw_slots": [1, 1], "draw_chunks": [0, 0]}, "draws for a slot twice"),
        ({"decode_slots": [0], "draw_slots": [0]}, "draws for a slot twice"),
        ({"draw_slots": [2]}, "slot 2 would hold 1 tokens in 0 pages"),
        ({"copy_sources": [64], "copy_targets": [0]}, "pages to copy range from 64"),
        ({"copy_sources": [0], "copy_targets": [-1]}, "pages to copy to range from -1"),
        ({"table_columns": [16]}, "columns of the page table range from 16"),
    ],
)
def test_impossible_batches(driver, changes, message):
    driver.start(0)
    driver.step(prefill=[Enter(0, ids(5))])
    driver.start(1)
    good = driver.batch(prefill=[Enter(1, [7])])
    arrays = {name: np.array(values, np.int32) for name, values in changes.items()}
    bad = msgspec.structs.replace(good, number=1, **arrays)
    with pytest.raises(ProtocolError, match=message):
        driver.worker.run(bad)


@pytest.mark.parametrize("length", [1, 15, 16, 33])
def test_a_fork_goes_on_like_a_sequence_of_its_own(driver, length):
    sampling = Sampling(temperature=1.0)

    def run(forked):
        for sample in range(3):
            driver.start(sample, sampling, seed=5, sample_index=sample, num_logprobs=2)
        if forked:
            entered = [Enter(0, ids(length), forks=(1, 2))]
        else:
            entered = [Enter(sample, ids(length)) for sample in range(3)]
        results = [driver.step(prefill=entered)]
        results += [driver.step(decode=[0, 1, 2]) for _ in range(20)]
        return [[row.tolist() for row in (r.token_ids, r.logprobs, r.top_ids)] for r in results]

    alone = run(forked=False)
    driver.held.clear()  # the forks below share pages: give none back twice
    driver.free = list(range(64))
    forked = run(forked=True)
    assert [step[::2] for step in forked] == [step[::2] for step in alone]
    np.testing.assert_allclose([s[1] for s in forked], [s[1] for s in alone], atol=1e-5)
    assert len({tuple(step[0][sample] for step in alone) for sample in range(3)}) == 3


def test_pages_of_a_former_sequence_do_not_count(driver):
    driver.start(0)
    driver.step(prefill=[Enter(0, ids(20))])
    driver.start(0)
    batch = driver.batch(prefill=[Enter(0, ids(20))])
    none = np.zeros(0, np.int32)
    bare = msgspec.structs.replace(batch, table_slots=none, table_columns=none, table_pages=none)
    with pytest.raises(ProtocolError, match="slot 0 would hold 20 tokens in 0 pages"):
        driver.worker.run(bare)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"page_size": 1, "num_pages": 3, "max_tokens_per_forward": 50},
        {"max_request_tokens": 1, "max_seqs_per_forward": 1, "num_slots": 1},
        {"num_slots": 2, "max_seqs_per_forward": 2, "max_tokens_per_forward": 4096},
        {"max_topk_logprobs": 0},
    ],
)
def test_warm_up_leaves_no_trace(checkpoint, sizes):
    path = checkpoint("llama", tied=True)
    fresh = make_driver(path, **sizes)
    fresh.worker.warm_up()
    assert fresh.worker._state.lengths.max() == 0
    prompt, length = ids(1), 1
    assert generate(fresh, prompt, length) == generate(make_driver(path, **sizes), prompt, length)


def test_warm_up_runs_the_largest_batches(checkpoint, monkeypatch):
    worker = Worker(worker_config(checkpoint("llama", tied=True), max_tokens_per_forward=300))
    seen = []
    run = worker._run
    monkeypatch.setattr(
        worker,
        "_run",
        lambda batch, masks: (
            seen.append((len(batch.decode_slots), len(batch.prefill_ids))),
            run(batch, masks),
        ),
    )
    worker.warm_up()
    assert seen == [(0, 300), (0, 8), (8, 0)]


def test_threads_are_set(checkpoint):
    before = torch.get_num_threads()
    try:
        Worker(worker_config(checkpoint("llama", tied=True), num_threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_rope_override_reaches_the_model(checkpoint):
    config = worker_config(checkpoint("llama", tied=True))
    scaled = dataclasses.replace(config, rope_scaling='{"rope_type": "linear", "factor": 8}')
    prompt = ids(60)
    plain, other = (generate(Driver(Worker(c), c), prompt, 5) for c in (config, scaled))
    assert plain != other
    with pytest.raises(ModelError, match="rope_type"):
        Worker(dataclasses.replace(config, rope_scaling='{"rope_type": "magic"}'))


def test_sampling_goes_by_slot_not_by_row(checkpoint):
    """A sequence draws the same tokens alone, and in another slot among others."""
    driver = make_driver(checkpoint("llama", tied=True), num_slots=8)
    how = {"sampling": Sampling(temperature=1.2, top_k=50), "seed": 5}
    alone, _ = generate(driver, ids(20), 10, slot=0, **how)
    for slot in range(8):
        if slot == 3:
            driver.start(slot, how["sampling"], seed=5)
        else:
            driver.start(slot, Sampling(temperature=0.5 * slot), seed=slot)
    order = [6, 3, 1, 0, 7]
    result = driver.step(prefill=[Enter(slot, ids(20, 0 if slot == 3 else slot)) for slot in order])
    among = [int(result.token_ids[1])]
    for _ in range(9):
        order = order[1:] + order[:1]
        among.append(int(driver.step(decode=order).token_ids[order.index(3)]))
    assert among == alone
