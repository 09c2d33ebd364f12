"""The store: which version a name gets, what is fetched for it, and what stays on the disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import resource
import tempfile
import time
from pathlib import Path

import pytest
from file_server import Answer, file_server
from small_cartridges import config, has_seed, safetensors_bytes, trained_bytes

from tokasaurus.cartridge_file import CartridgeFile
from tokasaurus.cartridges.specification import CartridgeSpec
from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.errors import EngineError, NotFound, RequestError, SourceUnavailable, StorageFull


@pytest.fixture(scope="module")
def server():
    with file_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _empty(server):
    server.answers.clear()
    server.questions.clear()


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "cartridges"
    path.mkdir()
    return path


def with_store(directory, call, **changes):
    """The result of a coroutine that has a store, of which nothing is under way at the end."""

    async def run():
        store = CartridgeStore(config(directory, **changes))
        try:
            return await call(store)
        finally:
            await store.close()
            assert not [*(directory / ".store").glob("incoming/*")]

    return asyncio.run(run())


def local(name, force=False):
    return CartridgeSpec(str(name), "local", force)


def remote(server, path, force=False):
    return CartridgeSpec(server.url + path, "http", force)


async def pieces(data, size=100):
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def until(check):
    """Waits for what is under way without anybody who waits for it."""
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline, "it never comes true"
        await asyncio.sleep(0.02)


def versions(directory):
    return {path.name.removesuffix(".safetensors") for path in directory.glob(".store/versions/*")}


HOSTS = {"hosts": ("127.0.0.1",)}


# --- versions -------------------------------------------------------------------------------------


def test_a_local_file_is_read_once_and_again_when_it_changes(directory, caplog):
    caplog.set_level(logging.INFO, "tokasaurus")
    path = directory / "a.safetensors"
    path.write_bytes(safetensors_bytes(1))

    async def run(store):
        first = await store.resolve(local("a"))
        assert has_seed(first, 1)
        assert first.metadata.num_tokens == 5
        for force in (False, True, False):
            assert await store.resolve(local("a", force)) == first
        assert caplog.text.count("ready after") == 1  # force_redownload copied nothing
        path.write_bytes(safetensors_bytes(2))
        second = await store.resolve(local("a"))
        assert has_seed(second, 2)
        assert has_seed(first, 1)  # requests in flight still read it
        assert caplog.text.count("ready after") == 2
        path.unlink()
        with pytest.raises(RequestError, match="no such file"):
            await store.resolve(local("a"))

    with_store(directory, run)


def test_a_worker_that_reads_a_version_does_not_see_its_uses(directory):
    """It would take them for changes of the file, and refuse the requests that wait for it."""
    for name in ("a", "b"):
        (directory / f"{name}.safetensors").write_bytes(safetensors_bytes(1))

    async def run(store):
        first = await store.resolve(local("a"))
        with CartridgeFile(first.path) as read:
            time.sleep(0.01)  # longer than the steps in which times of files are kept
            await store.resolve(local("a", force=True))
            await store.resolve(local("b"))
            await store.add("c", pieces(safetensors_bytes(1)))
            read.check_unchanged()

    with_store(directory, run)


def test_the_file_of_a_trainer_has_the_digest_of_its_copy(directory):
    """The user's guide has source=local and a path in the directory for temporary files."""
    with tempfile.TemporaryDirectory() as other:
        path = Path(other) / "cartridge.pt"
        path.write_bytes(trained_bytes(1))
        (directory / "b.safetensors").write_bytes(safetensors_bytes(1))

        async def run(store):
            trained = await store.resolve(local(path, force=True))
            assert has_seed(trained, 1)
            ours = await store.resolve(local("b"))
            assert ours.path == trained.path
            assert versions(directory) == {ours.metadata.digest}

        with_store(directory, run, temporary_root=True)


def test_a_remote_file_is_asked_for_once_and_again_with_force(directory, server):
    server.answers["/c.pt"] = Answer(safetensors_bytes(1), headers={"ETag": '"1"'})

    async def run(store):
        first = await store.resolve(remote(server, "/c.pt"))
        assert await store.resolve(remote(server, "/c.pt")) == first
        assert (server.count("HEAD", "/c.pt"), server.count("GET", "/c.pt")) == (1, 1)
        assert await store.resolve(remote(server, "/c.pt", force=True)) == first
        assert (server.count("HEAD", "/c.pt"), server.count("GET", "/c.pt")) == (2, 1)
        server.answers["/c.pt"] = Answer(safetensors_bytes(2), headers={"ETag": '"2"'})
        assert await store.resolve(remote(server, "/c.pt")) == first
        second = await store.resolve(remote(server, "/c.pt", force=True))
        assert has_seed(second, 2)
        assert await store.resolve(remote(server, "/c.pt")) == second
        assert server.count("GET", "/c.pt") == 2
        server.answers["/c.pt"] = Answer(status=500)
        assert await store.resolve(remote(server, "/c.pt")) == second
        with pytest.raises(SourceUnavailable, match="status 500"):
            await store.resolve(remote(server, "/c.pt", force=True))

    with_store(directory, run, **HOSTS)


