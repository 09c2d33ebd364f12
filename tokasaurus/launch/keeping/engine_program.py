"""The main program of an engine below a keeper.

``python -m tokasaurus.launch.keeping.engine_program FD``, where FD is its end of the connection.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from tokasaurus.launch.keeping.notes import LANGUAGE, Begin, CannotServe, EngineLink
from tokasaurus.launch.note_socket import NotUnderstood
from tokasaurus.launch.process import end_process


def main() -> int:
    # Ctrl-C and a service manager's SIGTERM reach every process at once. The keeper handles them,
    # and tells its engines when to end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    link = EngineLink(socket.socket(fileno=int(sys.argv[1])))
    try:
        begin = link.receive_first()
    except NotUnderstood:
        begin = None
    if not isinstance(begin, Begin) or begin.language != LANGUAGE:
        link.send(CannotServe("toka runs another version; stop it, and start it again"))
        return 2
    from tokasaurus.launch.engine_run import run_below
    from tokasaurus.launch.keeping.engine_end import KeeperEnd

    return run_below(begin, os.environ, KeeperEnd(link, begin))


if __name__ == "__main__":
    end_process(main())
