"""The log of calls: one JSON file for each, and the context that says what a call was for.

    {base}/{mode}/{call_type}s/{call_type}_episode_{i}_step_{j}_{number}_{time}.json

A file is there from the beginning of its call, so that a call that hangs is seen, and is replaced
as a whole at its end. Owns the files' names and form. Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = [
    "DEFAULT_DIRECTORY",
    "CallLog",
    "current_context",
    "enable_json_logging",
    "json_log_context",
]

DEFAULT_DIRECTORY = Path("llm_calls")
"""Below the current directory, where :func:`enable_json_logging` has named none."""

_TIME = "%Y%m%dT%H%M%S%fZ"

_context: ContextVar[Mapping[str, Any] | None] = ContextVar("json_log_context", default=None)
_numbers = itertools.count(1)  # next() of it is atomic
_base: Path | None = None


def enable_json_logging(base_dir: str | os.PathLike[str]) -> None:
    """Names the directory of the logs of all language models of this process.

    Args:
        base_dir: is made when the first call is logged.
    """
    global _base
    _base = Path(base_dir)


@contextlib.contextmanager
def json_log_context(**context: Any) -> Iterator[None]:
    """Says what the calls within a with-block are for; the log's paths and files have it.

    Blocks may be nested: what the inner one does not name stays. Other threads do not see it,
    unless they run in a copy of the context (``contextvars.copy_context().run``), as those of
    :meth:`TokasaurusClient.call_many` do.

    Args:
        context: ``mode`` (``train``, ``val``), ``call_type`` (``action``), ``episode_index``,
            ``step_index``, ``num_seen_episodes``, ``response_schema``, or anything else.
    """
    token = _context.set({**current_context(), **context})
    try:
        yield
    finally:
        _context.reset(token)


def current_context() -> dict[str, Any]:
    """What the enclosing blocks say."""
    return dict(_context.get() or {})


class CallLog:
    """The files of one language model's calls. Threads may share it.

    Args:
        model: named in each file.
        logger: told of files that cannot be written, which fails no call.
    """

    def __init__(self, model: str, logger: logging.Logger) -> None:
        self._model = model
        self._logger = logger
        self._open: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def begin(
        self, system_prompt: str, user_prompt: str, messages: Sequence[Any] | None = None
    ) -> str:
        """Writes the file of a call that begins.

        Returns:
            What :meth:`end` is to be told.
        """
        context = current_context()
        now = datetime.now(timezone.utc)
        entry: dict[str, Any] = {
            "timestamp": now.strftime(_TIME),
            "model": self._model,
            "system_prompt": system_prompt,
            "user_prompt": user_prompt,
            **({} if messages is None else {"messages": list(messages)}),
            "context": context,
        }
        number = f"{next(_numbers):06d}"
        path = (_base or DEFAULT_DIRECTORY) / _relative_path(context, number, now)
        with self._lock:
            self._open[number] = path, entry
        self._write(path, entry)
        return number

    def end(self, call_id: str, output: str, extra: Mapping[str, Any] | None = None) -> None:
        """Completes the file of a call; what is no call, or has ended, is left alone."""
        with self._lock:
            path, entry = self._open.pop(call_id, (None, {}))
        if path is None:
            return
        entry["output"] = output
        entry["timestamp_end"] = datetime.now(timezone.utc).strftime(_TIME)
        entry["extra"] = dict(extra or {})
        self._write(path, entry)

    def _write(self, path: Path, entry: Mapping[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(entry, ensure_ascii=False, indent=2, default=_plain)
            # Models may write half of a pair of surrogates, which no encoding of a file has.
            partial.write_bytes(text.encode("utf-8", "backslashreplace"))
            partial.replace(path)
        except (OSError, ValueError, TypeError) as error:
            self._logger.error("a call is missing in the log: %s: %s", path, error)


def _relative_path(context: Mapping[str, Any], number: str, now: datetime) -> Path:
    mode = _word(context.get("mode") or "default")
    kind = _word(context["call_type"]) if context.get("call_type") else ""
    directory = Path(mode)
    if mode in ("val", "validation"):
        directory = Path("validation", f"val_{_word(context.get('num_seen_episodes') or 0)}")
    words = [kind] if kind else []
    for name, key in (("episode", "episode_index"), ("step", "step_index")):
        if context.get(key) is not None:
            words.append(f"{name}_{_word(context[key])}")
    words += [number, now.strftime(_TIME)]
    return directory / (f"{kind}s" if kind else "actions") / f"{'_'.join(words)}.json"


def _word(value: object) -> str:
    """A part of a path that leads nowhere else."""
    return re.sub(r"[^\w.-]", "_", str(value)).lstrip(".") or "_"


def _plain(value: Any) -> Any:
    """What JSON has instead of a value that it does not know, such as a schema's class."""
    schema = getattr(value, "model_json_schema", None)
    return schema() if callable(schema) and isinstance(value, type) else str(value)
