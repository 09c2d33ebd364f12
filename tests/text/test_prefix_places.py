"""Where beginnings of prompts are: judged by a plain comparison of prompts."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np

from tokasaurus.text.prefix_places import PrefixPlaces


def prompt(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that two prompts have in common at their beginning."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def ends(num_tokens: int) -> list[int]:
    places = PrefixPlaces()
    return [end for _, end in places.blocks(np.zeros(num_tokens, np.int32))]


def test_blocks_are_whole_and_few_however_long_the_prompt_is() -> None:
    assert ends(63) == []
    assert ends(200) == [64, 128, 192]
    assert ends(1300) == [*range(64, 1025, 64), 1152, 1280]
    assert len(ends(100_000)) < 64
    steps = np.diff(ends(100_000))
    assert (steps % 64 == 0).all()
    assert (steps <= np.maximum(64, np.array(ends(100_000)[:-1]) / 8)).all()
    # A longer prompt has the same blocks first.
    assert ends(20_000)[: len(ends(5_000))] == ends(5_000)


def test_the_longest_common_beginning_is_found_in_random_prompts() -> None:
    for seed in range(20):
        chance = random.Random(seed)
        places, sent = PrefixPlaces(), {0: [], 1: [], 2: []}
        for replica in sent:
            places.add(replica, 1 << 20)
        pool = [prompt()]
        for _ in range(60):
            head = chance.choice(pool)
            ids = np.concatenate(
                [
                    head[: chance.randint(0, len(head))],
                    np.array([chance.randrange(9) for _ in range(chance.randint(1, 900))]),
                ]
            ).astype(np.int32)
            pool.append(ids)
            blocks = places.blocks(ids)
            expected = {}
            for replica, prompts in sent.items():
                longest = max((common(ids, each) for each in prompts), default=0)
                whole = max((end for end in ends(len(ids)) if end <= longest), default=0)
                if whole:
                    expected[replica] = whole
            assert places.cached(blocks) == expected, seed
            replica = chance.randrange(3)
            places.note(replica, blocks)
            sent[replica].append(ids)


def test_what_was_sent_longest_ago_is_forgotten_and_ends_before_beginnings() -> None:
    places = PrefixPlaces()
    places.add(0, 512)
    prompts = [np.full(256, number, np.int32) for number in range(3)]
    blocks = [places.blocks(ids) for ids in prompts]
    for number in (0, 1, 0, 2):  # 0 was sent again after 1
        places.note(0, blocks[number])
    assert [places.cached(each) for each in blocks] == [{0: 256}, {}, {0: 256}]
    half = np.full(128, 7, np.int32)
    places.note(0, places.blocks(half))
    assert places.cached(blocks[0]) == {0: 128}
    assert places.cached(blocks[2]) == {0: 256}


def test_a_lost_replica_and_a_flush_leave_nothing() -> None:
    places = PrefixPlaces()
    ids = np.arange(300, dtype=np.int32)
    for replica in (0, 1):
        places.add(replica, 4096)
        places.note(replica, places.blocks(ids))
    assert places.cached(places.blocks(ids)) == {0: 256, 1: 256}
    places.drop(0)
    assert places.cached(places.blocks(ids)) == {1: 256}
    places.add(0, 4096)  # it was started again
    assert places.cached(places.blocks(ids)) == {1: 256}
    places.clear()
    assert places.cached(places.blocks(ids)) == {}
    assert not places._holders
    assert all(recent.sizes == OrderedDict() for recent in places._recent.values())


def test_prompts_behind_other_cartridges_have_other_beginnings() -> None:
    places = PrefixPlaces()
    places.add(0, 4096)
    ids = np.arange(100, dtype=np.int32)
    places.note(0, places.blocks(ids, "a"))
    assert places.cached(places.blocks(ids, "a")) == {0: 64}
    assert places.cached(places.blocks(ids, "b")) == places.cached(places.blocks(ids)) == {}


def test_a_registered_cartridge_is_the_first_block_of_what_comes_behind_it() -> None:
    places = PrefixPlaces()
    for replica in (0, 1):
        places.add(replica, 4096)
    places.register("a", 300)
    ids, others = np.arange(100, dtype=np.int32), np.arange(1, 101, dtype=np.int32)
    assert [end for _, end in places.blocks(ids, "a")] == [300, 364]
    places.note(0, places.blocks(ids, "a"))
    places.note(1, places.blocks(ids[:5], "a"))
    assert places.cached(places.blocks(ids, "a")) == {0: 364, 1: 300}
    assert places.cached(places.blocks(others, "a")) == {0: 300, 1: 300}
    assert places.cached(places.blocks(ids)) == {}
    places.unregister("a")
    assert [end for _, end in places.blocks(ids, "a")] == [64]
