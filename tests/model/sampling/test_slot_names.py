"""The worker's lines about a slot name the request whose sequence is there."""

from __future__ import annotations

import numpy as np
import torch
from fake_vocabulary import LETTERS, VOCABULARY
from slot_parameters import entering

from tokasaurus.model.sampling.history import History
from tokasaurus.model.sampling.matchers import Matchers
from tokasaurus.model.sampling.slot_names import SlotNames
from tokasaurus.protocol.messages import SlotGrammar


def test_a_slot_has_the_name_of_its_latest_sequence():
    names = SlotNames()
    names.enter(entering([3, 1, 2], names=("mine/7", ""), name_index=np.array([0, 1, 0], np.int32)))
    assert [names.extra(slot)["request"] for slot in (1, 2, 3, 4)] == ["", "mine/7", "mine/7", ""]
    names.enter(entering([3]))
    assert [names.extra(slot)["request"] for slot in (2, 3)] == ["mine/7", ""]


def test_warnings_about_grammars_and_histories_name_the_request(caplog):
    names = SlotNames()
    nothing = np.zeros(1, np.int32)
    grammar = SlotGrammar("start: nothing", np.array([1], np.int32), nothing, nothing[:0])
    batch = entering(
        [1, 2], grammar, names=("mine/7", "mine/8"), name_index=np.array([0, 1], np.int32)
    )
    names.enter(batch)
    matchers = Matchers(4, len(LETTERS) + 1, lambda: VOCABULARY, names)
    matchers.enter(batch)
    matchers.wait()
    history = History(4, 40, 0, torch.device("cpu"), names)
    history._lose(2)
    assert [record.request for record in caplog.records] == ["mine/7", "mine/8"]
