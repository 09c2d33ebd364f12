"""The program that reads one cartridge: ``python -m tokasaurus.cartridges.reader.process JOB``.

It limits itself before it looks into the file: its memory, its time, the size of what it writes.
It has no secrets in its environment and no open descriptor but those of the job. Its answer is a
``Report`` on standard output.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable

import msgspec

from tokasaurus.cartridges.contents import Contents, Refusal, quoted
from tokasaurus.cartridges.job import Job, Report
from tokasaurus.cartridges.reader.companion import read_companion
from tokasaurus.cartridges.reader.own_layout import read_own_file
from tokasaurus.cartridges.writing import metadata_of, write

__all__ = ["examine", "limit", "main"]

# Beside the tensors: the header of the file that is written, and the report.
_OTHER_BYTES = 32 << 20
_MAX_DESCRIPTORS = 64
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_POINTER = b"version https://git-lfs"


def main() -> int:
    job = msgspec.json.decode(sys.argv[1].encode(), type=Job)
    # What libraries print must not be taken for the report.
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Even if the process that waits for this one has died.
    signal.setitimer(signal.ITIMER_REAL, job.timeout_s)
    with os.fdopen(answer, "wb") as file:
        file.write(msgspec.json.encode(examine(job, limit)))
    return 0


def examine(job: Job, limit: Callable[[Job], None]) -> Report:
    """Does what a job asks.

    Args:
        limit: is called before the file is read, and after what reads it was imported.
    """
    try:
        read = _reader_of(job.source)
        limit(job)
        contents = read(job.source)
        if job.companion is not None:
            model = read_companion(job.companion)
            contents = dataclasses.replace(contents, model=contents.model or model)
        return _write(job, contents)
    except Refusal as refusal:
        return Report(refusal=str(refusal))
    except MemoryError:
        return Report(
            refusal=f"to read the file takes more than {job.memory_bytes >> 20} MiB of memory, "
            "which no cartridge needs"
        )
    except _TargetFailed as error:
        return Report(disk=error.errno)
    # A defect of ours, or a file that confuses a library.
    except Exception as error:
        traceback.print_exc()
        return Report(refusal=f"the file cannot be read ({quoted(error)}); it is probably damaged")


class _TargetFailed(Exception):
    """The disk refuses what is written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.errno = error.errno or errno.EIO


def _write(job: Job, contents: Contents) -> Report:
    metadata = metadata_of(contents, job.max_tokens, job.max_bytes)
    target = None if job.target is None else os.fdopen(job.target, "wb", closefd=False)
    try:
        digest = write(contents, metadata, target)
    except OSError as error:
        raise _TargetFailed(error) from error
    if contents.digest and contents.digest != digest:
        raise Refusal(
            f"the file is damaged: its tensors have the digest {digest[:16]}..., its metadata says "
            f"{contents.digest[:16]}...; copy it again"
        )
    return Report(layout=contents.layout, metadata=dataclasses.replace(metadata, digest=digest))


def _reader_of(descriptor: int) -> Callable[[int], Contents]:
    """What reads files that begin like this one; imported before memory is limited.

    Raises:
        Refusal: it does not begin like a cartridge.
    """
    head = os.pread(descriptor, 64, 0)
    if head.startswith(_ZIP):
        import torch

        from tokasaurus.cartridges.reader.torch_layout import read_torch_file

        torch.set_num_threads(1)
        return read_torch_file
    if not head:
        raise Refusal("the file is empty")
    if head.startswith(_POINTER):
        raise Refusal("the file is a pointer of Git LFS to another one; fetch it with git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise Refusal("the file is a web page or XML; the address does not lead to a cartridge")
    if head.startswith(_PICKLE):
        raise Refusal(
            "the file is a bare pickle, which is not loaded; save it again with torch.save of "
            "PyTorch 1.6 or later"
        )
    if head[8:9] != b"{":
        raise Refusal(
            "the file is neither an archive of torch.save, as .pt files are, nor a safetensors file"
        )
    return read_own_file


def limit(job: Job) -> None:
    """Limits this process for the rest of its life."""
    size = os.fstat(job.source).st_size
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS)
    _lower(resource.RLIMIT_CPU, int(job.timeout_s) + 1)
    _lower(resource.RLIMIT_FSIZE, job.max_bytes + _OTHER_BYTES)
    # No process or thread begins from here on.
    _lower(resource.RLIMIT_NPROC, 0)
    used = _address_space_bytes()
    if used is not None:
        # The file may be mapped twice.
        _lower(resource.RLIMIT_AS, used + 2 * size + job.memory_bytes)


def _lower(limit: int, value: int) -> None:
    _, most = resource.getrlimit(limit)
    if most != resource.RLIM_INFINITY:
        value = min(value, most)
    resource.setrlimit(limit, (value, value))


def _address_space_bytes() -> int | None:
    """What this process has mapped; None where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
