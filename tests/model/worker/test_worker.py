"""The worker's contract: the numbers of batches, slots, and the contents of results."""

from __future__ import annotations

import dataclasses
import random

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE
from fake_vocabulary import VOCABULARY
from rows import named
from worker_driver import Driver, Enter, generate, make_driver, worker_config

from tokasaurus.errors import ModelError, ProtocolError
from tokasaurus.model import upload
from tokasaurus.model.sampling.matchers import SentMasks
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    Adjustments,
    ForwardBatch,
    ForwardResult,
    LogprobsMode,
    Pooling,
    Sampling,
    SlotGrammar,
)
from tokasaurus.protocol.wire import Codec


@pytest.fixture
def driver(checkpoint):
    return make_driver(checkpoint("llama", tied=True))


def ints(values):
    return np.array(values, np.int32)


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
    """The rows are greedy, so the chosen token is the best one."""
    for slot, wanted in enumerate((-1, 0, 2, 4)):
        driver.start(slot, num_logprobs=wanted)
    result = driver.step(prefill=[Enter(slot, ids(5, slot)) for slot in range(4)])
    assert (result.top_ids >= 0).sum(1).tolist() == [0, 0, 2, 4]
    for row in (2, 3):
        assert result.top_ids[row, 0] == result.token_ids[row]
        assert result.top_logprobs[row, 0] == result.logprobs[row]


def test_batches_and_results_survive_the_wire(driver):
    batches, results = Codec(ForwardBatch), Codec(ForwardResult)
    driver.start(0, num_logprobs=3)
    first = batches.decode(batches.encode(driver.batch(prefill=[Enter(0, ids(5), 0, True, -1, 2)])))
    # Its arrays are read-only now.
    result = driver.worker.submit(first).collect()
    copy = results.decode(results.encode(result))
    for name in ForwardResult.__struct_fields__:
        np.testing.assert_array_equal(getattr(copy, name), getattr(result, name))


def test_a_batch_may_change_tables_without_any_row(driver):
    driver.start(0)
    empty = driver.step()
    assert empty.token_ids.shape == (0,)
    assert driver.step(prefill=[Enter(0, ids(5))]).token_ids.shape == (1,)


def test_a_gap_in_the_numbers_of_batches_is_refused(driver):
    driver.start(0)
    driver.step(prefill=[Enter(0, ids(5))])
    driver.number = 2
    with pytest.raises(ProtocolError, match="batch 2 came, number 1 was due"):
        driver.step(decode=[0])


IMPOSSIBLE = [
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
    (
        {"early_copy_sources": [64], "early_copy_targets": [0]},
        "pages to copy early range from 64",
    ),
    (
        {"early_copy_sources": [0], "early_copy_targets": [-1]},
        "pages to copy early to range from -1",
    ),
    ({"table_columns": [16]}, "columns of the page table range from 16"),
]


def test_impossible_batches_are_refused(driver):
    driver.start(0)
    driver.step(prefill=[Enter(0, ids(5))])
    for changes, message in IMPOSSIBLE:
        driver.start(1)
        good = driver.batch(prefill=[Enter(1, [7])])
        arrays = {name: np.array(values, np.int32) for name, values in changes.items()}
        bad = msgspec.structs.replace(good, number=driver.number, **arrays)
        driver.number += 1
        with named(changes), pytest.raises(ProtocolError, match=message):
            driver.worker.submit(bad).collect()


def check_forks(driver, length):
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
    # The forks share pages. Start over with all pages free, so that none is given back twice.
    driver.held.clear()
    driver.free = list(range(64))
    forked = run(forked=True)
    assert [step[::2] for step in forked] == [step[::2] for step in alone]
    np.testing.assert_allclose([s[1] for s in forked], [s[1] for s in alone], rtol=1e-5, atol=1e-5)
    assert len({tuple(step[0][sample] for step in alone) for sample in range(3)}) == 3


def test_a_fork_goes_on_like_a_sequence_of_its_own(checkpoint):
    for length in (1, 15, 16, 33):
        with named(length):
            check_forks(make_driver(checkpoint("llama", tied=True)), length)


