"""The masks of grammars and the matchers that make them, batch by batch."""

from __future__ import annotations

import dataclasses
import threading

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import VOCAB_SIZE
from fake_vocabulary import LETTERS, VOCABULARY
from rows import named
from slot_parameters import entering
from worker_driver import Driver, Enter, worker_config

from tokasaurus.errors import ModelError, ProtocolError
from tokasaurus.grammars import Vocabulary
from tokasaurus.model.download import Download
from tokasaurus.model.sampling.matchers import Matchers, TokenMasks
from tokasaurus.model.worker.worker import Worker
from tokasaurus.protocol.messages import SlotGrammar

EOS = VOCABULARY.eos_token_ids[0]
NUM_SLOTS = 6


def grammar(text: str, **generated: str) -> SlotGrammar:
    """``s3="ab"`` is slot 3, which has generated a and b before."""
    ids = [[LETTERS.index(c) for c in word] for word in generated.values()]
    return SlotGrammar(
        text=text,
        slots=np.array([int(name[1:]) for name in generated], np.int32),
        num_generated=np.array([len(each) for each in ids], np.int32),
        generated_ids=np.array([i for each in ids for i in each], np.int32),
    )


def allowed(matchers: Matchers, slots: list[int]) -> list[str | None]:
    """The letters that each slot may draw; "$" is the end, and None allows everything."""
    masks = matchers.masks(np.array(slots, np.int32))
    result: list[str | None] = [None] * len(slots)
    if masks is not None:
        logits = torch.zeros(len(slots), len(LETTERS) + 1)
        after = masks.send(torch.device("cpu"), None).apply(logits, logits, slice(0, len(slots)))
        assert not logits.any()
        for row in masks.rows.tolist():
            ids = (after[row] == 0).nonzero()[:, 0].tolist()
            result[row] = "".join("$" if i == EOS else LETTERS[i] for i in ids)
    return result


def draw(matchers: Matchers, slots: list[int], text: str) -> None:
    masks = matchers.masks(np.array(slots, np.int32))
    assert masks is not None
    ids = [EOS if c == "$" else LETTERS.index(c) for c in text]
    matchers.advance(masks, np.array(slots, np.int32), Download(torch.tensor(ids)))


@pytest.fixture
def matchers() -> Matchers:
    return Matchers(NUM_SLOTS, len(LETTERS) + 1, lambda: VOCABULARY)


def test_slots_follow_their_own_copies(matchers):
    matchers.enter(
        entering(
            [0, 1, 2, 3], grammar("start: /a[bc]*d/", s1="", s3=""), grammar('start: "x"', s2="")
        )
    )
    assert allowed(matchers, [0, 1, 2, 3]) == [None, "a", "x", "a"]
    draw(matchers, [0, 1, 2, 3], "zaxa")
    assert allowed(matchers, [3, 2, 1, 0]) == ["bcd", "$", "bcd", None]
    draw(matchers, [1, 3], "bd")
    assert allowed(matchers, [1, 2, 3]) == ["bcd", "$", "$"]
    draw(matchers, [1, 2, 3], "c$$")
    # Batches that were planned before the end was known draw more tokens.
    draw(matchers, [1, 2, 3], "d$$")
    assert allowed(matchers, [1, 2, 3]) == ["$", "$", "$"]


def test_a_sequence_that_returns_continues_its_text(matchers):
    text = "start: /ab{3}c/"
    matchers.enter(entering([0, 4, 5], grammar(text, s0="", s4="abb", s5="abbbc")))
    assert allowed(matchers, [0, 4, 5]) == ["a", "b", "$"]
    draw(matchers, [4], "b")
    assert allowed(matchers, [4]) == ["c"]


def test_a_slot_forgets_the_grammar_of_its_former_sequence(matchers):
    matchers.enter(entering([2], grammar('start: "ab"', s2="")))
    draw(matchers, [2], "a")
    matchers.enter(entering([2]))
    assert allowed(matchers, [2]) == [None]
    matchers.enter(entering([2], grammar('start: "cd"', s2="")))
    assert allowed(matchers, [2]) == ["c"]


def cut(matchers: Matchers, slots: list[int]) -> list[int]:
    """The slots of the sequences that a batch of these slots would end."""
    masks = matchers.masks(np.array(slots, np.int32))
    rows = None if masks is None else masks.cut_rows
    return [] if rows is None else [slots[row] for row in rows]


def test_a_sequence_whose_grammar_cannot_be_followed_is_cut(matchers, caplog):
    """The server refuses such grammars. If one comes anyway, the engine continues."""
    matchers.enter(
        entering([0, 1], grammar("start: nothing", s0=""), grammar('start: "ab"', s1=""))
    )
    assert allowed(matchers, [0, 1]) == ["$", "a"]
    assert cut(matchers, [2, 1, 0]) == [0]
    assert "cannot be compiled here" in caplog.text
    matchers.enter(entering([0], grammar('start: "ab"', s0="ba")))
    assert allowed(matchers, [0, 1]) == ["$", "a"]
    assert cut(matchers, [0, 1]) == [0]
    assert "cannot be followed any further" in caplog.text
    matchers.enter(entering([0], grammar('start: "ab"', s0="")))
    assert cut(matchers, [0, 1]) == []


