"""Commands of ``toka`` besides serving: ``toka plan ...`` runs the module ``plan`` of this package.

``entry`` looks the first word of a command line up here. Like the entry, a command may import any
room, and no room imports one.
"""

__all__ = ["COMMANDS"]

# Modules of this package, and what they do.
COMMANDS = {
    "restart": "let a new engine take over from a running one, without losing a request",
    "plan": "predict how fast a model would run a workload on a device, and with which flags",
    "tune": "find good flags for a workload on this machine, by short runs of real engines",
}
