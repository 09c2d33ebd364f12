"""The main program of a process that the supervisor spawns.

``python -m tokasaurus.launch.child FD``, where FD is the child's end of its lifeline.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys

from tokasaurus.launch.lifeline import Assignment, Lifeline
from tokasaurus.launch.process import end_process
from tokasaurus.launch.roles import run_role


def main() -> int:
    # Ctrl-C and a service manager's SIGTERM reach every process at once. Only the supervisor
    # handles them, and tells the others when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    faulthandler.enable()
    lifeline = Lifeline(socket.socket(fileno=int(sys.argv[1])))
    assignment = lifeline.receive_first()
    if not isinstance(assignment, Assignment):
        return 1
    # Manager and worker have nothing to save, so they end at once.
    return 0 if run_role(assignment, lifeline, interrupt=lambda: os._exit(0)) else 1


if __name__ == "__main__":
    end_process(main())
