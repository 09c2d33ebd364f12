"""The cartridges of requests: which versions the managers know, and what uses them.

::

    specs ──resolve──▶ versions on the disk ──enter──▶ known to the managers ──▶ a lease
                                                            ▲                      │ release
                                                            └── kept while used ◀──┘

A *version* is a cartridge with certain content; its identity is the digest of its tensors. What
comes before a prompt is a *prefix*: one version, or several in the order of the request. Managers
know each prefix by a name of its own. Where a source has another version by now, the next request
gets a new prefix, and requests in flight finish on theirs. A prefix that no request uses and that
no name stands for any more is unloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from tokasaurus.cartridges.differences import differences
from tokasaurus.cartridges.joined import JoinedCalls
from tokasaurus.cartridges.specification import CartridgeSpec, ModelShape, StoredCartridge
from tokasaurus.errors import Conflict, RequestError, RequestTooLong, TokasaurusError
from tokasaurus.protocol.commands import Action, CommandDone, LoadCartridge, UnloadCartridge
from tokasaurus.text.commands import OnDone

__all__ = [
    "FIELD",
    "MAX_CARTRIDGES",
    "Cartridges",
    "Lease",
    "Prefix",
    "PrefixSource",
    "Store",
    "Use",
    "check_specs",
]

FIELD = "cartridges"

MAX_CARTRIDGES = 64
"""The cartridges that one request may have."""

_RETRY_S = 1.0

_MAX_KNOWN = 1024
"""Prefixes that the managers know; more only while requests use them."""


class Store(Protocol):
    """Where versions are on this machine's disk."""

    async def resolve(self, spec: CartridgeSpec) -> StoredCartridge:
        """The version that a spec stands for now. Its file stays until it is released.

        Raises:
            RequestError: there is no such cartridge, or it must not be used.
            EngineError: its source or the disk fails.
        """

    def release(self, digest: str) -> None:
        """Undoes one ``resolve``."""


@dataclass(frozen=True)
class Prefix:
    """What comes before the prompts of a request.

    Attributes:
        name: by which the managers know it.
        num_tokens: positions that it takes.
        digests: of its cartridges, in order.
    """

    name: str
    num_tokens: int
    digests: tuple[str, ...]


class Lease(Protocol):
    """The use of a prefix, which stays until the lease is released.

    Attributes:
        prefix: to put before prompts.
    """

    @property
    def prefix(self) -> Prefix: ...

    def release(self) -> None:
        """The requests have ended that the lease was for. Harmless if called again."""


class PrefixSource(Protocol):
    """Where operations get prefixes from."""

    async def acquire(self, specs: Sequence[CartridgeSpec]) -> Lease:
        """The prefix that specs stand for now. Raises RequestError or EngineError."""


OnEntered: TypeAlias = Callable[[TokasaurusError | None], None]
"""Called once: the managers know the prefix, or why they do not."""


@dataclass(eq=False)
class _Known:
    """A prefix that the managers know, or are about to."""

    prefix: Prefix
    versions: Sequence[StoredCartridge]
    # By version: under which names, source and id, requests use it.
    names: Sequence[Counter[tuple[str, str]]]
    num_users: int = 0
    is_entered: bool = False
    waiting: list[OnEntered] = field(default_factory=list)


@dataclass(eq=False)
class _Lease:
    prefix: Prefix
    _known: _Known
    _names: Sequence[tuple[str, str]]
    _owner: Cartridges
    _is_released: bool = False

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._owner.leave(self._known, self._names)


@dataclass
class Use:
    """How a version is used at the moment.

    Attributes:
        version: that is used.
        num_users: requests that use it, alone or with others.
        prefixes: the names of the prefixes that it is in.
        names: under which requests use it: source and id.
    """

    version: StoredCartridge
    num_users: int = 0
    prefixes: list[str] = field(default_factory=list)
    names: set[tuple[str, str]] = field(default_factory=set)