def test_a_slow_source_holds_up_no_other(directory, server):
    (directory / "a.safetensors").write_bytes(safetensors_bytes(1))

    async def run(store):
        gate, loop = asyncio.Event(), asyncio.get_running_loop()

        def never(question):
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            return Answer(status=404)

        waiting = []
        for number in range(30):
            server.answers[f"/{number}.pt"] = never
            waiting.append(asyncio.create_task(store.resolve(remote(server, f"/{number}.pt"))))
        await until(lambda: server.questions)
        assert has_seed(await asyncio.wait_for(store.resolve(local("a")), 30), 1)
        assert not any(each.done() for each in waiting)
        gate.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in results} == {RequestError}

    with_store(directory, run, **HOSTS)


def test_a_source_without_versions_is_fetched_again_and_known_by_its_contents(directory, server):
    server.answers["/c.pt"] = Answer(safetensors_bytes(1))

    async def run(store):
        found = {await store.resolve(remote(server, "/c.pt", force=True)) for _ in range(3)}
        assert len(found) == 1
        assert server.count("GET", "/c.pt") == 3

    with_store(directory, run, **HOSTS)


def test_requests_at_the_same_time_share_one_download(directory, server):
    server.answers["/c.pt"] = Answer(safetensors_bytes(1), headers={"ETag": '"1"'})

    async def run(store):
        for force in (False, True):
            specs = [remote(server, "/c.pt", force)] * 64
            found = await asyncio.gather(*(store.resolve(spec) for spec in specs))
            assert len(set(found)) == 1
        assert server.count("GET", "/c.pt") == 1
        # A look is shared by those that come before it begins.
        assert server.count("HEAD", "/c.pt") < 64

    with_store(directory, run, **HOSTS)


def test_with_force_a_request_gets_what_was_there_when_it_came(directory, server):
    """Also if it comes while an older version is being downloaded."""
    order = []

    async def run(store):
        began, gate = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(question):
            if question.method == "GET":
                loop.call_soon_threadsafe(began.set)
                asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            return Answer(safetensors_bytes(1), headers={"ETag": '"1"'})

        server.answers["/c.pt"] = slow
        older = asyncio.create_task(store.resolve(remote(server, "/c.pt")))
        older.add_done_callback(lambda _: order.append("older"))
        await began.wait()
        server.answers["/c.pt"] = Answer(safetensors_bytes(2), headers={"ETag": '"2"'})
        assert has_seed(await store.resolve(remote(server, "/c.pt", force=True)), 2)
        order.append("newer")
        gate.set()
        assert has_seed(await older, 1)
        assert order == ["newer", "older"]
        # The older one, which came later, does not take the name.
        assert has_seed(await store.resolve(remote(server, "/c.pt")), 2)

    with_store(directory, run, **HOSTS)


def test_a_download_ends_with_the_last_request_that_waits_for_it(directory, server):
    async def run(store):
        began, loop = asyncio.Event(), asyncio.get_running_loop()

        def slow(question):
            if question.method == "GET":
                loop.call_soon_threadsafe(began.set)
                return Answer(bytes(1000), length=1_000_000)
            return Answer(headers={"ETag": '"1"'})

        server.answers["/c.pt"] = slow
        waiting = [asyncio.create_task(store.resolve(remote(server, "/c.pt"))) for _ in range(2)]
        await began.wait()
        for each in waiting:
            each.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in results] == [asyncio.CancelledError] * 2
        await until(lambda: not [*(directory / ".store").glob("incoming/*")])

    with_store(directory, run, **HOSTS)


def test_a_slow_source_is_given_up(directory, server):
    async def run(store):
        gate, loop = asyncio.Event(), asyncio.get_running_loop()

        def never(question):
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            return Answer()

        server.answers["/c.pt"] = never
        with pytest.raises(SourceUnavailable, match=r"within 0\.2 s; .*cartridge_timeout_s"):
            await store.resolve(remote(server, "/c.pt"))
        gate.set()

    with_store(directory, run, timeout_s=0.2, **HOSTS)


# --- what is refused ------------------------------------------------------------------------------


