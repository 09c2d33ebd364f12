"""Reads cartridges' files, which may come from anyone, in a process of their own. No torch.

::

    source      .pt or safetensors  ┐                        ┌ target    safetensors, checked whole
    companion   config.yaml         ┴▶ a process with limits ┴ metadata

The process gets open files and no paths, and it ends by itself if it takes too long. What it says
is checked against the header of the file that it wrote, before that file takes its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from tokasaurus.cartridge_file import CartridgeFile
from tokasaurus.cartridges.job import MAX_REPORT_BYTES, Job, Report
from tokasaurus.cartridges.new_file import disk_error, new_file, put_in_place
from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.errors import EngineError, ModelError, RequestError
from tokasaurus.safetensors_file import FileStamp

__all__ = ["Inspection", "ReadLimits", "inspect_cartridge", "read_cartridge"]

log = logging.getLogger(__name__)

_FIELD = "cartridges"
_PROGRAM = "tokasaurus.cartridges.reader.process"
# A file has more than its tensors: headers, and what aligns them.
_OTHER_BYTES = 64 << 20
# After which a process that should have ended by itself is killed.
_GRACE_S = 5.0
_MAX_MESSAGE_LENGTH = 1000
_LOGGED_BYTES = 4000
# All that the process gets of the environment, which may hold keys.
_PASSED_VARIABLES = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV"),
    *("LANG", "LC_ALL", "TMPDIR"),
)
_OUT_OF_TIME = (signal.SIGALRM, signal.SIGXCPU)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHANGED = (
    "{} has changed while it was read; write a new version to another name, and rename it when it "
    "is complete"
)


@dataclass(frozen=True)
class ReadLimits:
    """What one file may take.

    Attributes:
        max_tokens: positions.
        max_bytes: of the tensors; the file may be a little larger.
        timeout_s: to read, check and write it.
        memory_bytes: of the process, beyond what it starts with and the file itself.
    """

    max_tokens: int = 1 << 20
    max_bytes: int = 64 << 30
    timeout_s: float = 600.0
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class Inspection:
    """What a file is.

    Attributes:
        layout: in words.
    """

    layout: str
    metadata: CartridgeMetadata


async def read_cartridge(
    source: Path,
    target: Path,
    limits: ReadLimits = ReadLimits(),
    companion: Path | None = None,
) -> CartridgeMetadata:
    """Reads a file, checks it whole, and writes it as a file that workers read.

    Args:
        source: a file of ``torch.save`` in one of the published layouts, or a safetensors file of
            ours. It is opened once, and follows links: whoever calls has resolved them.
        target: takes its name when it is complete and on the disk. What was there is replaced.
        companion: the ``config.yaml`` beside the source.

    Returns:
        What the target holds. The name of the model is the source's own, or the companion's.

    Raises:
        RequestError: about the field ``cartridges``, if the file is no cartridge, is damaged or
            larger than allowed. The message begins with a small letter and names no path.
        StorageFull: the disk has no room for the target.
        EngineError: the target cannot be written, or the process cannot be started.
    """
    with new_file(target) as (file, path):
        inspection = await _examine(source, companion, limits, file)
        await asyncio.to_thread(_settle, file, path, target, inspection.metadata)
    return inspection.metadata


async def inspect_cartridge(
    source: Path, limits: ReadLimits = ReadLimits(), companion: Path | None = None
) -> Inspection:
    """The same checks as for ``read_cartridge``, and the same errors; nothing is written."""
    return await _examine(source, companion, limits, None)


# --- files ----------------------------------------------------------------------------------------


def _settle(file: BinaryIO, path: Path, target: Path, metadata: CartridgeMetadata) -> None:
    """Gives a file its name once it is what the metadata says, and on the disk.

    The process that wrote it may have fallen to a hostile file, so it is not believed.
    """
    shape = metadata.shape
    try:
        with CartridgeFile(path) as written:
            written.check(shape.num_layers, shape.num_kv_heads, shape.head_dim)
            fits = written.num_tokens == metadata.num_tokens
            if not fits or not _DIGEST.fullmatch(metadata.digest):
                raise ModelError("its metadata are those of another file")
    except ModelError as error:
        log.error("a cartridge was read, and %s is not what was to be written: %s", path, error)
        raise RequestError("the file cannot be read: it is damaged, or an attack", _FIELD) from None
    put_in_place(file, path, target)


@contextlib.contextmanager
def _opened(path: Path, what: str, max_bytes: int) -> Iterator[int]:
    """The descriptor of a regular file that is not too large.

    Raises:
        RequestError: it cannot be opened, or changes meanwhile.
    """
    try:
        # To open a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{what} cannot be opened: {reason}", _FIELD) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RequestError(f"{what} is not a regular file; name a file", _FIELD)
        if status.st_size > max_bytes:
            raise RequestError(
                f"{what} has {status.st_size} bytes; the limit is {max_bytes}", _FIELD
            )
        yield descriptor
        if _stamp(os.fstat(descriptor)) != _stamp(status):
            raise RequestError(_CHANGED.format(what), _FIELD)
    finally:
        os.close(descriptor)


def _stamp(status: os.stat_result) -> FileStamp:
    return FileStamp(status.st_size, status.st_mtime_ns)


# --- the process ----------------------------------------------------------------------------------


async def _examine(
    source: Path, companion: Path | None, limits: ReadLimits, target: BinaryIO | None
) -> Inspection:
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_opened(source, "the file", limits.max_bytes + _OTHER_BYTES))
        beside = None
        if companion is not None:
            beside = stack.enter_context(_opened(companion, "its config.yaml", _OTHER_BYTES))
        report = await _run(
            Job(
                source=opened,
                companion=beside,
                target=None if target is None else target.fileno(),
                max_tokens=limits.max_tokens,
                max_bytes=limits.max_bytes,
                memory_bytes=limits.memory_bytes,
                timeout_s=limits.timeout_s,
            )
        )
    if report.disk is not None:
        raise disk_error(OSError(report.disk, os.strerror(report.disk)))
    if report.metadata is None:
        raise RequestError(_printable(report.refusal or "the file cannot be read"), _FIELD)
    return Inspection(report.layout, report.metadata)


async def _run(job: Job) -> Report:
    """Runs the process of a job, and ends it whatever happens.

    What it writes goes to files, whose size it limits itself: a pipe would have none.
    """
    descriptors = [each for each in (job.source, job.companion, job.target) if each is not None]
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaints:
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", _PROGRAM, msgspec.json.encode(job).decode()),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=answer,
                stderr=complaints,
                env=_environment(),
                cwd="/",
            )
        except OSError as error:
            raise EngineError(
                f"the process that reads cartridges cannot be started: {error.strerror}"
            ) from error
        try:
            await asyncio.wait_for(process.wait(), job.timeout_s + _GRACE_S)
        except asyncio.TimeoutError:
            return Report(refusal=_out_of_time(job))
        finally:
            if process.returncode is None:
                process.kill()
                await asyncio.shield(process.wait())
        status = process.returncode
        if status == 0:
            answer.seek(0)
            with contextlib.suppress(msgspec.DecodeError):
                return msgspec.json.decode(answer.read(MAX_REPORT_BYTES), type=Report)
        complaints.seek(0)
        said = complaints.read(_LOGGED_BYTES).decode(errors="replace")
        log.warning("the process that read a cartridge ended with status %s: %s", status, said)
    return Report(refusal=_why_it_ended(status, job))


def _why_it_ended(status: int | None, job: Job) -> str:
    ended_by = -(status or 0)
    if ended_by in _OUT_OF_TIME:
        return _out_of_time(job)
    if ended_by == signal.SIGBUS:
        return _CHANGED.format("the file")
    if ended_by == signal.SIGKILL:
        return "the file cannot be read: the system has ended the process that read it"
    return "the file cannot be read: the process that read it broke off, so it is probably damaged"


def _out_of_time(job: Job) -> str:
    return f"to read the file took longer than {job.timeout_s:g} s"


def _environment() -> dict[str, str]:
    """Without secrets, and with one thread for each library."""
    package = str(Path(__file__).resolve().parents[2])
    further = [
        str(Path(each).resolve()) for each in os.environ.get("PYTHONPATH", "").split(":") if each
    ]
    return {
        **{name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ},
        "PYTHONPATH": ":".join([package, *further]),
        "PYTHONSAFEPATH": "1",
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    }


def _printable(text: str) -> str:
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown if len(shown) <= _MAX_MESSAGE_LENGTH else f"{shown[:_MAX_MESSAGE_LENGTH]}..."
