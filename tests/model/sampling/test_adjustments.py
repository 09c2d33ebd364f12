"""Adjusted logits against plain Python and transformers, alone and in batches."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers
from adjustment_oracle import adjusted_logits, random_adjustments
from rows import named
from sampling_driver import (
    adjusted_by,
    draw,
    enter_slots,
    logprobs_of,
    parameters,
    processed,
    record,
    sent,
)

from tokasaurus.errors import ProtocolError
from tokasaurus.model.sampling import adjustments as adjustments_module
from tokasaurus.model.sampling import history as history_module
from tokasaurus.model.sampling.adjustments import AdjustmentTable
from tokasaurus.model.sampling.history import History
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    Adjustments,
    LogprobsMode,
    Sampling,
    SlotParameters,
)

CPU = torch.device("cpu")


def make_table(num_slots, vocab_size):
    """A table for sequences of at most a thousand ids."""
    return AdjustmentTable(num_slots, vocab_size, History(num_slots, 1000, 5000, CPU), CPU)


def enter(table, entries):
    """Sequences enter, each as (slot, adjustments or None, prompt, generated)."""
    slots = np.array([entry[0] for entry in entries], np.int32)
    count = len(entries)
    samplings = tuple(Sampling(adjustments=entry[1]) for entry in entries)
    adjusted = []
    for index, (slot, adjustments, prompt, generated) in enumerate(entries):
        if adjustments is not None:
            ids = [*(prompt if adjustments.reads_prompt else []), *generated]
            if not adjustments.reads_generated:
                ids = []
            slots_of_one = np.array([slot], np.int32)
            adjusted.append(AdjustedSlots(slots_of_one, index, np.array(ids, np.int32)))
    zeros = np.zeros(count, np.int32)
    enter_slots(
        table,
        SlotParameters(
            *(slots, samplings, np.arange(count, dtype=np.int32), np.zeros(count, np.int64), zeros),
            num_generated=np.array([len(entry[3]) for entry in entries], np.int32),
            num_logprobs=zeros,
            adjusted=tuple(adjusted),
        ),
    )


def one(adjustments, prompt, generated, logits):
    """One row alone. Its generated ids come with the sequence."""
    table = make_table(1, len(logits))
    enter(table, [(0, adjustments, prompt, generated)])
    numbers = np.array([len(generated)], np.int32)
    return adjusted_by(table, torch.tensor([logits]), np.zeros(1, np.int32), numbers)[0]


def check_random_table(seed):
    chance = random.Random(seed)
    vocab_size, num_slots = chance.choice([9, 40]), 10
    table = make_table(num_slots, vocab_size)
    living = {}
    torch.manual_seed(seed)
    for _ in range(40):
        new = {}
        for slot in chance.sample(range(num_slots), chance.choice([0, 0, 1, 4])):
            prompt, generated = (
                [chance.randrange(min(12, vocab_size)) for _ in range(chance.randint(low, 20))]
                for low in (1, 0)
            )
            asked = chance.random() < 0.7
            adjustments = random_adjustments(chance, min(12, vocab_size)) if asked else None
            new[slot] = (adjustments, prompt, generated)
        if new:
            enter(table, [(slot, *entry) for slot, entry in new.items()])
            living |= new
        if not living:
            continue
        slots = chance.sample(sorted(living), chance.randint(1, len(living)))
        logits = torch.randn(len(slots), vocab_size) * 3
        before = logits.clone()
        numbers = np.array([len(living[slot][2]) for slot in slots], np.int32)
        adjusted = adjusted_by(table, logits, np.array(slots, np.int32), numbers)
        assert torch.equal(logits, before)
        for row, slot in enumerate(slots):
            expected = logits[row].double()
            if living[slot][0] is not None:
                expected = torch.tensor(
                    adjusted_logits(logits[row].tolist(), *living[slot]), dtype=torch.float64
                )
            torch.testing.assert_close(adjusted[row].double(), expected, atol=2e-5, rtol=1e-6)
        drawn = [chance.randrange(min(12, vocab_size)) for _ in slots]
        record(table, np.array(slots, np.int32), torch.tensor(drawn))
        for slot, token_id in zip(slots, drawn, strict=True):
            living[slot][2].append(token_id)


def test_adjusted_logits_are_those_of_plain_python():
    """Slots are reused. Generated ids come with a sequence or are recorded when drawn."""
    for seed in range(12):
        with named(seed):
            check_random_table(seed)


def test_adjusted_logits_in_pieces_are_those_of_plain_python(monkeypatch):
    """There are more ids than are gathered, or kept beside the logits, at once."""
    monkeypatch.setattr(history_module, "_BLOCK", 4)
    monkeypatch.setattr(history_module, "MAX_GATHERED", 3)
    monkeypatch.setattr(adjustments_module, "MAX_GATHERED", 3)
    monkeypatch.setattr(adjustments_module, "_MAX_LAYOUT_ELEMENTS", 5)
    for seed in range(12):
        with named(seed):
            check_random_table(seed)


PROMPT, GENERATED = [20, 21, 22, 20], [3, 5, 3, 7, 5, 3]
HF = transformers.generation.logits_process


PROCESSED = [
    (
        Adjustments(repetition_penalty=1.3),
        lambda: [HF.RepetitionPenaltyLogitsProcessor(1.3)],
    ),
    (
        Adjustments(repetition_penalty=0.6),
        lambda: [HF.RepetitionPenaltyLogitsProcessor(0.6)],
    ),
    (
        Adjustments(bias=((3, 2.5), (21, -100.0))),
        lambda: [HF.SequenceBiasLogitsProcessor([[[3], 2.5], [[21], -100.0]])],
    ),
    (
        Adjustments(bad_words=((9,), (5, 3, 8), (3, 5, 3, 9), (7, 3, 1))),
        lambda: [HF.NoBadWordsLogitsProcessor([[9], [5, 3, 8], [3, 5, 3, 9], [7, 3, 1]])],
    ),
    (
        Adjustments(min_tokens=7, late_ids=(2, 6)),
        lambda: [HF.MinNewTokensLengthLogitsProcessor(len(PROMPT), 7, [2, 6])],
    ),
    (
        Adjustments(min_tokens=6, late_ids=(2, 6)),
        lambda: [HF.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [2, 6])],
    ),
    (
        Adjustments(
            bad_words=((5, 3, 8),),
            min_tokens=20,
            late_ids=(2,),
            bias=((3, 2.5),),
            repetition_penalty=1.2,
        ),
        lambda: [
            HF.NoBadWordsLogitsProcessor([[5, 3, 8]]),
            HF.MinNewTokensLengthLogitsProcessor(len(PROMPT), 20, [2]),
            HF.SequenceBiasLogitsProcessor([[[3], 2.5]]),
            HF.RepetitionPenaltyLogitsProcessor(1.2),
        ],
    ),
]


def check_processors(adjustments, processors):
    torch.manual_seed(1)
    context = torch.tensor([PROMPT + GENERATED])
    for _ in range(20):
        logits = torch.randn(30) * 3
        expected = logits[None].clone()
        for processor in processors():
            expected = processor(context, expected)
        ours = one(adjustments, PROMPT, GENERATED, logits.tolist())
        assert torch.equal(ours, expected[0])
        warpers = [
            HF.TemperatureLogitsWarper(0.8),
            HF.TopKLogitsWarper(12),
            HF.TopPLogitsWarper(0.9),
            HF.MinPLogitsWarper(0.02),
        ]
        for warper in warpers:
            expected = warper(context, expected)
        chosen = parameters(1, temperature=0.8, top_k=12, top_p=0.9, min_p=0.02)
        torch.testing.assert_close(processed(ours[None], chosen), expected)


def test_adjustments_equal_the_processors_of_transformers():
    """They are equal bit for bit in fp32. Then temperature and filters keep the same tokens."""
    for adjustments, processors in PROCESSED:
        with named(adjustments):
            check_processors(adjustments, processors)


def test_penalties_by_hand():
    logits = [1.0, -1.0, 2.0, 0.0]
    frequency = one(Adjustments(frequency_penalty=0.5), [3, 3], [0, 1, 0], logits)
    # The prompt does not count.
    assert frequency.tolist() == [0.0, -1.5, 2.0, 0.0]
    presence = one(Adjustments(presence_penalty=0.5), [3, 3], [0, 1, 0], logits)
    assert presence.tolist() == [0.5, -1.5, 2.0, 0.0]
    repetition = one(Adjustments(repetition_penalty=2.0), [1, 3], [0], logits)
    assert repetition.tolist() == [0.5, -2.0, 2.0, 0.0]
    both = one(Adjustments(repetition_penalty=2.0, presence_penalty=1.0), [1], [0], logits)
    assert both.tolist() == [-0.5, -2.0, 2.0, 0.0]


def test_bad_words_work_before_any_id_is_recorded():
    table = make_table(1, 3)
    enter(table, [(0, Adjustments(bad_words=((1, 2),)), [0], [])])
    logits, slots = torch.zeros(1, 3), np.zeros(1, np.int32)
    numbers = np.arange(2, dtype=np.int32)
    assert adjusted_by(table, logits, slots, numbers[:1]).tolist() == [[0, 0, 0]]
    record(table, slots, torch.tensor([1]))
    assert adjusted_by(table, logits, slots, numbers[1:]).tolist() == [[0, 0, -np.inf]]


def test_if_every_token_would_be_masked_none_is():
    masked = Adjustments(bad_words=((0,), (1,), (0, 2)), min_tokens=9, late_ids=(1, 2))
    logits = [1.0, 3.0, 2.0, 0.0]
    assert one(masked, [3], [3], logits).argmax() == 3
    everything = Adjustments(bad_words=((0,), (1,), (2,), (3, 3)), bias=((0, 1.0),))
    assert one(everything, [3], [3], logits).tolist() == logits
    assert one(everything, [3], [2], logits).argmax() == 3


def test_rows_without_adjustments_are_unchanged():
    """If no row of a batch asks, the logits are not even copied."""
    table = make_table(4, 8)
    logits, numbers = torch.randn(2, 8), np.zeros(2, np.int32)
    slots = np.array([1, 2], np.int32)
    assert adjusted_by(table, logits, slots, numbers) is logits
    enter(table, [(2, Adjustments(bias=((1, 5.0),)), [1], []), (3, None, [1], [])])
    assert torch.equal(adjusted_by(table, logits, slots, numbers)[0], logits[0])
    assert adjusted_by(table, logits, np.array([3, 1], np.int32), numbers) is logits
    enter(table, [(2, None, [1], [])])
    assert adjusted_by(table, logits, slots, numbers) is logits


def test_histories_are_kept_only_where_adjustments_read_generated_ids():
    """A bias reads none, nor does a bad word of one token. Prompts are not part of a history."""
    history = History(50, 1000, 5000, CPU)
    table = AdjustmentTable(50, 8, history, CPU)
    for slot in range(50):
        enter(table, [(slot, Adjustments(bias=((1, 5.0),), bad_words=((3,),)), [1] * 100, [])])
    assert not history.keeps.any()
    enter(table, [(7, Adjustments(repetition_penalty=1.5), [1] * 100, [2])])
    enter(table, [(8, Adjustments(presence_penalty=1.5), [1] * 100, [])])
    assert record(table, np.array([8, 7, 9], np.int32), torch.tensor([1, 2, 3])) is None
    assert history.lengths[[7, 8, 9]].tolist() == [2, 1, 0]
    tails = sent(history.plan_tails, np.array([7, 8], np.int32), 3)
    assert history.tails(tails, -1).tolist() == [[-1, 2, 2], [-1, -1, 1]]
    enter(table, [(7, Adjustments(bias=((1, 5.0),)), [1], []), (8, None, [1], [])])
    assert not history.keeps.any()
    assert not history.lengths.any()


def test_slots_that_leave_are_forgotten_before_others_enter():
    """Their memory is free again, and no work is done for them."""
    # A block of 256 ids for each slot.
    history = History(4, 100_000, 0, CPU)
    table = AdjustmentTable(4, 8, history, CPU)
    penalty = Adjustments(frequency_penalty=1.0, repetition_penalty=2.0)
    slots = np.arange(2, dtype=np.int32)
    enter(table, [(0, penalty, [1], [2] * 600), (1, None, [1], [])])
    logits = torch.ones(2, 8)
    assert not torch.equal(adjusted_by(table, logits, slots, slots), logits)
    table.leave(slots)
    assert adjusted_by(table, logits, slots, slots) is logits
    enter(table, [(2, penalty, [1], [2] * 900)])
    assert record(table, np.array([2], np.int32), torch.tensor([4])) is None
    assert history.lengths.tolist() == [0, 0, 901, 0]


def test_a_sequence_whose_tokens_cannot_be_remembered_is_cut():
    """The row counts all rows of the batch, not only those that keep a history."""
    # A block of 256 ids for each slot.
    table = AdjustmentTable(3, 8, History(3, 100_000, 0, CPU), CPU)
    penalty = Adjustments(frequency_penalty=1.0)
    enter(table, [(0, None, [1], []), (1, penalty, [1], [2] * 512), (2, penalty, [1], [3] * 255)])
    slots = np.arange(3, dtype=np.int32)
    assert record(table, slots, torch.tensor([4, 5, 6])).tolist() == [1]
    assert record(table, slots, torch.tensor([4, 5, 6])).tolist() == [1]
    enter(table, [(1, penalty, [1], [])])
    assert record(table, slots, torch.tensor([4, 5, 6])) is None


def test_layouts_that_are_kept_are_bounded(monkeypatch):
    """Each set of slots has a layout, which is kept unless all become too large together."""
    table = make_table(8, 100)
    many = Adjustments(bias=tuple((i, 1.0) for i in range(100)))
    enter(table, [(slot, many, [1], []) for slot in range(8)])
    monkeypatch.setattr(adjustments_module, "_MAX_LAYOUT_ELEMENTS", 250)
    numbers = np.zeros(2, np.int32)
    for slots in ([0], [1], [2], [3, 4], [5], [6, 7, 0]):
        adjusted = adjusted_by(
            table,
            torch.zeros(len(slots), 100),
            np.array(slots, np.int32),
            numbers[:1].repeat(len(slots)),
        )
        assert (adjusted == 1).all()
        kept = [layout.num_elements for layout in table._layouts.values()]
        assert sum(kept) <= 250 or len(kept) == 1


def test_only_processed_logprobs_see_adjustments():
    """The other modes give the model's own distribution."""
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    adjusted = one(Adjustments(bias=((0, -100.0),)), [1], [], logits[0].tolist())[None]
    token = draw(adjusted, parameters(1, temperature=0))
    assert token.tolist() == [1]
    for mode, scores in (
        (LogprobsMode.RAW, logits),
        (LogprobsMode.TEMPERATURE, logits / 0.5),
        (LogprobsMode.PROCESSED, adjusted / 0.5),
    ):
        asked = parameters(1, temperature=0.5, num_logprobs=3, logprobs_mode=mode)
        got = logprobs_of(logits, token, asked, 3, adjusted)
        torch.testing.assert_close(got.chosen[0], scores.log_softmax(-1)[0, 1])
        assert got.top_ids[0].tolist() == scores[0].argsort(descending=True).tolist()


def test_impossible_adjustments_are_refused():
    zero = np.zeros(1, np.int32)
    for slot, adjustments, ids, message in (
        (1, Adjustments(), [], "enters"),
        (0, Adjustments(), [8], "to 8"),
        (0, Adjustments(bias=((-1, 1),)), [], "from -1"),
        (0, Adjustments(bad_words=((1, 9),)), [], "to 9"),
        (0, None, [], "no adjustments"),
    ):
        group = AdjustedSlots(np.array([slot], np.int32), 0, np.array(ids, np.int32))
        samplings = (Sampling(adjustments=adjustments),)
        entering = SlotParameters(
            *(zero, samplings, zero, np.zeros(1, np.int64), zero, zero, zero, (group,))
        )
        with named(message), pytest.raises(ProtocolError, match=message):
            enter_slots(make_table(4, 8), entering)
