"""From a configuration to the language model that it names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tokasaurus.client.lm.config import PREFIX, LMConfig, TokasaurusConfig, given_fields
from tokasaurus.client.lm.tokasaurus_client import TokasaurusClient

__all__ = ["get_lm_client"]


def get_lm_client(
    lm_config: LMConfig | Mapping[str, Any], logger: logging.Logger | None = None
) -> TokasaurusClient:
    """Makes the client for the model's prefix, which its requests do not have.

    Args:
        lm_config: as it stands in YAML, or as a configuration that has kept all of its keys.
        logger: of the client.

    Raises:
        ValueError: no client has this prefix, or the client does not know a key, or a value is
            wrong.
    """
    fields = given_fields(lm_config)
    model = fields.get("model")
    if not isinstance(model, str) or not model.startswith(PREFIX):
        raise ValueError(
            f"model={model!r}: the name of a model that a Tokasaurus engine serves has the prefix"
            f" {PREFIX!r}, like 'toka:meta-llama/Llama-3.2-1B-Instruct'; there are no clients for"
            " other models here"
        )
    fields["model"] = model.removeprefix(PREFIX) or "default"
    return TokasaurusClient(TokasaurusConfig.of(fields), logger)
