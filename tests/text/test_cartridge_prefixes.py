"""Cartridges of requests, as the managers get to know them and are told to forget them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from known_cartridges import KnownCartridges

from tokasaurus.cartridges.specification import CartridgeSpec, ModelShape
from tokasaurus.errors import Conflict, EngineDead, RequestError, RequestTooLong, TokasaurusError
from tokasaurus.protocol.commands import Action, CommandDone, LoadCartridge, UnloadCartridge
from tokasaurus.text import cartridges as module
from tokasaurus.text.cartridges import MAX_CARTRIDGES, Cartridges, Lease

SHAPE = ModelShape(num_layers=2, num_kv_heads=1, head_dim=8, name="org/model")


class World:
    """Cartridges with a store and managers that a test answers for.

    Attributes:
        sent: the actions of all commands.
        known: the prefixes that the managers know, with their files.
        refusals: what commands of a type are answered with, instead of being carried out.
        is_slow: commands wait for ``answer``.
        source: of the cartridges that requests name.
    """

    def __init__(self) -> None:
        self.store = KnownCartridges(SHAPE)
        self.sent: list[Action] = []
        self.known: dict[str, tuple[str, ...]] = {}
        self.refusals: dict[type, TokasaurusError] = {}
        self.is_slow = False
        self.source = "local"
        self._waiting: list[tuple[Action, Callable[..., None]]] = []
        self.cartridges = Cartridges(self.store, SHAPE, 100, self._command)

    def _command(self, action: Action, on_done: Callable[..., None]) -> None:
        self.sent.append(action)
        self._waiting.append((action, on_done))
        if not self.is_slow:
            self.answer()

    def answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        for action, on_done in waiting:
            if type(action) in self.refusals:
                on_done(self.refusals[type(action)])
                continue
            if isinstance(action, UnloadCartridge) and self.is_used(action.name):
                on_done(Conflict("a request names it"))
                continue
            if isinstance(action, LoadCartridge):
                assert action.name not in self.known
                self.known[action.name] = action.paths
            elif self.known.pop(action.name, None) is None:
                on_done(RequestError("there is none", "name"))
                continue
            on_done(CommandDone(0))

    def named(self, *ids: str, force: bool = False) -> list[CartridgeSpec]:
        return [CartridgeSpec(each, self.source, force) for each in ids]

    def is_used(self, name: str) -> bool:
        """Whether a request of the manager names a prefix."""
        return False

    async def lease(self, *ids: str) -> Lease:
        return await self.cartridges.acquire(self.named(*ids))


def in_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test(World()))

    run.__doc__ = test.__doc__
    return run


@in_world
async def test_requests_of_one_version_share_what_the_managers_know(world: World) -> None:
    stored = world.store.put("a", 21)
    first, second = await world.lease("a"), await world.lease("a")
    assert first.prefix is second.prefix
    assert (first.prefix.num_tokens, first.prefix.digests) == (21, (stored.metadata.digest,))
    (load,) = world.sent
    assert isinstance(load, LoadCartridge)
    assert (load.name, load.num_tokens) == (first.prefix.name, 21)
    assert load.paths == (str(stored.path),)
    first.release()
    second.release()
    second.release()
    assert len(world.sent) == 1  # it stays for the next request
    assert world.store.holds == {stored.metadata.digest: 1}


@in_world
async def test_several_cartridges_are_one_prefix_in_the_order_of_the_request(world: World) -> None:
    a, b = world.store.put("a", 21), world.store.put("b", 4)
    for order, files in ((("a", "b"), (a, b)), (("b", "a"), (b, a))):
        lease = await world.lease(*order)
        assert world.known[lease.prefix.name] == tuple(str(each.path) for each in files)
        assert lease.prefix.num_tokens == 25
        assert lease.prefix.digests == tuple(each.metadata.digest for each in files)
    assert len(world.known) == 2
    assert world.cartridges.uses()[a.metadata.digest].num_users == 2


@in_world
async def test_requests_in_flight_finish_on_the_version_that_they_began_with(world: World) -> None:
    old = world.store.put("a", 21)
    before = await world.lease("a")
    new = world.store.put("a", 30, "other content")
    after = await world.lease("a")
    assert (before.prefix.num_tokens, after.prefix.num_tokens) == (21, 30)
    assert {*world.known} == {before.prefix.name, after.prefix.name}
    assert world.store.held == {old.metadata.digest, new.metadata.digest}
    after.release()
    assert {*world.known} == {before.prefix.name, after.prefix.name}
    before.release()
    assert {*world.known} == {after.prefix.name}
    assert world.store.held == {new.metadata.digest}


@in_world
async def test_what_is_outdated_while_nothing_uses_it_is_unloaded_at_once(world: World) -> None:
    world.store.put("a", 21)
    world.store.put("b", 5)
    (await world.lease("a", "b")).release()
    (await world.lease("b")).release()
    assert len(world.known) == 2
    world.store.put("a", 30, "other content")
    lease = await world.lease("a")
    names = {lease.prefix.name, *world.cartridges.uses()[lease.prefix.digests[0]].prefixes}
    assert len(world.known) == 2  # the new a, and b; the pair had the old a
    assert names <= {*world.known}


@in_world
async def test_a_version_that_another_name_stands_for_stays(world: World) -> None:
    world.store.put("a", 21, "same")
    world.store.put("b", 21, "same")
    first, second = await world.lease("a"), await world.lease("b")
    assert first.prefix is second.prefix
    first.release()
    second.release()
    world.store.put("a", 21, "changed")
    (await world.lease("a")).release()
    assert first.prefix.name in world.known
    world.store.put("b", 21, "changed")
    (await world.lease("b")).release()
    assert first.prefix.name not in world.known


@in_world
async def test_a_version_that_comes_back_gets_a_name_of_its_own(world: World) -> None:
    world.source = "s3"
    world.store.put("a", 21, "first", source="s3")
    first = await world.lease("a")
    world.is_slow = True
    first.release()
    world.store.put("a", 21, "second", source="s3")
    asking = asyncio.ensure_future(world.lease("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    world.store.put("a", 21, "first", source="s3")  # while the first one is being unloaded
    again = asyncio.ensure_future(world.lease("a"))
    while len(world.sent) < 4:
        await asyncio.sleep(0)
    world.answer()
    second, third = await asking, await again
    assert len({first.prefix.name, second.prefix.name, third.prefix.name}) == 3
    assert third.prefix.digests == first.prefix.digests


@in_world
async def test_a_refused_unload_is_tried_again(world: World) -> None:
    """The manager may still have a request whose end the client has seen."""
    old = world.store.put("a", 21)
    lease = await world.lease("a")
    world.store.put("a", 30, "other content")
    world.refusals[UnloadCartridge] = Conflict("a request names it")
    other = await world.lease("a")
    lease.release()
    assert lease.prefix.name in world.known
    assert old.metadata.digest in world.store.held
    world.refusals.clear()
    other.release()  # or after a while, as a loop calls it
    assert {*world.known} == {other.prefix.name}
    assert old.metadata.digest not in world.store.held


@in_world
async def test_a_load_that_fails_fails_those_that_wait_for_it(world: World) -> None:
    world.store.put("a", 21)
    for error, expected in (
        (RequestError("no ids are left", "num_tokens"), RequestError),
        (EngineDead("it burnt"), EngineDead),
    ):
        world.refusals[LoadCartridge] = error
        world.is_slow = True
        asking = [asyncio.ensure_future(world.lease("a")) for _ in range(2)]
        while not world._waiting:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        world.answer()
        for each in asking:
            with pytest.raises(expected) as raised:
                await each
            if isinstance(raised.value, RequestError):
                assert raised.value.field == "cartridges"
        world.answer()  # whatever knows it is told to forget it
        assert not world.store.held
        assert not world.cartridges.uses()
    world.refusals.clear()
    world.is_slow = False
    assert (await world.lease("a")).prefix.name in world.known


@in_world
async def test_a_request_that_is_cancelled_while_it_waits_uses_nothing(world: World) -> None:
    stored = world.store.put("a", 21)
    gate = world.store.gates["a"] = asyncio.Event()
    asking = asyncio.ensure_future(world.lease("a"))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    gate.set()
    world.is_slow = True
    asking = asyncio.ensure_future(world.lease("a"))
    while not world.sent:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    world.answer()
    assert world.cartridges.uses()[stored.metadata.digest].num_users == 0


@in_world
async def test_a_burst_of_requests_shares_two_looks_at_a_local_file(world: World) -> None:
    """One that comes while a look is under way gets what was there when it came, or newer."""
    world.store.put("a", 21)
    gate = world.store.gates["a"] = asyncio.Event()
    first = [asyncio.ensure_future(world.lease("a")) for _ in range(50)]
    while not world.store.num_waiting:
        await asyncio.sleep(0)
    world.store.put("a", 30, "other content")
    later = [asyncio.ensure_future(world.lease("a")) for _ in range(50)]
    await asyncio.sleep(0)
    gate.set()
    before, after = [await each for each in first], [await each for each in later]
    assert {lease.prefix.num_tokens for lease in before} == {21}
    assert {lease.prefix.num_tokens for lease in after} == {30}
    assert len(world.store.asked) == 2
    for lease in (*before, *after):
        lease.release()
    assert {*world.known} == {after[0].prefix.name}


@in_world
async def test_one_that_cannot_be_found_ends_the_search_for_the_others(world: World) -> None:
    world.store.put("a", 21)
    world.store.gates["a"] = asyncio.Event()
    with pytest.raises(RequestError, match="'b'"):
        await world.lease("a", "b")
    assert not world.sent
    for _ in range(2):
        await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
    assert not world.store.held


@in_world
async def test_the_oldest_idle_ones_go_where_there_are_too_many(world: World) -> None:
    limit, module._MAX_KNOWN = module._MAX_KNOWN, 3
    try:
        for number in range(5):
            world.store.put(f"c{number}", 5)
        used = await world.lease("c0")
        names = {}
        for number in (1, 2, 1, 3, 4):
            lease = await world.lease(f"c{number}")
            names[number] = lease.prefix.name
            lease.release()
        assert {*world.known} == {used.prefix.name, names[3], names[4]}
    finally:
        module._MAX_KNOWN = limit


@in_world
async def test_deleted_versions_are_unloaded_when_their_requests_have_ended(world: World) -> None:
    stored = world.store.put("a", 21)
    lease = await world.lease("a")
    world.cartridges.forget("local", "b")  # nothing has this name
    world.cartridges.forget("local", "a")
    assert world.cartridges.uses()[stored.metadata.digest].names == {("local", "a")}
    assert lease.prefix.name in world.known
    lease.release()
    assert not world.known
    assert not world.store.held


@in_world
async def test_wrong_requests_are_refused_before_a_manager_hears_of_them(world: World) -> None:
    world.store.put("a", 21)
    world.store.put("copy of a", 21, "a")
    world.store.put("other model", 21, shape=ModelShape(3, 1, 8))
    world.store.put("long", 99)
    world.store.put("half", 50)
    for ids, said, kind in (
        (["a", "a"], "'a' .*named twice", RequestError),
        (["a", "copy of a"], "'a' .* and 'copy of a' .* same content", RequestError),
        (["other model"], "not for this model: .*3.*2", RequestError),
        (["long"], "99 tokens.*100 tokens .max_num_tokens_per_request", RequestTooLong),
        (["half", "a", "long"], "together 170 tokens", RequestTooLong),
        ([f"{i}" for i in range(MAX_CARTRIDGES + 1)], f"{MAX_CARTRIDGES}", RequestError),
        (["nothing"], "'nothing'", RequestError),
    ):
        with pytest.raises(kind, match=said) as raised:
            await world.lease(*ids)
        assert raised.value.field == "cartridges"
    await asyncio.sleep(0)
    assert not world.sent
    assert not world.store.held


# --- any order of events --------------------------------------------------------------------------


KINDS = ("ask", "ask", "change", "delete", "release", "end", "answer", "cancel")


KINDS = ("ask", "ask", "change", "delete", "release", "end", "answer", "cancel")


class BusyWorld(World):
    """Managers that answer late, and refuse to forget what requests named until just now."""

    def __init__(self, source: str, chance: random.Random) -> None:
        super().__init__()
        self.source, self.chance = source, chance
        self.is_slow = True
        self.leases: list[Lease] = []
        self.ending: Counter[str] = Counter()  # requests that managers have not seen the end of
        self.asking: list[asyncio.Future[Lease]] = []

    def is_used(self, name: str) -> bool:
        return bool(self.ending[name]) or any(each.prefix.name == name for each in self.leases)

    async def act(self) -> None:
        chance, ids = self.chance, ["a", "b", "c"]
        kind = chance.choice(KINDS)
        if kind == "ask":
            specs = self.named(*chance.sample(ids, chance.randint(1, 2)))
            self.asking.append(asyncio.ensure_future(self.cartridges.acquire(specs)))
        elif kind == "change":
            name = chance.choice(ids)
            content = f"{name}{chance.randint(0, 2)}"
            self.store.put(name, chance.randint(1, 9), content, source=self.source)
        elif kind == "delete":
            self.cartridges.forget(self.source, chance.choice(ids))
        elif kind == "release" and self.leases:
            lease = self.leases.pop(chance.randrange(len(self.leases)))
            self.ending[lease.prefix.name] += 1
            lease.release()
        elif kind == "end":
            self.ending.clear()
        elif kind == "answer":
            self.answer()
        elif kind == "cancel" and self.asking:
            chance.choice(self.asking).cancel()
        for _ in range(chance.randint(0, 6)):
            await asyncio.sleep(0)
        self.collect()

    def collect(self) -> None:
        for task in [task for task in self.asking if task.done()]:
            self.asking.remove(task)
            if not task.cancelled():
                self.leases.append(task.result())

    def check(self) -> None:
        """Whatever a request uses is known to the managers, and its files are held."""
        for lease in self.leases:
            assert lease.prefix.name in self.known
            assert self.store.held.issuperset(lease.prefix.digests)
        for paths in self.known.values():
            assert {Path(path).stem for path in paths} <= self.store.held
        assert all(count >= 0 for count in self.store.holds.values())

    async def come_to_rest(self) -> None:
        for lease in self.leases:
            lease.release()
        self.leases.clear()
        for task in self.asking:
            task.cancel()
        self.ending.clear()
        for _ in range(30):
            self.answer()
            await asyncio.sleep(0)
            self.cartridges._unload_again()


def test_any_order_of_events_leaves_nothing_behind() -> None:
    async def run(seed: int) -> None:
        world = BusyWorld(("local", "s3")[seed % 2], random.Random(seed))
        for name in ("a", "b", "c"):
            world.store.put(name, 5, source=world.source)
        for _ in range(80):
            await world.act()
            world.check()
        await world.come_to_rest()
        uses = world.cartridges.uses()
        assert not any(use.num_users for use in uses.values())
        known = {prefix for use in uses.values() for prefix in use.prefixes}
        assert known == {*world.known}
        assert world.store.held == {*uses}
        for name in ("a", "b", "c"):  # and then nothing stands for anything
            world.cartridges.forget(world.source, name)
        await world.come_to_rest()
        assert not world.known
        assert not world.store.held

    for seed in range(150):
        try:
            asyncio.run(run(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
