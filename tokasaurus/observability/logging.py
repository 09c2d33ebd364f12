"""One log stream per process; each line has the process's name.

    10:42:07 INFO    worker   loaded 3.1 M parameters in 0.4 s

Rooms log through ``logging.getLogger(__name__)``; only this module configures handlers.
"""

from __future__ import annotations

import logging

__all__ = ["configure_logging"]


def configure_logging(process: str, level: str) -> None:
    """Sends this process's log to standard error.

    Args:
        process: the name in each line.
        level: a level's name in the logging module, in any case.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)-7s {process:8} %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tokasaurus").setLevel(level.upper())
