"""More connections than fit at once: a real server and manager, and a simulated device."""

from __future__ import annotations

import resource
import time
import urllib.request
from pathlib import Path

import pytest
from load import crowd

from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedService
from tokasaurus.config.engine import EngineConfig
from tokasaurus.demo import MODEL_DIR
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.configuration import simulated_slices

pytestmark = [pytest.mark.engine, pytest.mark.processes]

ROLES = ("server", "manager")


def service_for(num_connections: int) -> SimulatedService:
    flags = EngineConfig(
        model=str(MODEL_DIR),
        max_seqs_per_forward=256,
        max_queued_requests=num_connections,
        kv_cache_num_tokens=1 << 16,
        log_level="WARNING",
        uvicorn_log_level="warning",
    )
    facts = model_facts(str(MODEL_DIR), None)
    plan = DevicePlan("instant", vocab_size=facts.vocab_size)
    return SimulatedService(simulated_slices(flags, facts), plan)


def resident_bytes(service: SimulatedService) -> dict[str, int]:
    statm = {role: Path(f"/proc/{service.pid(role)}/statm").read_text() for role in ROLES}
    return {role: int(text.split()[1]) * resource.getpagesize() for role, text in statm.items()}


def metrics(service: SimulatedService) -> dict[str, float]:
    url = f"http://127.0.0.1:{service.port}/metrics"
    with urllib.request.urlopen(url) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}


def wait_idle(service: SimulatedService, num_requests: int) -> dict[str, float]:
    """Waits until the manager reports that nothing is left; returns its figures."""
    deadline = time.monotonic() + 60
    while True:
        figures = metrics(service)
        if (
            figures["tokasaurus_finished_sequences_total"] == num_requests
            and figures["tokasaurus_running_sequences"] == 0
        ):
            return figures
        assert time.monotonic() < deadline, figures
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("num_connections", "num_requests"),
    [(100, 500), pytest.param(10_000, 100_000, marks=pytest.mark.long)],
)
def test_every_request_of_a_crowd_is_answered_once_and_memory_comes_back(
    num_connections, num_requests
):
    """Half of the requests stream. Each answer is matched by its number of tokens and its name."""
    num_first = num_requests // 4
    with service_for(num_connections) as service:
        # The baseline is taken after as many connections at once: the memory they needed may stay.
        assert crowd(service.port, num_connections, num_first) == [1] * num_first
        wait_idle(service, num_first)
        before = resident_bytes(service)
        assert crowd(service.port, num_connections, num_requests) == [1] * num_requests
        figures = wait_idle(service, num_first + num_requests)
        after = resident_bytes(service)
    for name in ("prompts_in_flight", "held_sequences", "waiting_sequences", "kv_use"):
        assert figures[f"tokasaurus_{name}"] == 0, name
    for outcome in ("aborted", "refused", "failed"):
        assert figures[f'tokasaurus_prompts_total{{outcome="{outcome}"}}'] == 0
    for role in ROLES:
        grown = after[role] - before[role]
        assert grown < 10e6 + 100 * num_requests, f"{role}: {grown / 1e6:.0f} MB more than before"
