"""The full check of the manager's state, for tests and for ``allocator_sanity_checks=T``.

Is slow, and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from itertools import pairwise

import numpy as np

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.kv.allocator import PageAllocator
from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.sequence import Sequence, SequenceState
from tokasaurus.manager.waiting import Backlog

__all__ = ["check_allocator", "check_invariants"]


def check_invariants(running: RunningSequences, backlog: Backlog) -> None:
    """Checks everything that must hold between two turns.

    Raises:
        ProtocolError: something does not; says what.
    """
    holders = [
        sequence
        for sequence in running.slots.sequences
        if sequence is not None and sequence.state is SequenceState.RUNNING
    ]
    pins = [cartridge.pages for cartridge in running.cartridges.all()]
    slots, roots = running.slots, running.pages.cache.roots
    is_open = [slots.weights_version.item(holder.slot) in roots for holder in holders]
    tables = [slots.pages(holder.slot) for holder in holders]
    orphans = [table for table, is_found in zip(tables, is_open, strict=True) if not is_found]
    check_allocator(running.pages, [*tables, *pins], orphans)
    _check_cartridges(running, backlog)
    versions = slots.weights_version[slots.order >= 0]
    _require(bool((versions == running.weights_version).all()), "a sequence has other weights")
    for holder, is_found in zip(holders, is_open, strict=True):
        if not is_found:
            continue
        _check_prefix_is_shared(running, holder)
    _check_slots(running, backlog)
    _check_progress(running)
    _check_flights(running)
    _check_backlog(running, backlog)
    _check_shares(running, backlog)


def check_allocator(
    pages: PageAllocator, tables: list[np.ndarray], orphans: Rows[np.ndarray] = ()
) -> None:
    """Checks that every page is accounted for exactly once.

    Args:
        pages: the allocator.
        tables: the pages of each holder.
        orphans: those tables whose namespaces are closed. They may share private pages.
    """
    pool = pages.pool
    held = np.zeros(pool.num_pages, np.int64)
    for table in tables:
        _require(len(set(table.tolist())) == len(table), "a table names a page twice")
        held[table] += 1
    _require(np.array_equal(held, pool.references), "reference counts differ from the page tables")
    free = np.zeros(pool.num_pages, np.int64)
    np.add.at(free, pool.free_pages, 1)
    _require(bool((free <= 1).all()), "a page is free twice")
    is_free = free == 1
    _require(
        np.array_equal(is_free, (held == 0) & ~pool.cached), "a page leaked, or is free and in use"
    )
    may_be_shared = pool.cached.copy()
    for table in orphans:
        may_be_shared[table] = True
    _require(bool((held[~may_be_shared] <= 1).all()), "a private page has two holders")
    _require(
        pool.num_evictable == int(np.count_nonzero((held == 0) & pool.cached)),
        "the number of evictable pages is wrong",
    )
    _check_tree(pages)


def _check_tree(pages: PageAllocator) -> None:
    pool, page_bytes = pages.pool, pages.page_size * 4
    references = pool.references.tolist()
    seen: list[int] = []
    num_reachable = 0
    for node in pages.cache.nodes():
        run, parent = node.pages.tolist(), node.parent
        _require(len(run) > 0, "a node of the prefix cache is empty")
        _require(len(node.ids) == len(run) * page_bytes, "a node's ids do not fit its pages")
        if parent is None or parent.children.get(node.ids[:page_bytes]) is not node:
            raise ProtocolError("invariant broken: a node is not its parent's child")
        seen += run
        path = run if parent.parent is None else [int(parent.pages[-1]), *run]
        _require(
            all(references[above] >= references[below] for above, below in pairwise(path)),
            "a page is held without the one before it",
        )
        _require(node.last_used <= parent.last_used, "a node was used after its parent")
        is_evictable = not node.children and references[run[-1]] == 0
        _require(node.queued or not is_evictable, "an unreferenced leaf cannot be evicted")
        num_reachable += sum(references[page] == 0 for page in run)
    _require(
        sorted(seen) == np.flatnonzero(pool.cached).tolist(), "the tree's pages are not as marked"
    )
    _require(num_reachable == pool.num_evictable, "evictable pages cannot be reached")


def _check_cartridges(running: RunningSequences, backlog: Backlog) -> None:
    """Each cartridge has pages or none, and those that use it are counted."""
    pages, cartridges = running.pages, running.cartridges.all()
    in_use = [cartridge for cartridge in cartridges if cartridge.num_holders]
    idle = [cartridge for cartridge in cartridges if not cartridge.num_holders]
    for complaint, count, holders in (
        ("the pinned pages are miscounted", pages.num_pinned, in_use),
        ("the idle pages are miscounted", pages.num_idle, idle),
    ):
        _require(count == sum(len(cartridge.pages) for cartridge in holders), complaint)
    claiming = running.claims.sequences()
    _require(not running.claims.woken, "sequences that were woken still wait for a cartridge")
    num_holders: Counter[Cartridge | None] = Counter(each.request.cartridge for each in claiming)
    runs = [
        sequence.request.cartridge
        for sequence in running.slots.sequences
        if sequence is not None and sequence.state is SequenceState.RUNNING
    ]
    num_holders.update(runs)
    num_users = Counter(request.cartridge for request in backlog.requests.values())
    for cartridge in cartridges:
        name = f"cartridge {cartridge.name}"
        _require(cartridge.num_holders == num_holders[cartridge], f"{name}: holders are miscounted")
        _require(cartridge.num_users == num_users[cartridge], f"{name}: users are miscounted")
        _check_residence(running, cartridge)
    _require(all(its is None or its.is_there for its in runs), "a cartridge in use is not there")
    for sequence in claiming:
        states = SequenceState.WAITING, SequenceState.PARKED
        _require(sequence.state in states, f"{sequence.name} claims a cartridge and does not wait")
    for sequence in running.claims.aside():
        is_parked = sequence.state is SequenceState.PARKED
        _require(is_parked, f"{sequence.name} has stepped aside and is elsewhere")
        _require(sequence not in running.claims, f"{sequence.name} has a claim and stepped aside")


def _check_residence(running: RunningSequences, cartridge: Cartridge) -> None:
    """A cartridge that is there is found under its pseudo ids, and else nothing is."""
    pages, name = running.pages, f"cartridge {cartridge.name}"
    num_full = cartridge.num_full_pages
    is_pinned = len(cartridge.pages) > 0
    _require(len(cartridge.pages) in (0, cartridge.num_pages), f"{name} has some of its pages")
    is_coming = cartridge.is_being_written
    _require(is_pinned == (cartridge.is_there or is_coming), f"nothing writes {name}")
    found = pages.cache.lookup(running.weights_version, cartridge.ids, num_full)
    if not cartridge.is_there:
        _require(not len(found), f"{name} is found and not there")
        return
    _require(np.array_equal(found, cartridge.pages[:num_full]), f"{name} cannot be found")
    if cartridge.num_pages > num_full:
        is_apart = not pages.pool.cached[cartridge.pages[-1]]
        _require(bool(is_apart), f"the tail of {name} can be found")


def _check_prefix_is_shared(running: RunningSequences, sequence: Sequence) -> None:
    """The cached pages of a holder are a path from the root of the tree, and hold its ids."""
    slots, pages = running.slots, running.pages
    table = slots.pages(sequence.slot)
    ids = running.all_ids(sequence)
    cached = pages.pool.cached[table]
    count = int(cached.sum())
    _require(bool(cached[:count].all()), f"{sequence.name} holds a cached page after a private one")
    _require(
        count * slots.page_size <= slots.length[sequence.slot],
        f"{sequence.name}: a page is findable before it is filled",
    )
    _require(count >= slots.published[sequence.slot], f"{sequence.name} lost a published page")
    found = pages.cache.lookup(slots.weights_version.item(sequence.slot), ids, count)
    _require(
        np.array_equal(found, table[:count]), f"{sequence.name} holds cached pages with other ids"
    )


def _check_slots(running: RunningSequences, backlog: Backlog) -> None:
    slots = running.slots
    owned = [slot for slot, sequence in enumerate(slots.sequences) if sequence is not None]
    _require(len(owned) + slots.num_free == slots.num_slots, "a slot leaked")
    for slot in owned:
        sequence = slots.sequence(slot)
        state = sequence.state
        runs = state is SequenceState.RUNNING
        _require(sequence.slot == slot, f"{sequence.name} does not know its slot")
        _require(runs == (slots.order[slot] >= 0), f"{sequence.name} is {state} in the slot table")
        counts = state in (SequenceState.RUNNING, SequenceState.PREEMPTED)
        _require(counts == bool(slots.absorbing[slot]), f"{sequence.name}: absorbing is wrong")
        if counts:
            name = (int(slots.request_id[slot]), int(slots.sample_index[slot]))
            _require(backlog.find(*name) is sequence, f"{sequence.name} is in no table")
    is_idle = slots.order < 0
    for column in (slots.length, slots.capacity, slots.final_length, slots.decode_limit):
        _require(not column[is_idle].any(), "a slot that does not run has something planned")


def _check_progress(running: RunningSequences) -> None:
    """Lengths and counts of each running slot agree with one another."""
    slots = running.slots
    rows = np.flatnonzero(slots.order >= 0)
    length, final, capacity = slots.length[rows], slots.final_length[rows], slots.capacity[rows]
    _require(bool((length <= final).all()), "a sequence is planned beyond max_tokens")
    _require(bool((length <= capacity).all()), "a sequence is planned beyond its pages")
    _require(bool((capacity < final + slots.page_size).all()), "a sequence holds needless pages")
    _require(bool((slots.decode_limit[rows] <= final).all()), "a decode limit is too high")
    _require(bool((slots.delivered <= slots.known).all()), "more was delivered than is known")
    prefilling = [
        slot for slot in rows.tolist() if slots.length[slot] < len(slots.sequence(slot).prompt_ids)
    ]
    _require(
        [sequence.slot for sequence in running.prefilling]
        == sorted(prefilling, key=lambda slot: int(slots.order[slot])),
        "the prompts being fed are not those that are unfinished, oldest first",
    )
    _require(
        not slots.decode_limit[prefilling].any(), "a sequence decodes before its prompt is fed"
    )


def _check_flights(running: RunningSequences) -> None:
    """The tokens that are planned and not known are exactly those in flight."""
    slots = running.slots
    rows_in_flight: Counter[int] = Counter()
    departing: list[int] = []
    for flight in running.in_flight.flights:
        rows_in_flight.update(flight.sampling_slots.tolist())
        departing += flight.departures
        for slot in flight.sampling_slots.tolist():
            _require(slots.last_batch[slot] >= flight.number, "a slot does not know its last batch")
    for slot in range(slots.num_slots):
        sequence = slots.sequences[slot]
        if sequence is None:
            _require(not rows_in_flight[slot], "a slot was given up before its last result")
        elif sequence.state is SequenceState.RUNNING:
            num_planned = max(
                int(slots.known[slot]),
                int(slots.length[slot] - slots.prompt_length[slot]) + 1
                if slots.length[slot] >= len(sequence.prompt_ids)
                else 0,
            )
            _require(
                num_planned - slots.known[slot] == rows_in_flight[slot],
                f"{sequence.name}: tokens in flight are miscounted",
            )
    draining = [
        slot
        for slot, sequence in enumerate(slots.sequences)
        if sequence is not None and sequence.state is not SequenceState.RUNNING
    ]
    preempted = [
        sequence
        for sequence in slots.sequences
        if sequence is not None and sequence.state is SequenceState.PREEMPTED
    ]
    _require(
        sorted(map(id, preempted)) == sorted(map(id, running.preempted)),
        "the preempted sequences are miscounted",
    )
    _require(sorted(departing) == draining, "a slot departs never, or twice, or too early")


def _check_backlog(running: RunningSequences, backlog: Backlog) -> None:
    waiting = backlog.waiting()
    _require(len(set(map(id, waiting))) == len(waiting), "a sequence is in the queue twice")
    _require(len(waiting) == len(backlog), "the queue is miscounted")
    living = [
        sequence for request in backlog.requests.values() for sequence in request.sequences.values()
    ]
    _require(len(living) == backlog.num_sequences, "the living sequences are miscounted")
    states = Counter(sequence.state for sequence in living)
    _require(states[SequenceState.ENDED] == 0, "an ended sequence is still in a table")
    _require(
        states[SequenceState.WAITING] == len(waiting), "a waiting sequence is not in the queue"
    )
    in_slots = sum(sequence.slot >= 0 for sequence in living)
    _require(
        states[SequenceState.RUNNING] + states[SequenceState.PREEMPTED] == in_slots,
        "a sequence has a slot and does not run, or the other way round",
    )
    for request in backlog.requests.values():
        _require(bool(request.sequences), "a request without sequences lives on")
        following = request.followers.values()
        _require(
            all(sequence.state is SequenceState.FOLLOWING for sequence in following),
            "a follower is elsewhere too",
        )
        leader = request.leader
        _require(
            not following or (leader is not None and leader.sample_index in request.sequences),
            "followers have no leader that lives",
        )
    num_following = sum(len(request.followers) for request in backlog.requests.values())
    _require(num_following == states[SequenceState.FOLLOWING], "a follower has no leader to come")
    in_progress = running.in_progress
    _require(not in_progress.woken, "sequences that were woken still wait")
    claiming = set(in_progress.sequences())
    _require(
        claiming <= {*running.prefilling, *waiting},
        "a sequence claims a page and does not feed its prompt",
    )
    held = set(backlog.held())
    _require(
        all(sequence.state is SequenceState.PARKED for sequence in held),
        "a sequence that is held back is elsewhere too",
    )
    waits_for_pages = set(in_progress.waiting())
    waits_for_pages |= {
        sequence
        for sequence in running.claims.sequences()
        if sequence.request.cartridge is not None and not sequence.request.cartridge.is_there
    }
    waits_for_pages.update(running.claims.aside())
    for sequence in living:
        if sequence.state is SequenceState.PARKED:
            _require(
                sequence in waits_for_pages
                or sequence in held
                or not sequence.may_sample(running.stop_lag),
                f"{sequence.name} is parked without a reason",
            )


def _check_shares(running: RunningSequences, backlog: Backlog) -> None:
    """Each sequence has a place of its own, and clients are those of the sequences that live."""
    slots = running.slots
    living = [each for request in backlog.requests.values() for each in request.sequences.values()]
    _require(len({each.order for each in living}) == len(living), "two sequences have one place")
    clients: dict[tuple[int, str], set[int]] = {}
    for sequence in living:
        message = sequence.request.message
        clients.setdefault((message.priority, message.client), set()).add(sequence.request.client)
        if sequence.state is SequenceState.RUNNING:
            is_right = slots.client[sequence.slot] == sequence.request.client
            is_right &= slots.order[sequence.slot] == sequence.order
            _require(bool(is_right), f"{sequence.name} runs for another client, or elsewhere")
    _require(all(len(numbers) == 1 for numbers in clients.values()), "a client has two numbers")
    _require(
        len({number for numbers in clients.values() for number in numbers}) == len(clients),
        "two clients have one number",
    )
    counts = Counter(priority for priority, _ in clients)
    _require(
        all(backlog.shares.num_clients(priority) == count for priority, count in counts.items()),
        "the clients of a priority are miscounted",
    )
    _require(backlog.shares.num_sequences == len(living), "the places are miscounted")


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise ProtocolError(f"invariant broken: {complaint}")
