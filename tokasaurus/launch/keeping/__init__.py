"""The keeper: the process that ``toka`` is. It holds the port, and starts engines below itself.

::

    toka (keeper) ─┬─ engine 1: supervisor and server ─┬─ manager
                   │                                   └─ worker
                   └─ engine 2, during a restart ─ ...

It outlives its engines, so the port, the process id and whoever waits for the process stay when a
new engine takes over. It is small, and imports neither numpy nor what engines need.
"""
