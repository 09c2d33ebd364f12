"""Starts an engine under torchrun, or under SLURM's srun: one program for each worker.

    torchrun --nnodes=2 --nproc-per-node=4 ... -m tokasaurus.launch.torchrun model=... dp_size=8

Rank 0 has the supervisor and the server. Every rank is an outpost for the worker of its number, and
the first rank of a replica for the manager too. Ranks find rank 0 through torch's store at
``MASTER_ADDR``.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.parser import drop_warning, log_format_of, parse_command_line
from tokasaurus.errors import ConfigError, LaunchError
from tokasaurus.launch.assemble import explain
from tokasaurus.launch.engine_run import run_alone
from tokasaurus.launch.remote.launcher import Place, RemoteLauncher
from tokasaurus.launch.remote.link import SECRET_VARIABLE, secret_of
from tokasaurus.launch.remote.outpost import Outpost
from tokasaurus.launch.remote.outposts import Outposts
from tokasaurus.observability.logging import configure_logging, report_refusal
from tokasaurus.protocol.role import Role

__all__ = ["Rank", "address_of_rank_0", "main", "places_of", "rank_of"]

log = logging.getLogger(__name__)

# In the store.
_KEY = "tokasaurus/supervisor"
_SEEN_KEY = "tokasaurus/rank-0-seen-from"
_DEFAULT_PORT = "29500"
_OWN_OUTPOST_S = 10.0  # that rank 0 waits for its outpost's end
# What srun says, by the names that torchrun uses.
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Rank:
    """One program of the job."""

    rank: int
    world_size: int
    local_rank: int  # among those of its machine


def rank_of(environment: MutableMapping[str, str]) -> Rank:
    """Which rank this program is. Variables that torch needs and SLURM names otherwise are set.

    Raises:
        ConfigError: no launcher has set the variables.
    """
    for name, slurms in _SLURM.items():
        if name not in environment and slurms in environment:
            environment[name] = environment[slurms]
    environment.setdefault("MASTER_PORT", _DEFAULT_PORT)
    missing = [name for name in (*_SLURM, "MASTER_ADDR") if name not in environment]
    if missing == ["MASTER_ADDR"]:
        raise ConfigError(
            "MASTER_ADDR is not set; set it to the address of the machine with rank 0, for example"
            ' with: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} must be set: start this with torchrun --nproc-per-node=..."
            " -m tokasaurus.launch.torchrun, or with srun; on one machine use toka"
        )
    numbers = [environment[name] for name in _SLURM]
    if not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"{', '.join(_SLURM)} must be numbers, not {', '.join(numbers)}")
    return Rank(*map(int, numbers))


def places_of(config: EngineConfig) -> dict[Role, Place]:
    """Where each process runs: worker r of replica d at rank d * pp_size * tp_size + r."""
    size = config.pp_size * config.tp_size
    places = {}
    for replica in range(config.dp_size):
        places[Role("manager", replica)] = Place(replica * size)
        for rank in range(size):
            places[Role("worker", replica, rank)] = Place(replica * size + rank)
    return places


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank.

    Returns:
        The exit status: as that of ``toka``; of other ranks than 0, it is 0 when the engine has
        ended, and 1 when the connection to rank 0 was lost.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        rank = rank_of(os.environ)
        config = parse_command_line(words, os.environ, explain, warn=drop_warning)
        _check_world(config, rank)
        store = _store()
        if rank.rank == 0:
            return run_alone(words, os.environ, partial(_launch, rank, store))
        return _serve_as_outpost(config, rank, store)
    except (ConfigError, LaunchError) as error:
        report_refusal(str(error), log_format_of(words, os.environ))
        return 2 if isinstance(error, ConfigError) else 1


def _check_world(config: EngineConfig, rank: Rank) -> None:
    if config.launcher != "local":
        raise ConfigError(f"launcher={config.launcher} starts with toka, not with torchrun")
    sizes = {name: getattr(config, name) for name in ("dp_size", "pp_size", "tp_size")}
    num_needed = len([role for role in places_of(config) if role.kind == "worker"])
    if rank.world_size != num_needed:
        flags = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"{flags} needs {num_needed} ranks, one for each worker, and there are"
            f" {rank.world_size}; start {num_needed} ranks (--nnodes times --nproc-per-node of"
            " torchrun, --ntasks of srun), or change a size"
        )


def _store() -> Any:
    """Torch's store of the job. Rank 0 holds it where torchrun does not."""
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://")))[0]


