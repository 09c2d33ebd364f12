"""Names of processes and of their doors."""

from __future__ import annotations

import msgspec

from tokasaurus.protocol.channels import door_address
from tokasaurus.protocol.role import Role


def test_the_first_of_each_kind_has_the_kind_as_its_name() -> None:
    roles = [
        Role("server"),
        Role("manager"),
        Role("worker"),
        Role("worker", 0, 1),
        Role("server", 1),
        Role("manager", 1),
        Role("worker", 1, 0),
        Role("worker", 2, 1),
    ]
    assert [str(role) for role in roles] == [
        "server",
        "manager",
        "worker",
        "worker-0-1",
        "server-1",
        "manager-1",
        "worker-1-0",
        "worker-2-1",
    ]
    addresses = [door_address("/tmp/x", role) for role in roles]
    assert addresses[:2] == ["ipc:///tmp/x/server.sock", "ipc:///tmp/x/manager.sock"]
    assert len(set(addresses)) == len(roles)


def test_a_role_survives_json() -> None:
    role = Role("worker", 1, 2)
    assert msgspec.json.decode(msgspec.json.encode(role), type=Role) == role