def test_what_a_request_may_not_have_is_refused_by_name(directory, server):
    (directory / "bad.pt").write_bytes(b"not a cartridge")
    (directory / "long.safetensors").write_bytes(safetensors_bytes(1, 9))
    (directory / "large.safetensors").write_bytes(safetensors_bytes(1, 400))

    async def run(store):
        async def check(row):
            spec, message = row
            with pytest.raises(RequestError) as caught:
                await store.resolve(spec)
            assert caught.value.field == "cartridges"
            assert re.search(message, caught.value.message), caught.value.message
            assert f"of source {spec.source!r}" in caught.value.message

        rows = [
            (CartridgeSpec("a", "ftp"), "no such source; it can be local, wandb, huggingface, s3"),
            (CartridgeSpec("a/b", "huggingface"), "gets cartridges from local, http only; .*cart"),
            (local(""), "1 to 2048 characters"),
            (local("a" * 2049), "1 to 2048 characters"),
            (local("a\0b"), "all of them printable"),
            (local("a\nb"), "all of them printable"),
            (local("bad.pt"), "cartridge 'bad.pt' of source 'local': "),
            (local("long"), "9 .*8"),
            (local("large"), "max_cartridge_bytes=20000"),
            (local("../a"), "not within the directories"),
            (remote(server, "/none.pt"), "has no such file"),
        ]
        for row in rows:
            await check(row)
        # Nothing of them is kept.
        assert await store.all() == []
        assert not versions(directory)

    with_store(directory, run, sources=("local", "http"), max_tokens=8, max_bytes=20_000, **HOSTS)


def test_a_store_that_is_not_used_writes_nothing(directory):
    async def run(store):
        assert await store.all() == []
        with pytest.raises(RequestError):
            await store.resolve(local("none"))
        with pytest.raises(NotFound):
            await store.delete("none")

    with_store(directory, run)
    assert not [*directory.iterdir()]


def test_a_directory_that_cannot_be_used_is_an_error_that_names_it(directory):
    (directory / "a.safetensors").write_bytes(safetensors_bytes(1))
    (directory / ".store").write_bytes(b"a file")

    async def run():
        store = CartridgeStore(config(directory))
        with pytest.raises(EngineError, match="name another directory with cartridge_dir"):
            await store.resolve(local("a"))
        await store.close()

    asyncio.run(run())