def address_of_rank_0(name: str, rank: Rank, store: Any, timeout_s: float) -> str:
    """The name or address by which this rank reaches rank 0, so that others reach this rank, too.

    Doors listen where their outpost reaches the supervisor. Many machines know themselves by a name
    that they resolve to loopback, and others to an address. So each rank says what the name is to
    it, and one that gets loopback takes the address that another has got.

    Args:
        name: of rank 0's machine.
        rank: this one.
        store: of the job.
        timeout_s: for the other ranks.

    Raises:
        LaunchError: some ranks have not come in time.
    """
    own = _resolved(name)
    store.set(f"{_SEEN_KEY}/{rank.rank}", own)
    if not _is_loopback(own) or name in ("localhost", own):
        return name
    keys = [f"{_SEEN_KEY}/{number}" for number in range(rank.world_size)]
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise LaunchError(
            f"some of the {rank.world_size} ranks have not come within {timeout_s:g} s"
        ) from error
    seen = (store.get(key).decode() for key in keys)
    return next((address for address in seen if not _is_loopback(address)), name)


def _resolved(name: str) -> str:
    """The first address of a machine, as this one sees it."""
    return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


# --- rank 0 ---------------------------------------------------------------------------------------


def _launch(rank: Rank, store: Any, config: EngineConfig) -> RemoteLauncher:
    """Makes the launcher, tells the others where it is, and waits for them."""
    secret = secret_of(os.environ)
    name = os.environ["MASTER_ADDR"]
    address = address_of_rank_0(name, rank, store, config.launch_timeout_s)
    outposts = Outposts(_listening_host(name), secret)
    port = outposts.address[1]
    own = Outpost((address, port), secret, 0, rank.local_rank)
    thread = threading.Thread(target=_run_own, args=(own,), name="outpost", daemon=True)
    thread.start()
    # Or this program might end before its outpost has deleted its directory.
    launcher = RemoteLauncher(
        outposts, places_of(config), on_close=partial(thread.join, _OWN_OUTPOST_S)
    )
    try:
        # Whoever reaches the store can read it. A secret that the user gave does not go there.
        told = None if SECRET_VARIABLE in os.environ else secret
        store.set(_KEY, json.dumps({"port": port, "secret": told}))
        launcher.await_outposts(config.launch_timeout_s)
    except BaseException:
        launcher.close()
        raise
    return launcher


def _run_own(outpost: Outpost) -> None:
    try:
        outpost.run()
    except LaunchError as error:
        log.error("the outpost of rank 0: %s", error)


def _listening_host(name: str) -> str:
    """The address to listen at, by which others reach this machine under a name.

    Many machines know themselves by a name that others resolve to something else than loopback.
    """
    host = _resolved(name)
    if _is_loopback(host) and name not in ("localhost", host):
        return "0.0.0.0"
    return host


# --- other ranks ----------------------------------------------------------------------------------


def _serve_as_outpost(config: EngineConfig, rank: Rank, store: Any) -> int:
    configure_logging(f"outpost-{rank.rank}", config.log_level, config.log_format)
    host = address_of_rank_0(os.environ["MASTER_ADDR"], rank, store, config.launch_timeout_s)
    found: Mapping[str, Any] = json.loads(store.get(_KEY))
    # A terminal's or a job's signal reaches every rank. Rank 0 obeys it, and dismisses the others.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Outpost(
        (host, found["port"]), _shared_secret(found["secret"]), rank.rank, rank.local_rank
    ).run()
    return 0


def _shared_secret(told: str | None) -> str:
    """The secret that this rank was given, or was told by rank 0."""
    if SECRET_VARIABLE in os.environ:
        return secret_of(os.environ)
    if told is None:
        raise ConfigError(
            f"rank 0 has {SECRET_VARIABLE} in its environment; set the same for every rank, or for"
            " none"
        )
    return told


if __name__ == "__main__":
    sys.exit(main())
