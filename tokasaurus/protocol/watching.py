"""What a manager tells of the future, as long as it is watched.

server ──Watch──▶ manager ──Outlook, about once a second──▶ server
"""

from __future__ import annotations

from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.message import Message

__all__ = ["MAX_BINS", "Outlook", "Watch"]

MAX_BINS = 256


class Watch(Message, frozen=True):
    """Asks for an Outlook now and then. A manager that is not asked again sends no more."""

    seconds: float  # from now on


class Outlook(Message, frozen=True):
    """The forecast of one moment. Its size is bounded: further steps make bins wider.

    Bin i covers the steps from ``step + i * stride`` on, up to the next bin. The manager predicts
    lengths and looks at the first of its queue only, so all of this is an estimate.
    """

    step: int  # steps planned so far; a step is a token of each running sequence
    step_s: float  # what a step takes at present, in seconds; 0 until one was measured
    stride: int  # steps
    used: int  # pages in use now
    limit: int  # pages that may be in use, by the target of admission
    # [bins] the most pages in use at a step, by the sequences that run now, and by those together
    # with the queue.
    running_pages: Int32Array
    all_pages: Int32Array
    # [bins] sequences of the queue that begin to run, and sequences that end.
    num_admitted: Int32Array
    num_ended: Int32Array
    num_unseen: int  # sequences that wait and were not looked at
