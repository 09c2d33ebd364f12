"""The id of the token that a tokenizer's files call the end of a text. No torch.

Reads JSON only: to load the tokenizer would take seconds. Files that are missing or damaged are for
the tokenizer's loader to report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["end_token_ids"]


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """The id of a tokenizer's eos token; () if it has none."""
    settings = _read(directory, "tokenizer_config.json")
    for source in (settings, _read(directory, "special_tokens_map.json")):
        token = source.get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            return _ids_of(token, directory, settings)
    return ()


def _ids_of(token: str, directory: Path, settings: dict[str, Any]) -> tuple[int, ...]:
    for candidate, token_id in _tokens(directory, settings):
        if candidate == token and type(token_id) is int:
            return (token_id,)
    return ()


def _tokens(directory: Path, settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The tokens that the files name, with their ids. ``tokenizer.json`` counts first."""
    file = _read(directory, "tokenizer.json")
    for added in _list(file.get("added_tokens")):
        if isinstance(added, dict):
            yield added.get("content"), added.get("id")
    model = file.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    for token_id, piece in enumerate(_list(vocabulary)):
        if isinstance(piece, list) and piece:
            yield piece[0], token_id
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for token_id, added in decoder.items():
            if isinstance(added, dict) and token_id.isdecimal():
                yield added.get("content"), int(token_id)
    for name in ("added_tokens.json", "vocab.json"):
        yield from _read(directory, name).items()


def _read(directory: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((directory / name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
