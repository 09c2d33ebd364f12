"""Engines that torchrun starts, or srun: every rank a program, as on machines of their own."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch.distributed
from engine_process import EngineProcess, eventually
from ports import held_port

from tokasaurus import LLM, SamplingParams
from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError, LaunchError
from tokasaurus.launch import torchrun as torchrun_module
from tokasaurus.launch.remote.launcher import Place
from tokasaurus.launch.remote.link import SECRET_VARIABLE
from tokasaurus.launch.torchrun import (
    Rank,
    _shared_secret,
    address_of_rank_0,
    places_of,
    rank_of,
)
from tokasaurus.protocol.role import Role

FLAGS = (
    "max_seqs_per_forward=16",
    "kv_cache_num_tokens=16384",
    "cpu_threads=1",
    "attention=reference",
)
REQUEST = {
    "model": "m",
    "prompt": "A B C D",
    "max_tokens": 300,
    "temperature": 0.0,
    "extra_body": {"ignore_eos": True},
}
FP32 = "dtype=float32"
DRAINS = "shutdown_timeout_s=600"  # by itself: longer than any test waits
MODULE = "tokasaurus.launch.torchrun"


@pytest.fixture
def port() -> Iterator[int]:
    """Where the ranks meet."""
    with held_port() as held:
        yield held


def torchrun(num_ranks: int, port: int) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"),
        *("--master-addr=127.0.0.1", f"--master-port={port}", "-m", MODULE),
    )


class Srun:
    """Ranks as srun starts them: an engine with rank 0, and processes with the others."""

    def __init__(self, directory: Path, port: int, world_size: int, *flags: str) -> None:
        self._variables = {
            "SLURM_NTASKS": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.engine = EngineProcess(
            directory / "toka.log",
            *FLAGS,
            DRAINS,
            *flags,
            program=("env", *self._words(0), sys.executable, "-m", MODULE),
        )
        self.others = []
        for rank in range(1, world_size):
            with (directory / f"rank-{rank}.log").open("wb") as log:
                self.others.append(
                    subprocess.Popen(
                        [
                            "env",
                            *self._words(rank),
                            sys.executable,
                            "-m",
                            MODULE,
                            *FLAGS,
                            DRAINS,
                            *flags,
                        ],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "TMPDIR": str(self.engine.private)},
                    )
                )

    def _words(self, rank: int) -> list[str]:
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return [f"{name}={value}" for name, value in {**self._variables, **own}.items()]

    def stop(self) -> None:
        self.engine.stop()
        for each in self.others:
            each.kill()
            each.wait()


@pytest.fixture
def srun(tmp_path: Path, port: int) -> Iterator[Srun]:
    ranks = Srun(tmp_path, port, 2, "dp_size=2")
    try:
        ranks.engine.wait_ready()
        yield ranks
    finally:
        ranks.stop()


def answer(engine: EngineProcess, seed: int) -> list[str]:
    done = engine.client(timeout=120).completions.create(**REQUEST, n=4, seed=seed)
    return [choice.text for choice in done.choices]


def stream(engine: EngineProcess) -> str:
    chunks = engine.client(timeout=120).completions.create(**REQUEST, stream=True)
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


@functools.cache
def of_one_device() -> str:
    """What an engine in this process answers to REQUEST."""
    flags = {key: value for key, _, value in (flag.partition("=") for flag in (*FLAGS, FP32))}
    numbers = {key: int(value) if value.isdecimal() else value for key, value in flags.items()}
    params = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    with LLM(**numbers) as llm:
        return llm.generate(REQUEST["prompt"], params, use_tqdm=False)[0].outputs[0].text


@pytest.mark.engine
@pytest.mark.processes
@pytest.mark.parametrize(
    "sizes",
    [
        ("dp_size=2",),
        pytest.param(("pp_size=2",), marks=pytest.mark.long),
        pytest.param(("tp_size=2",), marks=pytest.mark.long),
        pytest.param(("pp_size=2", "tp_size=2"), marks=pytest.mark.long),
    ],
)
def test_torchrun_starts_an_engine_that_serves_and_drains(tmp_path, port, sizes):
    program = torchrun(2 ** len(sizes), port)
    engine = EngineProcess(tmp_path / "toka.log", *FLAGS, DRAINS, FP32, *sizes, program=program)
    try:
        engine.wait_ready()
        assert stream(engine) == of_one_device()
        assert len(answer(engine, 1)) == 4
        assert all(answer(engine, 2))
        pids = [engine.child(role) for role in ("server", "manager", "worker")]
        os.kill(pids[0], signal.SIGTERM)
        assert engine.wait_exit() == 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert list(engine.private.glob("tokasaurus-*")) == []
    finally:
        engine.stop()


@pytest.mark.engine
@pytest.mark.processes
@pytest.mark.long
def test_the_loss_of_a_rank_loses_no_request(srun):
    """The rank's machine is gone: its replica's requests go on at the other one."""
    engine, other = srun.engine, srun.others[0]
    expected = [stream(engine), answer(engine, 9)]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, engine) for _ in range(4)]
        answers = [pool.submit(answer, engine, 9) for _ in range(4)]
        before = engine.metrics()["generated_tokens_total"]
        eventually(
            lambda: engine.metrics()["generated_tokens_total"] > before + 200, "both compute", 60
        )
        other.send_signal(signal.SIGKILL)
        assert [each.result(120) for each in streams] == [expected[0]] * 4
        assert [each.result(120) for each in answers] == [expected[1]] * 4
    assert "lost the outpost" in engine.log
    assert "1 replica goes on" in engine.log
    # Nobody but srun can start the rank again.
    gone = f"replica 1: the program on {socket.gethostname()} is gone; 1 replica goes on"
    eventually(lambda: gone in engine.log, gone)
    assert engine.get("/health")[0] == 200
    engine.signal(signal.SIGTERM)
    assert engine.wait_exit() == 0


@pytest.mark.engine
@pytest.mark.processes
@pytest.mark.long
def test_a_process_that_dies_at_another_rank_is_started_again_there(srun, tmp_path):
    engine = srun.engine

    def log_of_rank_1() -> str:
        return (tmp_path / "rank-1.log").read_text()

    pid = int(re.search(r" worker-1-0 .*process id (\d+)", log_of_rank_1())[1])
    os.kill(pid, signal.SIGKILL)
    name = socket.gethostname()
    expected = (
        f"the worker-1-0 ended: killed by SIGKILL; perhaps the system ran out of memory on {name}"
    )
    eventually(lambda: expected in engine.log, expected)
    expected = answer(engine, 1)
    eventually(lambda: "replica 1 is ready again" in engine.log, "the replica is back", 60)
    with ThreadPoolExecutor(8) as pool:  # more than one replica has seats for
        assert list(pool.map(partial(answer, engine), [1] * 8)) == [expected] * 8
    assert len(set(re.findall(r" worker-1-0 .*process id (\d+)", log_of_rank_1()))) == 2
    # Rank 0 obeys a signal, and tells the other rank.
    srun.others[0].send_signal(signal.SIGTERM)
    assert answer(engine, 1)
    engine.signal(signal.SIGTERM)
    assert engine.wait_exit() == 0
    assert srun.others[0].wait(60) == 0


@pytest.mark.engine
@pytest.mark.processes
@pytest.mark.long
def test_workers_that_share_layers_at_different_ranks_are_started_again_together(tmp_path, port):
    srun = Srun(tmp_path, port, 4, "dp_size=2", "tp_size=2", FP32)
    engine = srun.engine
    try:
        engine.wait_ready()
        with ThreadPoolExecutor(8) as pool:
            # More than one replica has seats for.
            asked = [pool.submit(stream, engine) for _ in range(8)]
            before = engine.metrics()["generated_tokens_total"]
            eventually(
                lambda: engine.metrics()["generated_tokens_total"] > before + 200, "they run", 60
            )
            # The second worker of the second replica.
            log = (tmp_path / "rank-3.log").read_text()
            os.kill(int(re.search(r" worker-1-1 .*process id (\d+)", log)[1]), signal.SIGKILL)
            assert {each.result(120) for each in asked} == {of_one_device()}
        eventually(lambda: "replica 1 is ready again" in engine.log, "the replica is back", 60)
        for rank, name in ((2, "worker-1-0"), (3, "worker-1-1")):
            log = (tmp_path / f"rank-{rank}.log").read_text()
            assert len(set(re.findall(rf" {name} .*process id (\d+)", log))) == 2, name
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: stream(engine), range(8))) == {of_one_device()}
        engine.signal(signal.SIGTERM)
        assert engine.wait_exit() == 0
        assert [each.wait(60) for each in srun.others] == [0, 0, 0]
    finally:
        srun.stop()


@pytest.mark.engine
@pytest.mark.processes
@pytest.mark.long
def test_the_end_of_rank_0_ends_the_others(srun):
    srun.engine.process.kill()
    assert srun.others[0].wait(60) == 1
    child = srun.engine.child("worker")
    eventually(lambda: not alive(child), "the worker of rank 0 ends")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run_rank(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    return subprocess.run(
        [sys.executable, "-m", MODULE, *flags],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_wrong_world_size_is_refused_with_the_right_one():
    place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for world, flags, needed in (
        ("3", ("dp_size=2",), "dp_size=2 x pp_size=1 x tp_size=1 needs 2 ranks"),
        ("1", ("dp_size=2", "pp_size=2"), "dp_size=2 x pp_size=2 x tp_size=1 needs 4 ranks"),
    ):
        done = run_rank(*flags, **place, WORLD_SIZE=world)
        assert done.returncode == 2
        assert done.stderr.startswith("toka: error: "), done.stderr
        assert needed in done.stderr
        assert f"and there are {world}; start" in done.stderr


def test_without_a_launcher_the_error_says_how_to_start():
    done = run_rank("dp_size=2")
    assert done.returncode == 2
    assert "start this with torchrun --nproc-per-node=" in done.stderr


def test_a_rank_is_what_torchrun_says_or_what_slurm_says():
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "n1"}
    environment = dict(slurm)
    assert rank_of(environment) == Rank(3, 8, 1)
    assert environment["MASTER_PORT"].isdecimal()  # for torch
    torch = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2"}
    assert rank_of({**slurm, **torch}) == Rank(5, 6, 2)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set.*scontrol"):
        rank_of({name: value for name, value in slurm.items() if name != "MASTER_ADDR"})
    with pytest.raises(ConfigError, match="must be numbers"):
        rank_of({**slurm, "RANK": "x"})


def test_each_worker_has_the_rank_of_its_number_and_a_manager_that_of_its_first():
    places = places_of(EngineConfig(dp_size=2, pp_size=2))
    assert places == {
        Role("worker", 0, 0): Place(0),
        Role("worker", 0, 1): Place(1),
        Role("worker", 1, 0): Place(2),
        Role("worker", 1, 1): Place(3),
        Role("manager", 0): Place(0),
        Role("manager", 1): Place(2),
    }


def test_a_secret_that_the_user_gave_does_not_go_through_the_store(monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "a secret of thirty-two characters")
    assert _shared_secret(None) == "a secret of thirty-two characters"
    monkeypatch.delenv(SECRET_VARIABLE)
    assert _shared_secret("of the store") == "of the store"
    with pytest.raises(ConfigError, match="set the same for every rank"):
        _shared_secret(None)


def addresses_of_rank_0(monkeypatch, name: str, seen: list[str]) -> list[str]:
    """What each rank takes, whose machine resolves the name as listed."""
    import torch.distributed as dist

    store = dist.HashStore()
    resolve = dict(enumerate(seen))
    monkeypatch.setattr(torchrun_module, "_resolved", lambda _: resolve[place.rank])
    place = threading.local()

    def of(rank: int) -> str:
        place.rank = rank
        return address_of_rank_0(name, Rank(rank, len(seen), 0), store, timeout_s=20)

    with ThreadPoolExecutor(len(seen)) as pool:
        return list(pool.map(of, range(len(seen))))


def test_a_machine_that_resolves_its_own_name_to_loopback_takes_what_others_see(monkeypatch):
    # Two ranks on the machine of rank 0, and two elsewhere.
    seen = ["127.0.1.1", "127.0.1.1", "10.1.2.3", "10.1.2.3"]
    expected = ["10.1.2.3", "10.1.2.3", "node-0", "node-0"]
    assert addresses_of_rank_0(monkeypatch, "node-0", seen) == expected
    assert addresses_of_rank_0(monkeypatch, "node-0", ["::1", "fe80::1%eth0"]) == [
        "fe80::1%eth0",
        "node-0",
    ]
    # On one machine nobody knows better; an address, or localhost, is meant as it is.
    assert addresses_of_rank_0(monkeypatch, "node-0", ["127.0.1.1"] * 2) == ["node-0"] * 2
    assert addresses_of_rank_0(monkeypatch, "127.0.0.1", ["127.0.0.1"]) == ["127.0.0.1"]
    assert addresses_of_rank_0(monkeypatch, "localhost", ["::1", "10.1.2.3"])[0] == "localhost"


def test_rank_0_waits_until_its_outpost_has_deleted_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    delete = shutil.rmtree

    def delete_late(*args, **options):
        time.sleep(0.3)
        delete(*args, **options)

    monkeypatch.setattr(shutil, "rmtree", delete_late)
    config = EngineConfig(load_format="dummy")
    launcher = torchrun_module._launch(Rank(0, 1, 0), torch.distributed.HashStore(), config)
    assert len([*tmp_path.glob("tokasaurus-*")]) == 1
    launcher.close()
    assert [*tmp_path.glob("tokasaurus-*")] == []


def test_a_rank_that_does_not_come_is_an_error_in_time():
    import torch.distributed as dist

    rank = Rank(0, 2, 0)
    name = socket.gethostname()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchrun_module, "_resolved", lambda _: "127.0.1.1")
        with pytest.raises(LaunchError, match=r"some of the 2 ranks have not come within 0.1 s"):
            address_of_rank_0(name, rank, dist.HashStore(), timeout_s=0.1)
