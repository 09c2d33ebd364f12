"""New weights that a trainer broadcasts, on the fake engine: what routes ask it for, and refuse."""

from __future__ import annotations

import msgspec
import pytest
from fake_engine import RunningServer, with_config
from rows import check_each, each_row

from tokasaurus.protocol.commands import (
    AbortAll,
    Command,
    JoinWeightsGroup,
    LeaveWeightsGroup,
    ReceiveWeights,
    UpdateWeights,
)
from tokasaurus.server.routes.weights_groups import WEIGHTS_GROUP_SCHEMAS

INIT = "/init_weights_update_group"
UPDATE = "/update_weights_from_distributed"
DESTROY = "/destroy_weights_update_group"
PLACE = {"master_address": "trainer", "master_port": 29500, "rank_offset": 1, "world_size": 2}
TENSORS = {"names": ["a", "b"], "dtypes": ["float32", "bfloat16"], "shapes": [[2, 3], []]}
GROUP = "weight_update_group"


@pytest.fixture
def server():
    with RunningServer().running() as server:
        yield server


def actions(server):
    """What the engine was asked for since the last call."""
    sent = [each.action for each in server.engine.received if isinstance(each, Command)]
    server.engine.received.clear()
    return sent


def fields(*asked):
    return [(type(each), msgspec.structs.astuple(each)) for each in asked]


def test_a_group_is_joined_and_left(server):
    assert server.post(INIT, PLACE).json["success"] is True
    join = JoinWeightsGroup(GROUP, "trainer", 29500, 1, 2, "", 300.0)
    assert fields(*actions(server)) == fields(join)
    more = {"group_name": "mine", "backend": "gloo", "timeout_s": 5}
    assert server.post(INIT, {**PLACE, **more}).status == 200
    join = JoinWeightsGroup("mine", "trainer", 29500, 1, 2, "gloo", 5.0)
    assert fields(*actions(server)) == fields(join)
    assert server.post(DESTROY, {"group_name": "mine"}).json["success"] is True
    assert server.post(DESTROY, {}).json["success"] is True
    left = (LeaveWeightsGroup("mine"), LeaveWeightsGroup(GROUP))
    assert fields(*actions(server)) == fields(*left)


def test_the_message_with_the_last_tensors_replaces_the_weights(server):
    first = server.post(UPDATE, {**TENSORS, "weight_version": "step-1"})
    assert (first.status, first.json["complete"], first.json["weights_version"]) == (200, False, 0)
    server.engine.receives_all = True
    last = server.post(
        UPDATE,
        {
            **TENSORS,
            "names": ["c", "d"],
            "weight_version": "step-1",
            "load_format": "flattened_bucket",
            "flush_cache": True,
        },
    )
    assert (last.json["complete"], last.json["weight_version"]) == (True, "step-1")
    assert last.json["weights_version"] == 1
    dtypes, shapes = ("float32", "bfloat16"), ((2, 3), ())
    assert fields(*actions(server)) == fields(
        ReceiveWeights(GROUP, ("a", "b"), dtypes, shapes, False, True, 300.0),
        ReceiveWeights(GROUP, ("c", "d"), dtypes, shapes, True, False, 300.0),
        UpdateWeights(1, (), (), True),
    )
    assert server.get("/weight_info").json == {"weight_version": "step-1", "weights_version": 1}


def test_another_label_or_a_new_update_begins_anew(server):
    for label in ("1", "1", "2"):
        server.post(UPDATE, {**TENSORS, "weight_version": label})
    server.engine.receives_all = True
    for _ in range(2):
        server.post(UPDATE, {**TENSORS, "weight_version": "2"})
    received = [each for each in actions(server) if isinstance(each, ReceiveWeights)]
    assert [each.begins_anew for each in received] == [True, False, True, False, True]


def test_requests_are_aborted_first_where_that_is_asked_for(server):
    server.post(UPDATE, {**TENSORS, "abort_all_requests": True})
    assert [type(each) for each in actions(server)] == [AbortAll, ReceiveWeights]


def test_updates_of_vllm_end_when_the_client_says_so(server):
    assert server.post("/init_weight_transfer_engine", {"init_info": PLACE}).status == 200
    assert server.post("/start_weight_update", {"is_checkpoint_format": True}).status == 200
    server.engine.receives_all = True
    info = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]]}
    for _ in range(2):
        assert server.post("/update_weights", {"update_info": info}).status == 200
    asked = actions(server)
    assert [type(each) for each in asked] == [JoinWeightsGroup, ReceiveWeights, ReceiveWeights]
    assert [each.begins_anew for each in asked[1:]] == [True, False]
    done = server.post("/finish_weight_update", {"weight_version": "step-9"})
    assert (done.json["weight_version"], done.json["weights_version"]) == ("step-9", 1)
    assert fields(*actions(server)) == fields(UpdateWeights(1, (), (), True))
    assert server.post("/finish_weight_update", {}).status == 409


