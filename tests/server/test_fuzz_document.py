"""Requests that the OpenAPI document allows or forbids, made by schemathesis for every route."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import schemathesis
from fake_engine import EOS_ID, PATIENCE_S, RunningServer, random_ids, with_config
from fuzzing import check_answer, fuzz
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks

load_all_checks()
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = with_config(data_dir=str(tmp_path_factory.mktemp("data")))
    with RunningServer(config).running() as server:
        server.engine.script = lambda request, index: [*random_ids(request, index)[:12], EOS_ID]
        server.engine.largest_step = 8
        server.engine.obeys = False  # a pause would keep the next request waiting
        yield server


@pytest.mark.parametrize("num_cases", [3, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_answers_are_as_the_document_says(server, mode, num_cases):
    """Call every operation with data that the document allows, or with data that it forbids."""
    document = schemathesis.openapi.from_dict(json.loads(server.get("/openapi.json").content))

    def check(case: schemathesis.Case) -> None:
        response = case.call(server.url, timeout=PATIENCE_S)
        content_type = response.headers["content-type"][0]
        try:
            check_answer(response.status_code, content_type, response.content)
        except AssertionError as error:
            raise AssertionError(case.as_curl_command()) from error
        more = [checks.negative_data_rejection] if mode.is_negative else []
        case.validate_response(response, checks=CHECKS + more)

    operations = [each.ok() for each in document.get_all_operations()]
    assert len(operations) > 25
    for operation in operations:
        refuses_something = operation.body or operation.query  # a path parameter may be any text
        if mode.is_positive or refuses_something:
            fuzz(operation.as_strategy(mode), num_cases, check)
    server.check_nothing_is_left()
