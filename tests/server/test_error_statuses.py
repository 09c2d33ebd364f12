"""The status and the body of errors that no single route has."""

from __future__ import annotations

from tokasaurus.errors import SourceUnavailable
from tokasaurus.server.errors import error_body, error_status


def test_a_source_of_cartridges_that_fails_is_a_bad_gateway():
    error = SourceUnavailable("cartridge 'a/b' of source 'wandb': it does not answer")
    assert error_status(error) == 502
    assert error_body(error) == {
        "error": {
            "message": "cartridge 'a/b' of source 'wandb': it does not answer",
            "type": "bad_gateway",
            "param": "cartridges",
            "code": "source_unavailable",
        }
    }
