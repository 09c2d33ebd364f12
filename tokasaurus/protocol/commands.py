"""Commands to a running engine, and controls: the part of a command that a worker carries out.

    server ──Command──▶ manager ──Control──▶ worker
    server ◀──CommandDone, CommandFailed── manager ◀──ControlDone── worker

A control is numbered in one sequence with the batches: the worker carries it out after the batches
before it, and before the batches behind it.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.message import Message

__all__ = [
    "AbortAll",
    "Action",
    "Command",
    "CommandDone",
    "CommandFailed",
    "Control",
    "ControlDone",
    "DeviceAction",
    "FlushCache",
    "GroupAction",
    "JoinWeightsGroup",
    "LeaveWeightsGroup",
    "LoadCartridge",
    "Pause",
    "PauseMode",
    "ReceiveWeights",
    "ReleaseMemory",
    "RestoreMemory",
    "Resume",
    "TransferDone",
    "UnloadCartridge",
    "UpdateWeights",
    "WriteCartridge",
    "aborts_all",
]


class _Action(msgspec.Struct, frozen=True, array_like=True, tag=True, eq=False):
    pass


class PauseMode(enum.IntEnum):
    """What a pause does with the sequences that the manager has."""

    # Running sequences give up their pages. After Resume they go on with the tokens that they have.
    KEEP = 0
    # All sequences end with FinishReason.ABORT and the tokens that they have.
    ABORT = 1
    # Sequences that have begun run to their ends; the others wait for Resume.
    DRAIN = 2


class FlushCache(_Action, frozen=True):
    """Drop every cached page that no running sequence holds. Cartridges stay."""


class Pause(_Action, frozen=True):
    """Plan no more batches; done when none is in flight, and in a drain when all begun have ended.

    Requests are accepted and wait.
    """

    mode: PauseMode


class Resume(_Action, frozen=True):
    """Plan batches again."""


class AbortAll(_Action, frozen=True):
    """End every sequence with FinishReason.ABORT and the tokens that it has."""


class UpdateWeights(_Action, frozen=True):
    """Replace all weights of the model.

    Running sequences are preempted, and recompute their KV with the new weights. The files are
    checked whole (checksums, names, shapes, dtypes, completeness) before a tensor is written. An
    update that fails this check changes nothing; a failure after it ends the replica.

    The names, shapes and padding of the vocabulary are those of the model's own checkpoint. Tensors
    are converted to the engine's dtype. The files must not be written to until the update is done:
    this ends the replica. They may be replaced by other files of the same names.
    """

    version: int  # of the new weights; greater than that of the present ones, which begin at 0
    # Safetensors files, which together have every tensor; paths as the worker sees them. Not
    # directories: checkpoint_files in tokasaurus/checkpoint_files.py lists the files of one.
    files: tuple[str, ...]
    # SHA-256 of each file, in hexadecimal and in the order of the files; () does not check.
    checksums: tuple[str, ...] = ()
    # In the place of files: the tensors that came by ReceiveWeights, which must be all.
    is_received: bool = False


class ReleaseMemory(_Action, frozen=True):
    """Preempt all sequences and free memory of the device; nothing runs until it is restored.

    The memory goes back to the system. What is released already stays so.
    """

    weights: bool
    kv_cache: bool


class RestoreMemory(_Action, frozen=True):
    """Allocate what was released again; what was not released stays as it is.

    Weights are read again from the files that they came from: the checkpoint, or the files of the
    last update. Where one of these does not exist any more, or has been written to, the weights
    stay released, and nothing runs until an UpdateWeights. An update also restores released weights
    by itself, without reading the former ones.

    Cartridges are written again when requests need them.
    """

    weights: bool
    kv_cache: bool


class JoinWeightsGroup(_Action, frozen=True):
    """Let every worker join a process group of torch.distributed, in which a trainer is rank 0.

    It is done when all ranks of the group are there, and fails when the time is up. The workers
    wait for the others beside their batches, and other commands do not wait for it. A group of the
    same name is left first.
    """

    group: str  # its name, the same at all ranks
    address: str  # the trainer listens there
    port: int
    # The rank of the first worker of replica 0 in the group. Those of the other workers follow, in
    # the order of replicas and of ranks within a replica.
    first_rank: int
    world_size: int  # ranks of the group, with the trainer
    backend: str  # "gloo", "nccl", or "" for nccl on CUDA devices and gloo elsewhere
    timeout_s: float


class LeaveWeightsGroup(_Action, frozen=True):
    """Leave a group; harmless if there is none.

    What it still joins or receives fails, and tensors that came before are dropped.
    """

    group: str


class ReceiveWeights(_Action, frozen=True):
    """Receive tensors that the trainer of a group broadcasts, one after the other.

    They are checked by name, shape and dtype first. It is done when every worker keeps its part of
    all of them, beside the weights that run: an UpdateWeights replaces these once all tensors of
    the model have come. Batches go on, and other commands do not wait for it. Where it fails, the
    group is of no use any more, and has to be left.
    """

    group: str
    names: tuple[str, ...]  # as in UpdateWeights
    dtypes: tuple[str, ...]  # as torch writes them, such as "bfloat16"
    shapes: tuple[tuple[int, ...], ...]
    # All tensors come in one broadcast: the bytes of one behind those of the other.
    is_flat: bool
    # Drop tensors that came before: they belong to another update. So does one that has come
    # already.
    begins_anew: bool
    timeout_s: float


class LoadCartridge(_Action, frozen=True):
    """Register a trained KV cache, which requests may name until UnloadCartridge.

    It is done at once, behind the commands that came before it or not. The files are read when a
    request needs the cartridge and its pages are not there; a file that cannot be read then ends
    the requests that name the cartridge, with RequestRejected.
    """

    name: str  # of one version of the cartridge; not registered at present
    # Of its files, which must not change: one, or several whose positions follow one another in
    # this order. tokasaurus/cartridge_file.py describes them.
    paths: tuple[str, ...]
    num_tokens: int  # positions that all of them take together, at least 1


class UnloadCartridge(_Action, frozen=True):
    """Forget a cartridge and free its pages; it fails while a request that lives names it."""

    name: str


class WriteCartridge(_Action, frozen=True):
    """For the worker: write a cartridge's keys and values into pages.

    tokasaurus/cartridge_file.py describes the files. They are checked and read whole before a page
    is written.
    """

    paths: tuple[str, ...]  # one after the other
    num_tokens: int  # of all of them together
    pages: Int32Array  # [pages] in order of position; the last may not be filled


Action: TypeAlias = (
    FlushCache
    | Pause
    | Resume
    | AbortAll
    | UpdateWeights
    | ReleaseMemory
    | RestoreMemory
    | LoadCartridge
    | UnloadCartridge
    | JoinWeightsGroup
    | LeaveWeightsGroup
    | ReceiveWeights
)
GroupAction: TypeAlias = JoinWeightsGroup | LeaveWeightsGroup | ReceiveWeights
"""What concerns the group of a trainer: it is carried out beside the batches."""
DeviceAction: TypeAlias = (
    UpdateWeights | ReleaseMemory | RestoreMemory | WriteCartridge | GroupAction
)


def aborts_all(action: Action) -> bool:
    """Whether an action ends every request that came before it."""
    if isinstance(action, Pause):
        return action.mode is PauseMode.ABORT
    return isinstance(action, AbortAll)


class Command(Message, frozen=True):
    """Server to manager; answered by one CommandDone or CommandFailed."""

    command_id: int  # unique among unanswered commands
    action: Action


class CommandDone(Message, frozen=True):
    """What a command did; numbers that it does not concern are 0."""

    command_id: int
    num_pages: int = 0  # dropped from the prefix cache, or freed
    num_tokens: int = 0  # that these pages held
    num_sequences: int = 0  # aborted
    weights_version: int = 0  # of the weights that run from now on
    # Whether nothing runs before an update: the weights were released and not read again.
    lacks_weights: bool = False
    # Of ReceiveWeights: whether all tensors of the model have come.
    has_all_tensors: bool = False


class CommandFailed(Message, frozen=True):
    """The command changed nothing, or only some of several replicas."""

    command_id: int
    reason: str
    field: str | None = None  # of the action
    is_partial: bool = False  # some replicas have done it


class Control(Message, frozen=True):
    """Manager to worker: do this between two batches."""

    number: int  # in one sequence with those of batches
    action: DeviceAction


class ControlDone(Message, frozen=True):
    """Worker to manager, after the results of all batches before the control.

    The answer to a JoinWeightsGroup or a ReceiveWeights says that it has begun; a TransferDone of
    each worker says how it ended.
    """

    number: int
    error: str | None = None  # why the worker refused, without having changed anything
    weights_ready: bool = True  # false while the weights are released, or were not filled again


class TransferDone(Message, frozen=True):
    """Worker to manager: this rank has joined a group, or has received tensors, or could not.

    It may come before the answer to the control.
    """

    number: int  # of the control
    rank: int  # of the worker in its replica
    num_ranks: int  # of the replica, which all say so
    error: str | None = None
    has_all_tensors: bool = False  # that this rank needs for an update