class Cartridges:
    """The prefixes of one engine. All methods belong to one thread, if not said otherwise.

    Args:
        store: of the versions on the disk.
        model: that cartridges must fit.
        max_tokens: that a request may have with everything.
        command: gives the managers a command; see ``Generations.command``.
    """

    def __init__(
        self,
        store: Store,
        model: ModelShape,
        max_tokens: int,
        command: Callable[[Action, OnDone], None],
    ) -> None:
        self._store = store
        self._model = model
        self._max_tokens = max_tokens
        self._command = command
        self._named: dict[tuple[str, str], str] = {}  # digests by source and id
        self._num_names: Counter[str] = Counter()  # of each digest
        # By digests; the one used last is the last. Those to be unloaded are not here any more.
        self._known: dict[tuple[str, ...], _Known] = {}
        self._leaving: list[_Known] = []  # their unloading was refused, and is tried again
        self._num_entered = 0
        self._looks: JoinedCalls[tuple[str, ...]] = JoinedCalls(fresh=True)

    # --- for requests -----------------------------------------------------------------------------

    async def acquire(self, specs: Sequence[CartridgeSpec]) -> Lease:
        """Finds the versions that specs stand for now, and lets the managers know them.

        Args:
            specs: at least one, in the order of their positions.

        Raises:
            RequestError: a cartridge cannot be had, or does not fit; names it.
            EngineError: a source or the engine cannot serve.
        """
        if all(spec.source == "local" for spec in specs):
            # These are looked at for each request. A burst of equal requests shares two looks.
            digests = await self._looks.run(tuple(specs), lambda: self._look(specs))
            known = self._known.get(digests)
            if known is not None and known.is_entered:
                return self._use(known, [(spec.source, spec.id) for spec in specs])
        return await self._acquire(specs)

    async def _look(self, specs: Sequence[CartridgeSpec]) -> tuple[str, ...]:
        """The digests of a prefix, which the managers know unless it is outdated at once."""
        lease = await self._acquire(specs)
        lease.release()
        return lease.prefix.digests

    async def _acquire(self, specs: Sequence[CartridgeSpec]) -> Lease:
        versions = await self.resolve(specs)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(error: TokasaurusError | None) -> None:
            if answer.done():  # it was cancelled
                return
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)

        lease = self.enter(specs, versions, settle)
        try:
            await answer
        except BaseException:
            lease.release()
            raise
        return lease

    async def resolve(self, specs: Sequence[CartridgeSpec]) -> list[StoredCartridge]:
        """The versions that specs stand for now, for ``enter``. Any thread may call it.

        Raises:
            RequestError: a cartridge cannot be had, or does not fit; names it.
            EngineError: a source cannot serve.
        """
        check_specs(specs)
        tasks = [asyncio.ensure_future(self._store.resolve(spec)) for spec in specs]
        try:
            versions = list(await asyncio.gather(*tasks))
            self._check(specs, versions)
        except BaseException:
            for task in tasks:
                task.cancel()
                task.add_done_callback(self._give_back)
            raise
        return versions

    def _give_back(self, task: asyncio.Future[StoredCartridge]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._store.release(task.result().metadata.digest)

    def enter(
        self,
        specs: Sequence[CartridgeSpec],
        versions: Sequence[StoredCartridge],
        on_entered: OnEntered,
    ) -> Lease:
        """Lets the managers know a prefix, if they do not.

        Args:
            specs: of a request.
            versions: that they were resolved to.
            on_entered: called with the outcome, perhaps at once. The caller releases the lease
                also after an error.
        """
        digests = tuple(version.metadata.digest for version in versions)
        names = [(spec.source, spec.id) for spec in specs]
        outdated = [self._name(name, digest) for name, digest in zip(names, digests, strict=True)]
        found = self._known.pop(digests, None)
        known = found or self._new(digests, versions)
        self._known[digests] = known
        lease = self._use(known, names)
        if known.is_entered:
            on_entered(None)
        else:
            known.waiting.append(on_entered)
        if found is None:
            self._load(known)
        else:
            self._release(digests)  # one use is enough
        if any(outdated) or len(self._known) > _MAX_KNOWN:
            self._tidy()
        return lease

    def _use(self, known: _Known, names: Sequence[tuple[str, str]]) -> Lease:
        digests = known.prefix.digests
        self._known[digests] = self._known.pop(digests)  # the last one: it was used last
        for name, counts in zip(names, known.names, strict=True):
            counts[name] += 1
        known.num_users += 1
        return _Lease(known.prefix, known, names, self)

    def leave(self, known: _Known, names: Sequence[tuple[str, str]]) -> None:
        """A request has ended. To be called by its lease."""
        for name, counts in zip(names, known.names, strict=True):
            counts[name] -= 1
        known.num_users -= 1
        if not known.num_users:
            self._tidy(known)

    def _new(self, digests: tuple[str, ...], versions: Sequence[StoredCartridge]) -> _Known:
        """A prefix of a name that none has had: one of the same content may still be leaving."""
        self._num_entered += 1
        name = f"{'+'.join(digest[:12] for digest in digests[:4])}-{self._num_entered}"
        num_tokens = sum(version.metadata.num_tokens for version in versions)
        return _Known(Prefix(name, num_tokens, digests), versions, [Counter() for _ in versions])

    def _load(self, known: _Known) -> None:
        def done(result: CommandDone | TokasaurusError) -> None:
            waiting, known.waiting = known.waiting, []
            error = None
            if isinstance(result, TokasaurusError):
                error = _as_request_error(result)
                if self._known.get(known.prefix.digests) is known:
                    del self._known[known.prefix.digests]
                self._unload(known)  # some of several replicas may know it
            else:
                known.is_entered = True
            for on_entered in waiting:
                on_entered(error)
            if not known.num_users:  # their callers did not wait for it
                self._tidy(known)

        prefix = known.prefix
        paths = tuple(str(version.path) for version in known.versions)
        self._command(LoadCartridge(prefix.name, paths, prefix.num_tokens), done)

    # --- what is not needed any more --------------------------------------------------------------

    def forget(self, source: str, cartridge_id: str) -> None:
        """A name was deleted. Requests in flight finish with what they have."""
        if (source, cartridge_id) in self._named:
            self._unname((source, cartridge_id))
            self._tidy()

    def _name(self, key: tuple[str, str], digest: str) -> bool:
        """A name stands for this version; returns whether it was another one's last name."""
        before = self._named.get(key)
        if before == digest:
            return False
        is_outdated = before is not None and self._unname(key)
        self._named[key] = digest
        self._num_names[digest] += 1
        return is_outdated

    def _unname(self, key: tuple[str, str]) -> bool:
        """Drops a name; returns whether it was the version's last one."""
        digest = self._named.pop(key)
        self._num_names[digest] -= 1
        if self._num_names[digest]:
            return False
        del self._num_names[digest]
        return True

    def _tidy(self, one: _Known | None = None) -> None:
        """Unloads what nothing uses and no name stands for, and the oldest of too many.

        Args:
            one: nothing else can have become idle; None if anything can.
        """
        self._unload_again()
        num_over = len(self._known) - _MAX_KNOWN
        for known in [*self._known.values()] if one is None or num_over > 0 else [one]:
            is_idle = known.is_entered and not known.num_users
            if is_idle and (num_over > 0 or self._is_outdated(known)):
                num_over -= 1
                del self._known[known.prefix.digests]
                self._unload(known)

    def _is_outdated(self, known: _Known) -> bool:
        return any(digest not in self._num_names for digest in known.prefix.digests)

    def _unload(self, known: _Known) -> None:
        def done(result: CommandDone | TokasaurusError) -> None:
            if isinstance(result, Conflict):  # its last request is about to end
                self._leaving.append(known)
                with contextlib.suppress(RuntimeError):  # there is no loop in a program's own
                    asyncio.get_running_loop().call_later(_RETRY_S, self._unload_again)
            else:
                self._release(known.prefix.digests)

        self._command(UnloadCartridge(known.prefix.name), done)

    def _unload_again(self) -> None:
        leaving, self._leaving = self._leaving, []
        for known in leaving:
            self._unload(known)

    def _release(self, digests: Sequence[str]) -> None:
        for digest in digests:
            self._store.release(digest)

    # --- checks -----------------------------------------------------------------------------------

    def _check(self, specs: Sequence[CartridgeSpec], versions: Sequence[StoredCartridge]) -> None:
        """Raises RequestError where versions do not fit the model, or one another."""
        seen: dict[str, CartridgeSpec] = {}
        for spec, version in zip(specs, versions, strict=True):
            digest = version.metadata.digest
            if digest in seen:
                raise RequestError(
                    f"cartridges {_shown(seen[digest])} and {_shown(spec)} have the same content;"
                    " name each once",
                    FIELD,
                )
            seen[digest] = spec
            found = differences(version.metadata.shape, self._model)
            if found:
                raise RequestError(
                    f"cartridge {_shown(spec)} is not for this model: {'; '.join(found)}", FIELD
                )
        num_tokens = sum(version.metadata.num_tokens for version in versions)
        if num_tokens > self._max_tokens - 2:  # a token of a prompt, and one that is generated
            have = "the cartridge has" if len(specs) == 1 else "the cartridges have together"
            raise RequestTooLong.for_context(
                f"{have} {num_tokens} tokens",
                self._max_tokens,
                "for cartridges, prompt and completion together",
                FIELD,
            )

    # --- for those who look -----------------------------------------------------------------------

    def uses(self) -> Mapping[str, Use]:
        """How versions are used, by digest; those that the managers do not know are left out."""
        uses: dict[str, Use] = {}
        for known in [*self._known.values(), *self._leaving]:
            for version, names in zip(known.versions, known.names, strict=True):
                use = uses.setdefault(version.metadata.digest, Use(version))
                use.num_users += known.num_users
                use.prefixes.append(known.prefix.name)
                use.names |= (+names).keys()
        return uses


def check_specs(specs: Sequence[CartridgeSpec]) -> None:
    """Raises RequestError if there are too many cartridges, or one is named twice."""
    if len(specs) > MAX_CARTRIDGES:
        raise RequestError(
            f"a request may have {MAX_CARTRIDGES} cartridges, and this one has {len(specs)}", FIELD
        )
    seen: set[tuple[str, str]] = set()
    for spec in specs:
        if (spec.source, spec.id) in seen:
            raise RequestError(f"cartridge {_shown(spec)} is named twice; name each once", FIELD)
        seen.add((spec.source, spec.id))


def _shown(spec: CartridgeSpec) -> str:
    return f"{spec.id!r} (source {spec.source})"


def _as_request_error(error: TokasaurusError) -> TokasaurusError:
    """The error in the words of the request."""
    if isinstance(error, RequestError):
        return type(error)(error.message, FIELD)
    return error
