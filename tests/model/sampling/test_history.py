"""Histories of generated ids, in memory that never grows, against plain lists."""

from __future__ import annotations

import random

import numpy as np
import torch
from rows import named
from sampling_driver import sent

from tokasaurus.model.sampling import history as history_module
from tokasaurus.model.sampling.history import History
from tokasaurus.rounding import ceil_div

CPU = torch.device("cpu")
VOCAB_SIZE = 9


def ints(values) -> np.ndarray:
    return np.array(values, np.int32)


def enter(history: History, slots: np.ndarray, ids: np.ndarray) -> None:
    sent(history.enter, slots, ids)
    history.write_entries()


def record(history: History, slots: np.ndarray, drawn: torch.Tensor) -> np.ndarray:
    """Which slots are lost."""
    plan = sent(history.plan_appends, slots)
    history.append(plan, drawn)
    return plan.is_lost


def gathered_ids(history: History, slots: list[int]) -> dict[int, list[int]]:
    """The ids of these slots, all pieces joined."""
    found: dict[int, list[int]] = {slot: [] for slot in slots}
    pieces = history.pieces(sent(history.plan_pieces, ints(slots))) if slots else ()
    for ids, is_there in pieces:
        for slot, row, here in zip(slots, ids.tolist(), is_there.tolist(), strict=True):
            found[slot] += [token for token, there in zip(row, here, strict=True) if there]
            beyond = [token for token, there in zip(row, here, strict=True) if not there]
            assert set(beyond) <= {found[slot][0]}
    return found


def check_random_histories(seed):
    chance = random.Random(seed)
    num_slots = 6
    history = History(num_slots, 40, num_slots * 40, CPU)
    memory = history._memory.data_ptr()
    living: dict[int, list[int]] = {}
    for _ in range(120):
        arriving = chance.sample(range(num_slots), chance.choice([0, 0, 0, 1, 2]))
        history.leave(ints(arriving))
        given = [chance.randrange(VOCAB_SIZE) for _ in range(chance.choice([0, 3, 4, 9]))]
        if arriving:
            enter(history, ints(arriving), ints(given))
        living |= {slot: list(given) for slot in arriving}
        drawing = [slot for slot in living if len(living[slot]) < 40 and chance.random() < 0.8]
        if drawing:
            drawn = [chance.randrange(VOCAB_SIZE) for _ in drawing]
            assert not record(history, ints(drawing), torch.tensor(drawn)).any()
            for slot, token in zip(drawing, drawn, strict=True):
                living[slot].append(token)
        if not living:
            continue
        slots = chance.sample(sorted(living), chance.randint(1, len(living)))
        generated = gathered_ids(history, [slot for slot in slots if living[slot]])
        tails = history.tails(sent(history.plan_tails, ints(slots), 5), -1)
        for row, slot in enumerate(slots):
            assert generated.get(slot, []) == living[slot]
            assert tails[row].tolist() == [-1] * (5 - len(living[slot])) + living[slot][-5:]
        held = [history._blocks[s, : ceil_div(int(history.lengths[s]), 4)].tolist() for s in living]
        blocks = [block for each in held for block in each] + history._free
        assert sorted(blocks) == list(range(len(history._memory)))
    assert history._memory.data_ptr() == memory


def test_histories_hold_what_their_own_slots_recorded(monkeypatch):
    """Slots enter with and without ids, draw and leave; no slot sees the ids of another."""
    monkeypatch.setattr(history_module, "_BLOCK", 4)
    for gathered in (1, 1 << 22):
        monkeypatch.setattr(history_module, "MAX_GATHERED", gathered)
        for seed in range(8):
            with named((gathered, seed)):
                check_random_histories(seed)


def test_slots_that_leave_give_their_memory_back(monkeypatch):
    """Each slot in turn fills the whole memory."""
    monkeypatch.setattr(history_module, "_BLOCK", 4)
    # 18 blocks, for at most 72 ids.
    history = History(8, 72, 40, CPU)
    for slot in range(8):
        enter(history, ints([slot]), ints([0] * 40))
        for token in range(32):
            assert not record(history, ints([slot]), torch.tensor([token % VOCAB_SIZE])).any()
        assert len(gathered_ids(history, [slot])[slot]) == 72
        history.leave(ints([slot]))
    assert not history.is_lost.any()


def test_sequences_that_get_no_memory_are_lost(monkeypatch, caplog):
    """The sequences need more than there is in all: some go on to their end, and the others end."""
    monkeypatch.setattr(history_module, "_BLOCK", 4)
    # 10 blocks, for 40 ids of 160.
    history = History(4, 40, 24, CPU)
    slots = ints(range(4))
    enter(history, slots, ints([]))
    lost = np.zeros(4, np.bool_)
    for _ in range(40):
        now = record(history, slots[~lost], torch.zeros(int((~lost).sum()), dtype=torch.int64))
        lost[np.flatnonzero(~lost)[now]] = True
    assert history.lengths.sum() <= 40
    assert 0 < lost.sum() < 4
    assert "no room to remember" in caplog.text
    # So is a sequence that enters with more ids than there is room for.
    history.leave(slots)
    enter(history, ints([0]), ints([1] * 41))
    assert record(history, ints([0]), torch.tensor([1])).tolist() == [True]
