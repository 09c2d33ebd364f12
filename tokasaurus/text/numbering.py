"""The bits of a request id: which process started the request, and which part of it a replica has.

::

    63          50           38                0
    | part       | process    | number          |

The parts of a request have ids of their own towards managers; see ``replicas``. The HTTP processes
of an engine start requests at the same time; the server itself is process 0.
"""

from __future__ import annotations

__all__ = ["MAX_PROCESSES", "PART_SHIFT", "PROCESS_SHIFT", "REQUEST_MASK", "process_of"]

PROCESS_SHIFT = 38
PART_SHIFT = 50
REQUEST_MASK = (1 << PART_SHIFT) - 1
MAX_PROCESSES = 1 << (PART_SHIFT - PROCESS_SHIFT)


def process_of(request_id: int) -> int:
    """The number of the process that started a request."""
    return (request_id & REQUEST_MASK) >> PROCESS_SHIFT
