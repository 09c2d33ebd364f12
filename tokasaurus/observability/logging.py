"""One log stream per process; each line has the time, the level and the process's name.

As text, or as one JSON object per line (see :class:`JSONLines`)::

    2026-03-01 10:42:07.113 INFO    worker   loaded 3.1 M parameters in 0.4 s

Rooms log through ``logging.getLogger(__name__)``; only this module configures handlers. What is
logged while a request is served carries its name (see ``request_names``). A line may have more
fields, which only JSON shows::

    log.info("answered", extra={"fields": {"status": 200}})
    log.error("it ended", extra={"traceback": "Traceback ..."})  # one of another process
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from tokasaurus.observability.request_names import current_request
from tokasaurus.observability.standard_error import LoggedOutput

__all__ = ["LOG_FORMATS", "JSONLines", "TextLines", "configure_logging", "report_refusal"]

LOG_FORMATS = ("text", "json")

_log = logging.getLogger(__name__)


def configure_logging(process: str, level: str, log_format: str = "text") -> None:
    """Sends this process's log to standard error.

    As JSON, the log also has Python's warnings, the errors that nothing catches, and whatever else
    is written to ``sys.stderr``, so that every line of it can be parsed. What libraries in C print,
    and the traces of crashes, stay as they are.

    Args:
        process: the name in each line.
        level: a level's name in the logging module, in any case.
        log_format: one of ``LOG_FORMATS``.
    """
    as_json = log_format == "json"
    stream = sys.stderr.stream if isinstance(sys.stderr, LoggedOutput) else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONLines(process) if as_json else TextLines(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tokasaurus").setLevel(level.upper())
    logging.captureWarnings(as_json)
    sys.stderr = LoggedOutput(stream) if as_json else stream
    if as_json:
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def report_refusal(reason: str, log_format: str) -> None:
    """Says on standard error why ``toka`` does not start.

    Args:
        reason: one line, or one for each thing that is wrong.
        log_format: JSON is for programs, which get a line of the log. People get what every command
            prints.
    """
    if log_format == "json":
        configure_logging("toka", "INFO", log_format)
        _log.critical("%s", reason)
    else:
        print(f"toka: error: {reason}", file=sys.stderr)


class TextLines(logging.Formatter):
    """Lines for people. A traceback follows its line; times are those of the machine's time zone.

    Args:
        process: the name in each line.
    """

    def __init__(self, process: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {process:8} %(message)s", "%Y-%m-%d %H:%M:%S"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        line = super().formatMessage(record)
        request = _request_of(record)
        if request and f"request {request}" not in record.message:
            line += f" [request {request}]"
        traceback = getattr(record, "traceback", "")
        return f"{line}\n{traceback.rstrip()}" if traceback else line


class JSONLines(logging.Formatter):
    """Lines for programs: one JSON object each, in ASCII.

    Every line has ``time`` (RFC 3339, in UTC), ``level``, ``process``, ``pid``, ``logger`` and
    ``message``; where they apply, also ``request_id``, ``traceback`` and fields of the line's own.

    Args:
        process: the name in each line.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = _request_of(record)
        if request:
            line["request_id"] = request
        line.update(getattr(record, "fields", {}))
        traceback = getattr(record, "traceback", "")
        if record.exc_info:
            traceback = self.formatException(record.exc_info)
        if traceback:
            line["traceback"] = traceback
        return json.dumps(line, default=str)


def _request_of(record: logging.LogRecord) -> str:
    """The request that a line is about: the one that it names, or the one being served."""
    named: str = getattr(record, "request", "")
    return named or current_request()


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _log.critical("the process ends with an error", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None:
        thread = "a thread" if arguments.thread is None else f"the thread {arguments.thread.name}"
        _log.error("%s ended with an error", thread, exc_info=error)
