"""The unit of deploy/ under a real systemd: it starts, reloads, drains, and is started again.

``make test-systemd`` runs these, as root.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import openai
import pytest
from engine_process import eventually
from machine import Machine
from ports import held_port

pytestmark = pytest.mark.systemd

KEY = "key-of-this-test"
PROMPT, ANSWER = "A B C D A B C D A B", " C D A B C D A B"
SMALL = {
    "max_tokens_per_forward": 64,
    "max_seqs_per_forward": 8,
    "kv_cache_num_tokens": 4096,
    "deterministic": False,
}
NUM_SAMPLES = 24
"""Of a stream: more than run at a time, so that it takes seconds."""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    assert os.geteuid() == 0, "a machine of its own needs root"
    machine = Machine(tmp_path_factory.mktemp("machine"))
    try:
        machine.write("/etc/tokasaurus/api-key", f"{KEY}\n")
        machine.run("chmod", "600", "/etc/tokasaurus/api-key")
        yield machine
    finally:
        machine.stop()


@pytest.fixture
def client(machine: Machine) -> Iterator[openai.OpenAI]:
    """Of an engine that systemd has just started."""
    with held_port() as port:
        configure(machine, port=port)
        machine.systemctl("start", "tokasaurus")
        yield openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)
        machine.run("systemctl", "stop", "tokasaurus")
        machine.run("systemctl", "reset-failed", "tokasaurus")


def configure(machine: Machine, **flags: object) -> None:
    lines = [f"{name}: {value}\n" for name, value in {**SMALL, **flags}.items()]
    machine.write("/etc/tokasaurus/engine.yaml", "".join(lines))


def complete(client: openai.OpenAI, **fields):
    fields = {"max_tokens": 8, "temperature": 0, **fields}
    return client.completions.create(model="default", prompt=PROMPT, **fields)


class Stream:
    """A long answer, of which the first event has come; the others are read in a thread."""

    def __init__(self, client: openai.OpenAI) -> None:
        length = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
        self._events = complete(client, n=NUM_SAMPLES, stream=True, **length)
        next(self._events)
        self._reasons: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for event in self._events:
            self._reasons += filter(None, [choice.finish_reason for choice in event.choices])

    def was_complete(self) -> bool:
        """Whether each of its samples came to its end."""
        self._thread.join()
        return self._reasons == ["length"] * NUM_SAMPLES


def test_a_start_waits_until_the_engine_answers_and_gives_it_few_rights(machine, client):
    assert machine.show("ActiveState") == "active"
    assert complete(client).choices[0].text == ANSWER
    with pytest.raises(openai.AuthenticationError):
        complete(client.with_options(api_key="another"))
    process = machine.show("MainPID")
    status = machine.run("cat", f"/proc/{process}/status").stdout
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert 0 not in map(int, facts["Uid"].split())
    assert int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    # What it writes is where the unit says, and belongs to its user only.
    listed = machine.run("stat", "-c", "%a", "/var/lib/private/tokasaurus/batches").stdout
    assert listed.strip() == "700"


def test_a_reload_takes_a_new_configuration_or_fails_and_loses_no_request(machine, client):
    process = machine.show("MainPID")
    configure(machine, port=client.base_url.port, model="/no/such/directory")
    assert machine.run("systemctl", "reload", "tokasaurus").returncode != 0
    assert machine.show("ActiveState") == "active"
    assert complete(client).choices[0].text == ANSWER

    stream = Stream(client)
    configure(machine, port=client.base_url.port, served_model_name="after-the-reload")
    machine.systemctl("reload", "tokasaurus")
    assert machine.show("ActiveState") == "active"
    assert machine.show("MainPID") == process
    assert stream.was_complete()
    assert [model.id for model in client.models.list()] == ["after-the-reload"]


def test_a_stop_drains(machine, client):
    stream = Stream(client)
    machine.systemctl("stop", "tokasaurus")
    assert stream.was_complete()
    assert (machine.show("ActiveState"), machine.show("Result")) == ("inactive", "success")


def test_an_engine_that_is_killed_is_started_again(machine, client):
    process = machine.show("MainPID")
    machine.run("kill", f"-{signal.SIGKILL.value}", process)
    eventually(lambda: machine.show("MainPID") not in (process, "0"), machine)
    eventually(lambda: machine.show("ActiveState") == "active", machine)
    assert complete(client).choices[0].text == ANSWER
    assert machine.show("NRestarts") == "1"


def test_wrong_flags_are_not_tried_again(machine):
    machine.write("/etc/tokasaurus/engine.yaml", "no_such_flag: 1\n")
    assert machine.run("systemctl", "start", "tokasaurus").returncode != 0
    assert machine.show("ActiveState") == "failed"
    assert (machine.show("ExecMainStatus"), machine.show("NRestarts")) == ("2", "0")
    assert "no_such_flag" in machine.engine_log()
    machine.run("systemctl", "reset-failed", "tokasaurus")
