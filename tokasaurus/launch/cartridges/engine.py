"""What the commands about a running engine share: where it is, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import openai

from tokasaurus.errors import EngineError
from tokasaurus.scripts.connection import Connection, connect, explain

__all__ = ["SOURCES", "asked", "path_of"]

SOURCES = ("local", "wandb", "huggingface", "s3", "http")


def asked(to: Connection, ask: Callable[[openai.OpenAI], Any]) -> dict[str, Any]:
    """What an engine answers to one request.

    Raises:
        EngineError: it is not there, or refuses; says why.
        ConfigError: its certificates cannot be read.
    """
    client = connect(to)
    try:
        answer: dict[str, Any] = ask(client)
    except openai.OpenAIError as error:
        raise EngineError(explain(error, client)) from None
    return answer


def path_of(cartridge_id: str, query: Mapping[str, str]) -> str:
    """The path of one cartridge, whose id may be a path itself."""
    return f"/cartridges/{quote(cartridge_id, safe='')}?{urlencode(query)}"