def test_early_copies_are_made_before_the_pass(driver):
    """A prompt goes on in the copy of a page that another slot has partly filled."""
    prompt = ids(30)
    expected, _ = generate(driver, prompt, 5, slot=2)
    driver.start(0)
    driver.step(prefill=[Enter(0, prompt[:21], ends_prompt=False, next_id=prompt[21])])
    full, tail = driver.held[0]
    driver.start(1)
    driver.held[1] = [full]
    batch = driver.batch(prefill=[Enter(1, prompt[21:], start=21)])
    assert batch.table_columns.tolist() == [1]
    batch = msgspec.structs.replace(
        batch,
        table_slots=np.array([1, 1], np.int32),
        table_columns=np.array([0, 1], np.int32),
        table_pages=np.array([full, driver.held[1][1]], np.int32),
        early_copy_sources=np.array([tail], np.int32),
        early_copy_targets=np.array([driver.held[1][1]], np.int32),
    )
    driver.number += 1
    tokens = [int(driver.worker.submit(batch).collect().token_ids[0])]
    tokens += [int(driver.step(decode=[1]).token_ids[0]) for _ in range(4)]
    assert tokens == expected
    # The page that was copied from stays as it was.
    driver.step(prefill=[Enter(0, prompt[21:], start=21)])
    assert [int(driver.step(decode=[0]).token_ids[0]) for _ in range(4)] == expected[1:]


def test_pages_of_a_slots_former_sequence_do_not_count(driver):
    driver.start(0)
    driver.step(prefill=[Enter(0, ids(20))])
    driver.start(0)
    batch = driver.batch(prefill=[Enter(0, ids(20))])
    none = np.zeros(0, np.int32)
    bare = msgspec.structs.replace(batch, table_slots=none, table_columns=none, table_pages=none)
    with pytest.raises(ProtocolError, match="slot 0 would hold 20 tokens in 0 pages"):
        driver.worker.submit(bare).collect()


def check_warm_up(path, sizes):
    fresh, other = make_driver(path, **sizes), make_driver(path, **sizes)
    fresh.worker.warm_up()
    (token_ids, logprobs), (expected_ids, expected) = (
        generate(driver, ids(1), 1) for driver in (fresh, other)
    )
    assert token_ids == expected_ids
    assert logprobs == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # Slots other than the one above hold nothing.
    for slot in range(1, fresh.config.num_slots):
        batch = msgspec.structs.replace(fresh.batch(), decode_slots=np.array([slot], np.int32))
        fresh.number += 1
        with pytest.raises(ProtocolError, match="has no tokens yet"):
            fresh.worker.submit(batch).collect()


def test_warm_up_leaves_no_trace(checkpoint):
    for sizes in (
        {},
        {"page_size": 1, "num_pages": 3, "max_tokens_per_forward": 50},
        {"max_request_tokens": 1, "max_seqs_per_forward": 1, "num_slots": 1},
        {"num_slots": 2, "max_seqs_per_forward": 2, "max_tokens_per_forward": 4096},
        {"max_topk_logprobs": 0},
    ):
        with named(sizes):
            check_warm_up(checkpoint("llama", tied=True), sizes)


def test_warm_up_runs_the_largest_batches(checkpoint, monkeypatch):
    worker = Worker(worker_config(checkpoint("llama", tied=True), max_tokens_per_forward=300))
    run, num_rows = worker._runner.run, []

    def count(planned):
        num_rows.append(planned.num_rows)
        return run(planned)

    monkeypatch.setattr(worker._runner, "run", count)
    worker.warm_up()
    assert num_rows == [300, 8, 8, 1, 2]


def test_warm_up_uses_the_memory_of_masks_for_every_row(checkpoint, monkeypatch):
    """No row of the warm-up has a grammar, and the worker has no vocabulary here."""
    masked = []
    apply = SentMasks.apply

    def count(masks, adjusted, logits, part):
        masked.append((len(masks._rows), len(logits)))
        return apply(masks, adjusted, logits, part)

    monkeypatch.setattr(SentMasks, "apply", count)
    worker = Worker(worker_config(checkpoint("llama", tied=True), max_tokens_per_forward=300))
    worker.warm_up()
    assert masked == [(2, 2), (8, 8), (8, 8), (1, 1), (1, 1)]


