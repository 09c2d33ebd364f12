"""Queries of the dashboard and of the alerts, on a real Prometheus that has scraped a real engine.

``make test-monitoring`` runs these. They need the program ``prometheus``, which Debian has, or its
path in the environment variable PROMETHEUS.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml
from documentation import ROOT
from engine_process import EngineProcess, eventually
from ports import held_port

pytestmark = pytest.mark.prometheus

MONITORING = ROOT / "deploy/monitoring"
KEY = "key-of-this-test"
LOAD_S = 8.0
COMPARED = re.compile(r"(?P<query>.*\S)\s*(?:==|>|<)\s*[\d.]+", re.DOTALL)
"""An alert's expression: what it compares with a number."""


def panels() -> list[dict]:
    return json.loads((MONITORING / "dashboard.json").read_text())["panels"]


def alerts() -> dict[str, str]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


class Prometheus:
    """A server of its own, with the configuration of deploy/ but for names and times.

    Args:
        directory: for its files.
        target: HOST:PORT that it scrapes each second.
        port: its own.
    """

    def __init__(self, directory: Path, target: str, port: int) -> None:
        program = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
        assert program, "no Prometheus: apt-get install prometheus, or set PROMETHEUS"
        (directory / "key").write_text(KEY)
        config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(MONITORING / "alerts.yaml")]
        (job,) = config["scrape_configs"]
        job["authorization"]["credentials_file"] = str(directory / "key")
        job["static_configs"] = [{"targets": [target]}]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._port = port
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--config.file={directory}/prometheus.yaml",
                    f"--storage.tsdb.path={directory}/data",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ask(self, path: str, **arguments: str) -> dict:
        """What its API answers, without the envelope."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from None

    def values(self, query: str) -> list[float]:
        """One of each series that a query finds."""
        found = self.ask("query", query=query)["result"]
        return [float(series["value"][1]) for series in found]

    def is_up(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError):
            return self.values("up") == [1.0]
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped an engine of two replicas whose queue and KV cache were full."""
    directory = tmp_path_factory.mktemp("prometheus")
    with held_port() as port, held_port() as own_port:
        small = ("max_tokens_per_forward=64", "max_seqs_per_forward=8", "kv_cache_num_tokens=512")
        flags = ("dp_size=2", "max_queued_requests=8", f"api_key={KEY}", *small)
        engine = EngineProcess(directory / "toka.log", *flags, port=port)
        scraping = None
        try:
            client = openai.OpenAI(api_key=KEY, base_url=f"{engine.url}/v1", max_retries=0)
            eventually(lambda: engine.get("/ping")[0] == 200, "the server listens")
            # The engine refuses this while it loads, and Prometheus sees the series from its
            # beginning.
            with pytest.raises(openai.InternalServerError):
                ask(client)
            scraping = Prometheus(directory, f"127.0.0.1:{port}", own_port)
            engine.wait_ready()
            eventually(scraping.is_up, "Prometheus scrapes the engine")
            load(client)
            yield scraping
        finally:
            if scraping is not None:
                scraping.stop()
            engine.stop()


def ask(client: openai.OpenAI) -> None:
    prompt = "Once upon a time, there lived a large dinosaur near the wide river. "
    events = client.completions.create(
        model="default", prompt=4 * prompt, max_tokens=32, n=4, stream=True, stop=["never"]
    )
    for _event in events:
        pass


def load(client: openai.OpenAI) -> None:
    """Sends more requests at a time than the queue holds, while Prometheus scrapes."""
    end = time.monotonic() + LOAD_S

    def send() -> None:
        while time.monotonic() < end:
            try:
                ask(client)
            except openai.RateLimitError:
                time.sleep(0.1)

    threads = [threading.Thread(target=send) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_every_query_of_the_dashboard_finds_series(prometheus: Prometheus):
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel.get("targets", ())
    }
    assert len(queries) > 40
    wrong = {}
    for name, query in queries.items():
        query = query.replace("$__rate_interval", "30s").replace("$instance", ".*")
        values = prometheus.values(query)
        if not values or not all(map(math.isfinite, values)):
            wrong[name] = values
    assert not wrong, f"these queries find nothing, or no numbers: {wrong}"


def test_every_alert_compares_what_exists(prometheus: Prometheus):
    wrong = []
    for name, expression in alerts().items():
        compared = COMPARED.fullmatch(expression)
        assert compared is not None, f"{name} is not a comparison with a number: {expression}"
        if not prometheus.values(compared["query"]):
            wrong.append(name)
    assert not wrong, f"these alerts look at nothing: {wrong}"


def test_prometheus_evaluates_every_alert(prometheus: Prometheus):
    (group,) = prometheus.ask("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == set(alerts())
    failures = {rule["name"]: rule.get("lastError") for rule in group["rules"]}
    assert not any(failures.values()), failures
    assert all(rule["health"] == "ok" for rule in group["rules"])


def test_the_dashboard_finds_the_engine(prometheus: Prometheus):
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    (variable,) = [each for each in dashboard["templating"]["list"] if each["name"] == "instance"]
    called = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
    assert called is not None
    values = prometheus.ask(f"label/{called[2]}/values", **{"match[]": called[1]})
    assert len(values) == 1
