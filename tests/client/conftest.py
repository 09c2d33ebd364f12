"""What the client's tests share."""

from __future__ import annotations

import pytest
from file_server import file_server

from tokasaurus.client import Client, RetryPolicy
from tokasaurus.client.address import API_KEY_VARIABLE, BASE_URL_VARIABLE

QUICK = RetryPolicy(starting_delay_s=0.001, max_delay_s=0.002, max_retries=3)


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch):
    for name in (API_KEY_VARIABLE, BASE_URL_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with file_server() as served:
        yield served


@pytest.fixture
def client(server):
    with Client(server.url, retry=QUICK) as made:
        yield made