def test_the_number_of_threads_is_set(checkpoint):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Worker(worker_config(checkpoint("llama", tied=True), num_threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_override_of_the_rope_scaling_reaches_the_model(checkpoint):
    config = worker_config(checkpoint("llama", tied=True))
    scaled = dataclasses.replace(config, rope_scaling='{"rope_type": "linear", "factor": 8}')
    prompt = ids(60)
    plain, other = (generate(Driver(Worker(c), c), prompt, 5) for c in (config, scaled))
    assert plain != other
    with pytest.raises(ModelError, match="rope_type"):
        Worker(dataclasses.replace(config, rope_scaling='{"rope_type": "magic"}'))


def test_sampling_depends_on_the_slot_and_not_on_the_row(checkpoint):
    """A sequence draws the same tokens alone and in another slot, among other sequences."""
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


def everything(driver, slots, forks):
    """A batch in which prompts of these slots enter, which ask for everything there is."""
    for slot in (*slots, *forks):
        kind = {0: 0.0, 1: 0.7, 2: 1.0}[slot % 3]
        filters = ({}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.1}, {"min_p": 0.2}, {"top_k": 200})
        driver.start(
            slot,
            Sampling(
                temperature=kind,
                **filters[slot % 5],
                logprobs_mode=LogprobsMode(slot % 3),
                adjustments=Adjustments(
                    bad_words=((1,), (2, 3)),
                    min_tokens=3,
                    late_ids=(4,),
                    bias=((5, 1.0),),
                    repetition_penalty=1.2,
                    frequency_penalty=0.3,
                )
                if slot % 2
                else None,
            ),
            seed=slot,
            num_logprobs=slot % 4 - 1,
            num_generated=2,
        )
    first, *others = slots
    entering = [Enter(first, ids(20), num_prompt_logprobs=2, forks=forks)]
    entering += [Enter(slot, ids(9, slot), num_prompt_logprobs=slot % 3 - 1) for slot in others]
    batch = driver.batch(prefill=entering)
    parameters = msgspec.structs.replace(
        batch.parameters,
        adjusted=tuple(
            AdjustedSlots(np.array([slot], np.int32), index, np.array([7, 8, slot, 9, 9], np.int32))
            for index, slot in enumerate((*slots, *forks))
            if slot % 2
        ),
    )
    pooling = np.resize(np.array([Pooling.MEAN, Pooling.LAST], np.int32), len(entering))
    return msgspec.structs.replace(batch, parameters=parameters, prefill_pooling=pooling)


def test_a_batch_is_sent_in_one_transfer(checkpoint, monkeypatch):
    """Whatever its rows ask for. The masks of grammars, which follow from results, come alone."""
    padding = [b""] * (VOCAB_SIZE - len(VOCABULARY.tokens))
    vocabulary = dataclasses.replace(VOCABULARY, tokens=[*VOCABULARY.tokens, *padding])
    config = worker_config(checkpoint("llama", tied=True), num_slots=16, max_seqs_per_forward=16)
    driver = Driver(Worker(config, lambda: vocabulary), config)
    sizes, send = [], upload._sent
    run = driver.worker._runner.run

    def counted(host, device):
        sizes.append(host.numel())
        return send(host, device)

    def attend(planned):
        """What attention sends is its own affair."""
        with monkeypatch.context() as patch:
            patch.setattr(upload, "_sent", send)
            return run(planned)

    monkeypatch.setattr(upload, "_sent", counted)
    monkeypatch.setattr(driver.worker._runner, "run", attend)
    num_transfers = []

    def submit(batch):
        sizes.clear()
        driver.number += 1
        result = driver.worker.submit(batch).collect()
        num_transfers.append(len(sizes))
        return result

    slots, forks = [0, 1, 2, 3, 4, 5, 6], (7, 9)
    first = submit(everything(driver, slots, forks))
    assert len(first.prompt_logprobs) > 20
    assert first.pooled.shape[0] == len(slots)
    order = [9, 3, 0, 7, 1, 2, 6, 4, 5]
    for _ in range(3):
        result = submit(driver.batch(decode=order))
        assert np.isfinite(result.logprobs).any()
    driver.start(11)
    entering = driver.batch(order, [Enter(11, ids(5), num_prompt_logprobs=1)])
    grammar = SlotGrammar('start: "ab"', ints([11]), ints([0]), ints([]))
    parameters = msgspec.structs.replace(entering.parameters, grammars=(grammar,))
    submit(msgspec.structs.replace(entering, parameters=parameters))
    submit(driver.batch(decode=[11, *order]))
    submit(driver.batch(decode=order))
    assert num_transfers == [1, 1, 1, 1, 2, 2, 1]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_program_changes_nothing(checkpoint, default):
    """Programs that train set it. The engine runs inside them."""
    sampling = Sampling(temperature=0.8, top_p=0.9, min_p=0.01)
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            driver = make_driver(checkpoint("llama"), use_groups=None)
            driver.worker.warm_up()
            options = {"sampling": sampling, "seed": 5, "num_logprobs": 3}
            results.append(generate(driver, [5, 6, 7], 6, **options))
        finally:
            torch.set_default_dtype(torch.float32)
    assert results[0] == results[1]