@contextlib.contextmanager
def no_file_larger_than(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(directory, server):
    data = safetensors_bytes(1, 200)
    (directory / "a.safetensors").write_bytes(data)
    server.answers["/c.pt"] = Answer(data)

    async def run(store):
        with no_file_larger_than(1000):
            for call in (
                store.resolve(local("a")),
                store.resolve(remote(server, "/c.pt")),
                store.add("b", pieces(data, 5000)),
            ):
                with pytest.raises(StorageFull, match="cannot be stored: File too large"):
                    await call
            assert await store.all() == []
        assert has_seed(await store.resolve(local("a")), 1, 200)

    with_store(directory, run, **HOSTS)


# --- names ----------------------------------------------------------------------------------------


def test_an_upload_has_a_name_and_outlives_the_store(directory):
    async def upload(store):
        added = await store.add("mine", pieces(safetensors_bytes(1)), b"model: {}")
        assert has_seed(added, 1)
        return added

    async def look(store):
        (named,) = await store.all()
        assert (named.source, named.id, named.is_upload) == ("local", "mine", True)
        assert named.num_bytes == named.cartridge.path.stat().st_size
        assert await store.resolve(local("mine", force=True)) == named.cartridge == added
        again = await store.add("mine", pieces(safetensors_bytes(2)))
        assert await store.resolve(local("mine")) == again
        assert has_seed(again, 2)
        assert has_seed(added, 1)  # a request uses it
        store.release(added.metadata.digest)
        # A version that nothing names or uses goes.
        await until(lambda: versions(directory) == {again.metadata.digest})

    added = with_store(directory, upload)
    with_store(directory, look)


def test_an_upload_goes_before_a_file_of_its_name_also_if_that_is_being_read(directory):
    (directory / "mine.safetensors").write_bytes(safetensors_bytes(1))

    async def run(store):
        older = asyncio.create_task(store.resolve(local("mine")))
        await asyncio.sleep(0.05)
        await store.add("mine", pieces(safetensors_bytes(2)))
        await older
        assert has_seed(await store.resolve(local("mine")), 2)
        await store.delete("mine")
        assert has_seed(await store.resolve(local("mine")), 1)

    with_store(directory, run)


def test_names_of_uploads_and_their_sizes_are_checked(directory):
    async def run(store):
        for name in ("", "a/b", "../a", ".hidden", "a b", "a" * 129, "ä", "a\n"):
            with pytest.raises(RequestError, match="must begin with a letter or digit") as caught:
                await store.add(name, pieces(b""))
            assert caught.value.field == "name"
        with pytest.raises(RequestError, match="max_cartridge_bytes=1000"):
            await store.add("a", pieces(bytes(1001)))
        with pytest.raises(RequestError, match="cartridge 'a' of source 'local': "):
            await store.add("a", pieces(bytes(1000)))
        assert await store.all() == []

    with_store(directory, run, max_bytes=1000)


def test_an_upload_that_breaks_off_leaves_nothing(directory):
    async def breaking():
        yield bytes(100)
        raise ConnectionResetError("the client has gone")

    async def run(store):
        await store.add("a", pieces(safetensors_bytes(1)))
        with pytest.raises(ConnectionResetError):
            await store.add("a", breaking())
        assert has_seed(await store.resolve(local("a")), 1)

    with_store(directory, run)


def test_a_deleted_name_is_gone_and_its_version_once_unused(directory, server):
    server.answers["/c.pt"] = Answer(safetensors_bytes(1), headers={"ETag": '"1"'})

    async def run(store):
        spec = remote(server, "/c.pt")
        stored = await store.resolve(spec)
        await store.delete(spec.id, "http")
        assert await store.all() == []
        assert has_seed(stored, 1)
        store.release(stored.metadata.digest)
        await until(lambda: not versions(directory))
        assert has_seed(await store.resolve(spec), 1)
        assert server.count("GET", "/c.pt") == 2

    with_store(directory, run, **HOSTS)


def test_the_query_of_a_url_is_in_no_list_and_in_no_file(directory, server):
    server.answers["/c.pt"] = Answer(safetensors_bytes(1))

    async def run(store):
        await store.resolve(remote(server, "/c.pt?key=secret"))
        (named,) = await store.all()
        assert named.id == f"{server.url}/c.pt"
        for path in (directory / ".store").rglob("*"):
            assert not path.is_file() or b"secret" not in path.read_bytes()

    with_store(directory, run, **HOSTS)


def test_a_version_whose_file_was_deleted_is_fetched_again(directory, server):
    server.answers["/c.pt"] = Answer(safetensors_bytes(1), headers={"ETag": '"1"'})

    async def run(store):
        spec = remote(server, "/c.pt")
        stored = await store.resolve(spec)
        store.release(stored.metadata.digest)
        stored.path.unlink()
        assert has_seed(await store.resolve(spec), 1)
        added = await store.add("mine", pieces(safetensors_bytes(2)))
        added.path.unlink()
        with pytest.raises(RequestError, match="has been deleted; upload it again"):
            await store.resolve(local("mine"))

    with_store(directory, run, **HOSTS)


# --- room -----------------------------------------------------------------------------------------


def test_copies_go_to_make_room_those_not_used_for_longest_first(directory):
    for seed in range(4):
        (directory / f"{seed}.safetensors").write_bytes(safetensors_bytes(seed, 50))

    async def run(store):
        stored = {}

        async def use(seed):
            stored[seed] = await store.resolve(local(seed))
            store.release(stored[seed].metadata.digest)

        for seed in (0, 1, 2, 0, 3):
            await use(seed)
            await asyncio.sleep(0.02)
        kept = {seed for seed, each in stored.items() if each.path.exists()}
        assert kept == {0, 2, 3}
        assert {each.id for each in await store.all()} == {"0", "2", "3"}
        await use(1)
        assert has_seed(stored[1], 1, 50)

    one = len(safetensors_bytes(0, 50))
    with_store(directory, run, max_stored_bytes=int(3.9 * one))


def test_uploads_and_what_is_in_use_never_go(directory):
    for seed in range(4):
        (directory / f"{seed}.safetensors").write_bytes(safetensors_bytes(seed, 50))
    one = len(safetensors_bytes(0, 50))

    async def run(store):
        added = await store.add("mine", pieces(safetensors_bytes(9, 50)))
        used = await store.resolve(local("0"))
        with pytest.raises(RequestError, match="max_stored_cartridge_bytes") as caught:
            await store.resolve(local("1"))
        assert caught.value.field == "cartridges"
        assert has_seed(added, 9, 50)
        assert has_seed(used, 0, 50)
        store.release(used.metadata.digest)
        assert has_seed(await store.resolve(local("1")), 1, 50)
        assert not used.path.exists()

    with_store(directory, run, max_stored_bytes=int(2.9 * one))


def test_two_stores_in_one_directory_delete_nothing_that_the_other_uses(directory):
    path = directory / "a.safetensors"
    path.write_bytes(safetensors_bytes(1))

    async def run(one):
        other = CartridgeStore(config(directory))
        used = await other.resolve(local("a"))
        path.write_bytes(safetensors_bytes(2))
        renewed = await one.resolve(local("a"))
        assert has_seed(renewed, 2)
        assert has_seed(used, 1)
        assert await other.resolve(local("a")) == renewed
        await other.close()
        await one.delete("a")
        assert versions(directory) == {renewed.metadata.digest}

    with_store(directory, run)


def test_what_a_killed_engine_left_is_deleted(directory):
    async def nothing(store):
        (directory / "a.safetensors").write_bytes(safetensors_bytes(1))
        await store.resolve(local("a"))

    with_store(directory, nothing)
    own = directory / ".store"
    (own / "incoming" / "dead").mkdir()
    (own / "incoming" / "dead" / "fetched").write_bytes(bytes(10))
    (own / "versions" / f"{'0' * 64}.safetensors").write_bytes(bytes(10))
    (own / "names" / "x.part").write_bytes(bytes(10))
    (own / "names" / ("f" * 64)).write_bytes(b"{damaged")

    async def look(store):
        await store.add("b", pieces(safetensors_bytes(2)))
        assert [each.id for each in await store.all()] == ["a", "b"]
        assert len(versions(directory)) == 2
        assert not [*own.glob("names/*.part")]

    with_store(directory, look)


def test_other_users_cannot_read_the_store(directory):
    async def run(store):
        await store.add("a", pieces(safetensors_bytes(1)))
        for path in (directory / ".store").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path

    with_store(directory, run)


def test_cancelled_requests_hold_no_version(directory):
    (directory / "a.safetensors").write_bytes(safetensors_bytes(1))

    async def run(store):
        stored = await store.resolve(local("a"))
        store.release(stored.metadata.digest)
        for delay in range(40):
            task = asyncio.create_task(store.resolve(local("a")))
            await asyncio.sleep(delay / 20_000)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                store.release((await task).metadata.digest)
        await store.delete("a")
        await until(lambda: not versions(directory))

    with_store(directory, run)


# --- anything in any order ------------------------------------------------------------------------


def test_a_random_history_keeps_its_promises(directory, server):
    run_history(directory, server, seed=7, num_stores=2, num_actions=15)


@pytest.mark.long
def test_long_random_histories_keep_their_promises(directory, server):
    run_history(directory, server, seed=8, num_stores=6, num_actions=50)


def run_history(directory, server, seed, num_stores, num_actions):
    """Files change, requests come and go, stores end: each gets the version of its time."""
    rng = random.Random(seed)
    seeds = {f"{kind}{number}": 0 for kind in "lr" for number in range(3)}
    used = []  # versions in use, with their seeds
    known = {}  # what a remote name means

    def write(name, seed):
        seeds[name] = seed
        if name[0] == "l":
            part = directory / "part"
            part.write_bytes(safetensors_bytes(seed))
            part.rename(directory / f"{name}.safetensors")
        else:
            server.answers[f"/{name}"] = Answer(
                safetensors_bytes(seed), headers={"ETag": f'"{seed}"'}
            )

    for name in seeds:
        write(name, rng.randrange(6))

    async def ask(store, name):
        force = rng.random() < 0.5
        spec = local(name, force) if name[0] == "l" else remote(server, f"/{name}", force)
        stored = await store.resolve(spec)
        wanted = seeds[name] if name[0] == "l" or force else known.get(name, seeds[name])
        assert has_seed(stored, wanted)
        if name[0] == "r":
            known[name] = wanted
        used.append((stored, wanted))

    async def session(store):
        for _ in range(num_actions):
            action, name = rng.random(), rng.choice(sorted(seeds))
            if action < 0.25:
                write(name, rng.randrange(6))
            elif action < 0.75:
                await ask(store, name)
            elif action < 0.9 and used:
                store.release(used.pop(rng.randrange(len(used)))[0].metadata.digest)
            else:
                spec = (name, "local") if name[0] == "l" else (f"{server.url}/{name}", "http")
                with contextlib.suppress(NotFound):
                    await store.delete(*spec)
                known.pop(name, None)
            for stored, seed in used:
                assert has_seed(stored, seed)
        named = {each.cartridge.metadata.digest for each in await store.all()}
        in_use = {stored.metadata.digest for stored, _ in used}
        await until(lambda: versions(directory) == named | in_use)

    for _ in range(num_stores):
        with_store(directory, session, **HOSTS)
        used.clear()