def test_the_group_of_vllm_is_left(server):
    plain = {"packed": False, "packed_buffer_size_bytes": 1 << 30, "packed_num_buffers": 2}
    assert server.post("/init_weight_transfer_engine", {"init_info": {**PLACE, **plain}}).json
    assert fields(*actions(server)) == fields(
        JoinWeightsGroup(GROUP, "trainer", 29500, 1, 2, "", 300.0)
    )
    packed = server.post("/init_weight_transfer_engine", {"init_info": {**PLACE, "packed": True}})
    assert packed.status == 400
    assert "init_info.packed" in packed.error["message"]
    answer = server.post("/shutdown_weight_transfer_engine", {})
    assert answer.json == {"message": "Weight transfer shut down"}
    assert fields(*actions(server)) == fields(LeaveWeightsGroup(GROUP))


def test_an_update_that_lacks_tensors_can_still_get_them(server):
    server.post("/start_weight_update", {})
    server.engine.refuse[UpdateWeights] = ("these tensors have not come: a", None)
    answer = server.post("/finish_weight_update", {})
    assert (answer.status, "have not come: a" in answer.error["message"]) == (409, True)
    server.engine.refuse.clear()
    assert server.post("/finish_weight_update", {}).status == 200


WRONG_TENSORS = [
    ({"dtypes": ["float32"]}, "dtypes"),
    ({"shapes": [[1], [2], [3]]}, "shapes"),
    ({"shapes": [[1], [-2]]}, "shapes"),
    ({"names": []}, "names"),
    ({"names": "a"}, "names"),
    ({"load_format": "pickle"}, "load_format"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"serialized_named_tensors": ["x"]}, "serialized_named_tensors"),
]


@each_row("wrong, field", WRONG_TENSORS)
def test_a_message_that_is_refused_ends_its_group(wrong, field):
    with RunningServer().running() as server:
        answer = server.post(UPDATE, {**TENSORS, "group_name": "mine", **wrong})
        assert answer.status == 400
        assert answer.error["param"].split(".")[0] == field
        assert fields(*actions(server)) == fields(LeaveWeightsGroup("mine"))


@each_row("kind", [ReceiveWeights, JoinWeightsGroup])
def test_what_the_engine_refuses_ends_the_group(kind):
    with RunningServer().running() as server:
        server.engine.refuse[kind] = ("no", "names" if kind is ReceiveWeights else None)
        path, body = (UPDATE, TENSORS) if kind is ReceiveWeights else (INIT, PLACE)
        answer = server.post(path, body)
        assert answer.status == (400 if kind is ReceiveWeights else 409)
        assert [type(each) for each in actions(server)] == [kind, LeaveWeightsGroup]


@each_row(
    "wrong, field",
    [
        ({"world_size": 1}, "world_size"),
        ({"rank_offset": 0}, "rank_offset"),
        ({"rank_offset": 2}, "world_size"),
        ({"master_port": 0}, "master_port"),
        ({"master_address": ""}, "master_address"),
        ({"backend": "mpi"}, "backend"),
    ],
)
def test_a_place_that_cannot_be_is_refused(wrong, field):
    with RunningServer().running() as server:
        answer = server.post(INIT, {**PLACE, **wrong})
        assert (answer.status, answer.error["param"]) == (400, field)
        nested = server.post("/init_weight_transfer_engine", {"init_info": {**PLACE, **wrong}})
        assert nested.status == 400
        assert field in nested.error["message"]
        assert not actions(server)


def test_all_workers_count():
    config = with_config(num_replicas=3, num_workers=4)
    with RunningServer(config).running() as server:
        assert server.get("/get_world_size").json == {"world_size": 12}
        assert server.get("/get_world_size?include_dp=false").json == {"world_size": 4}
        assert server.post(INIT, {**PLACE, "world_size": 12}).error["param"] == "world_size"
        assert server.post(INIT, {**PLACE, "world_size": 13}).status == 200


def test_nonsense_in_any_body_is_a_400(server):
    def check(schema):
        path = schema.__doc__.split("``")[1].removeprefix("POST ")
        for field in schema.model_fields:
            for wrong in (0.5, {"a": 1}, [[[1]]], 1 << 70):
                if field == "timeout_s" and wrong == 0.5:
                    continue
                answer = server.post(path, {field: wrong})
                assert answer.status == 400, (field, wrong, answer.content)
        for body in ([], "x", 1):
            assert server.post(path, body).status == 400

    check_each(WEIGHTS_GROUP_SCHEMAS, check)
    assert {type(each) for each in actions(server)} <= {LeaveWeightsGroup}