# Rules that refer to one another: after a dozen letters the library has too many alternatives.
THICKET = "\n".join(
    f"r{i}: " + " | ".join(f"/[a-z]/ r{(7 * i + 13 * j + 1) % 300}" for j in range(6)) + ' | "x"'
    for i in range(300)
)


def test_a_mask_that_takes_too_much_work_cuts_its_sequence(matchers, caplog):
    """Our limit is below the library's own, which these letters do not reach."""
    matchers.enter(
        entering([0, 1], grammar(f"start: r0\n{THICKET}", s0=""), grammar("start: /a+/", s1=""))
    )
    for _ in range(100):
        if cut(matchers, [0, 1]):
            break
        draw(matchers, [0, 1], "aa")
    assert cut(matchers, [1, 0]) == [0]
    assert allowed(matchers, [0, 1]) == ["$", "a$"]
    assert "Too many items" in caplog.text
    # It has drawn its end. Draws of batches that were planned before change nothing.
    draw(matchers, [0, 1], "$a")
    assert allowed(matchers, [0, 1]) == ["$", "a$"]


def test_without_grammars_no_job_is_started(matchers):
    matchers.wait()
    matchers.enter(entering([0, 1]))
    assert not matchers._jobs
    assert matchers.masks(np.array([0, 1], np.int32)) is None


def test_without_a_vocabulary_grammars_are_refused():
    matchers = Matchers(2, 8, None)
    matchers.enter(entering([0]))
    with pytest.raises(ProtocolError, match="no vocabulary"):
        matchers.enter(entering([0], grammar('start: "a"', s0="")))


def test_a_worker_loads_its_vocabulary_in_another_thread(checkpoint):
    threads = []
    padding = [b""] * (VOCAB_SIZE - len(VOCABULARY.tokens))

    def load() -> Vocabulary:
        threads.append(threading.current_thread())
        return dataclasses.replace(VOCABULARY, tokens=[*VOCABULARY.tokens, *padding])

    config = worker_config(checkpoint("llama", tied=True))
    driver = Driver(Worker(config, load), config)
    driver.worker.warm_up()
    assert len(threads) == 1
    assert threads != [threading.current_thread()]
    driver.start(0)
    first = driver.batch(prefill=[Enter(0, [1, 2, 3])])
    entered = msgspec.structs.replace(first.parameters, grammars=(grammar('start: "ab"', s0=""),))
    driver.number += 1
    results = [driver.worker.submit(msgspec.structs.replace(first, parameters=entered)).collect()]
    results += [driver.step(decode=[0]) for _ in range(2)]
    assert [result.token_ids.tolist() for result in results] == [[0], [1], [EOS]]


def test_a_worker_whose_vocabulary_cannot_be_loaded_does_not_become_ready(checkpoint):
    def fail() -> Vocabulary:
        raise ModelError("no tokenizer")

    worker = Worker(worker_config(checkpoint("llama", tied=True)), fail)
    with pytest.raises(ModelError, match="no tokenizer"):
        worker.warm_up()


def check_masks(vocab_size):
    rng = np.random.default_rng(vocab_size)
    rows = np.array([1, 2, 5])
    bits = rng.integers(0, 256, (3, 8), dtype=np.uint8)
    logits = torch.from_numpy(rng.standard_normal((7, vocab_size), np.float32))
    masks = TokenMasks(rows, bits, np.zeros(3, np.bool_))
    for part in (slice(0, 7), slice(1, 3), slice(2, 6), slice(3, 5), slice(5, 6)):
        before = logits[part]
        after = masks.send(torch.device("cpu"), None).apply(before, before, part)
        if not any(part.start <= row < part.stop for row in rows):
            assert after is before
        for row in range(part.start, part.stop):
            for token in range(vocab_size):
                is_masked = (
                    row in rows and not bits[rows.tolist().index(row), token // 8] >> token % 8 & 1
                )
                expected = -np.inf if is_masked else logits[row, token]
                assert after[row - part.start, token] == expected
    assert torch.isfinite(logits).all()


def test_masks_forbid_the_tokens_whose_bit_is_unset():
    for vocab_size in (1, 7, 32, 45, 64):
        with named(vocab_size):
            check_masks(vocab_size)


def test_a_grammar_wins_over_adjustments_that_forbid_all_its_tokens():
    bits = np.array([[0b0110], [0b0001]], np.uint8)
    masks = TokenMasks(np.array([0, 2]), bits, np.zeros(2, np.bool_))
    logits = torch.arange(12, dtype=torch.float32).view(3, 4)
    adjusted = logits.clone()
    adjusted[:, :2] = -torch.inf
    after = masks.send(torch.device("cpu"), None).apply(adjusted, logits, slice(0, 3))
    none = -np.inf
    assert after.tolist() == [[none, none, 2, none], [none, none, 6, 7], [8, none, none, none]]
