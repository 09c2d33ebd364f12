"""Processes of an engine are killed and stopped at random moments, under load."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import FLAGS, NUM_MOMENTS, Load, ask, is_whole, states, undisturbed
from engine_process import EngineProcess, eventually, running

from tokasaurus.protocol.role import Role

pytestmark = [pytest.mark.engine, pytest.mark.long]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[str]]]:
    with running(tmp_path_factory.mktemp("one"), *FLAGS) as engine:
        yield undisturbed(engine)


# Replicas, stages and ranks of a stage.
@pytest.mark.parametrize("grid", [(3, 1, 1), (2, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.timeout(900)
def test_every_request_is_answered_once(
    tmp_path: Path, expected: list[list[str]], grid: tuple[int, int, int], number: signal.Signals
) -> None:
    dp, pp, tp = grid
    chance = random.Random(f"{grid} {number}")
    flags = (f"dp_size={dp}", f"pp_size={pp}", f"tp_size={tp}")
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, *flags)
    roles = [Role("manager", replica) for replica in range(dp)]
    roles += [Role("worker", replica, rank) for replica in range(dp) for rank in range(pp * tp)]
    try:
        engine.wait_ready()
        load = Load(engine, expected)
        try:
            for moment in range(NUM_MOMENTS):
                time.sleep(chance.uniform(0.0, 3.0))
                role = chance.choice(roles)
                # One that starts is spared: after two starts in vain it would be given up.
                what = f"{moment}: replica {role.replica} is back"
                eventually(lambda role=role: strike(engine, role, number), what, 90)
                if chance.random() < 0.7:  # otherwise the next moment meets the engine as it heals
                    eventually(lambda: is_whole(engine, dp), f"{moment}: the engine heals", 90)
        finally:
            load.end()
        eventually(lambda: is_whole(engine, dp), "the engine heals", 90)
        load.check()
        assert ask(engine, 1) == expected[1]
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit(30) == 0
        assert list(engine.private.iterdir()) == []
    finally:
        engine.stop()


def strike(engine: EngineProcess, role: Role, number: signal.Signals) -> bool:
    """Sends a signal to a process of a replica that serves. Returns whether there was one."""
    try:
        if states(engine).get(str(role.replica)) == "ok":
            os.kill(engine.child(str(role)), number)
            return True
    except ProcessLookupError:  # it has just ended
        pass
    return False
