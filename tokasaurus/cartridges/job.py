"""What the process that reads a cartridge is asked, and what it answers. No torch.

Files go to it as descriptors: it never learns their paths, and opens none itself.
"""

from __future__ import annotations

import msgspec

from tokasaurus.cartridges.specification import CartridgeMetadata

__all__ = ["MAX_REPORT_BYTES", "Job", "Report"]

MAX_REPORT_BYTES = 1 << 16


class Job(msgspec.Struct, frozen=True):
    """One file to read.

    Attributes:
        source: the descriptor of the file.
        companion: of the ``config.yaml`` beside it; None without one.
        target: of the file to write, which is empty; None to check the source only.
        max_bytes: of the tensors as they are written.
        memory_bytes: that the process may use beyond what it starts with and the files it maps.
    """

    source: int
    companion: int | None
    target: int | None
    max_tokens: int
    max_bytes: int
    memory_bytes: int
    timeout_s: float


class Report(msgspec.Struct, frozen=True):
    """The answer: either metadata or a reason.

    Attributes:
        layout: of the file, in words.
        metadata: None if the file is refused.
        refusal: what is wrong with the file, beginning with a small letter.
        disk: the errno of what is wrong with the disk that the target is on.
    """

    layout: str = ""
    metadata: CartridgeMetadata | None = None
    refusal: str | None = None
    disk: int | None = None
