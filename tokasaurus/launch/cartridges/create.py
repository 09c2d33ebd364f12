"""``toka-cartridge create``: makes a cartridge of a text.

It is the KV cache that the engine has after reading the text. Nothing is trained, so it saves the
prefill and no memory: a prompt behind it gets what it would get behind the text.

The engine's own worker computes it, with the pages and kernels that serve it later. Batches are
made here: one sequence needs no scheduling, and its pages are the first ones, in order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.config.engine import ENGINE, EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.config.slices import EngineSlices, WorkerConfig
from tokasaurus.errors import ConfigError
from tokasaurus.launch.cartridges.files import sizes
from tokasaurus.protocol.messages import ForwardBatch, Sampling, SlotParameters
from tokasaurus.rounding import ceil_div

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["SCHEMA", "CreateConfig", "make_cartridge", "read_text", "run", "target_path"]

_GROUP = "Cartridge"


@dataclass(frozen=True, kw_only=True)
class CreateConfig(EngineConfig):
    """The text, the file to write, and the flags of the engine that reads the text."""

    text: str = flag(group=_GROUP, help="A text file in UTF-8.")
    out: str = flag(group=_GROUP, help="The file to write; one that is there is replaced.")
    num_tokens: int | None = flag(
        None,
        group=_GROUP,
        minimum=1,
        help="Cut the text after so many tokens.",
        usually="all tokens of the text",
    )
    special_tokens: bool = flag(
        True,
        group=_GROUP,
        help="Begin with the tokens that the tokenizer puts before a prompt, such as BOS: prompts "
        "behind a cartridge get none.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)


SCHEMA = Schema(
    target=CreateConfig,
    program="toka-cartridge create",
    summary="Make a cartridge of a text: the KV cache that a model has after reading it.\n\n"
    "Nothing is trained: prompts behind it get what they would get behind the text, without\n"
    "reading it again. The flags are those of the engine, which runs in this process.",
    shortcuts=ENGINE.shortcuts,
    retired=ENGINE.retired,
    foreign=ENGINE.foreign,
    reads_files=True,
    examples=(
        "toka-cartridge create --text manual.txt model=Qwen/Qwen3-4B out=manual.safetensors",
        "toka-cartridge create text=manual.txt out=manual.safetensors num_tokens=2000",
    ),
)


def run(config: CreateConfig) -> None:
    """Writes the file, and prints what it is.

    Raises:
        ConfigError: flags, the text or the machine do not fit.
        ModelError: the model cannot be served.
        EngineError: the file cannot be written.
    """
    from tokasaurus.launch.assemble import assemble

    text, out = read_text(config.text), target_path(config.out)
    if (config.dp_size, config.pp_size, config.tp_size) != (1, 1, 1):
        raise ConfigError("a cartridge is created by one worker: leave dp_size, pp_size, tp_size")
    slices = assemble(config)
    with _bar() as report:
        metadata = make_cartridge(slices, text, out, config, report)
    print(f"{config.out} is a cartridge of {sizes(metadata)}; digest {metadata.digest}")


def make_cartridge(
    slices: EngineSlices,
    text: str,
    out: Path,
    config: CreateConfig,
    report: Callable[[int, int], None],
) -> CartridgeMetadata:
    """Lets a worker read the text, and writes what its KV cache has then.

    Args:
        slices: of an engine with one worker.
        out: the file to write.
        report: is called with the tokens that were read, and with all.

    Raises:
        ConfigError: the text has no tokens, or more than the model has positions.
        ModelError: the model cannot be served.
        EngineError: the file cannot be written.
    """
    from tokasaurus.launch.cartridges.tensors import save_tensors
    from tokasaurus.model.facts import model_shape
    from tokasaurus.text.tokenizer import Tokenizer

    # What limits the tokens of a text is told below, in this command's words.
    tokenizer = Tokenizer.load(replace(slices.server, max_request_tokens=sys.maxsize))
    ids = tokenizer.encode(text, add_special_tokens=config.special_tokens)[: config.num_tokens]
    worker_config = slices.replicas[0].workers[0]
    _check_length(ids, config, slices)
    keys, values = _prefilled(worker_config, ids, report)
    shape = model_shape(worker_config.model_path, config.model or "", worker_config.rope_scaling)
    return save_tensors(
        out,
        keys,
        values,
        model=shape.name,
        rope=shape.rope,
        tokenizer=tokenizer.digests()["digest"],
    )


def read_text(name: str) -> str:
    """The text of the file that ``text`` names. Raises ConfigError if it cannot be read."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"text={name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"text={name} is not in UTF-8: byte {error.start}") from None


def target_path(out: str) -> Path:
    """The file that ``out`` names. Raises ConfigError if it cannot be made there."""
    path = Path(out).expanduser()
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"out={out}: the name must end in .safetensors; "
            "toka-cartridge convert makes a .pt of it"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"out={out}: there is no directory {path.parent}")
    return path


def _check_length(ids: Sequence[int], config: CreateConfig, slices: EngineSlices) -> None:
    if not ids:
        raise ConfigError(f"text={config.text} has no tokens")
    if config.num_tokens is not None and len(ids) < config.num_tokens:
        raise ConfigError(f"num_tokens={config.num_tokens}: the text has {len(ids)} tokens")
    # A cartridge without room for a prompt is of no use.
    most = slices.server.max_request_tokens - 1
    if len(ids) > most:
        raise ConfigError(
            f"text={config.text} has {len(ids)} tokens, and a request of this model has at most "
            f"{most + 1} with its cartridge; num_tokens={most} cuts the text"
        )


def _prefilled(
    config: WorkerConfig, ids: Sequence[int], report: Callable[[int, int], None]
) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and values of a text, for each layer [kv_heads, tokens, head_dim]."""
    from tokasaurus.model.worker.worker import Worker

    config = replace(
        config,
        num_pages=ceil_div(len(ids), config.page_size),
        num_slots=1,
        max_seqs_per_forward=1,
        max_request_tokens=max(config.max_request_tokens, len(ids)),
    )
    worker = Worker(config)
    done = 0
    for batch in _batches(ids, config):
        worker.submit(batch).collect()
        done += len(batch.prefill_ids)
        report(done, len(ids))
    return worker.read_pages(np.arange(config.num_pages, dtype=np.int32), len(ids))


def _batches(ids: Sequence[int], config: WorkerConfig) -> Iterator[ForwardBatch]:
    """One sequence in slot 0, whose pages are 0, 1, 2, ...; no token is drawn.

    Chunks begin at pages, and each adds the pages that it reaches to the table.
    """
    size = max(1, config.max_tokens_per_forward // config.page_size) * config.page_size
    for number, start in enumerate(range(0, len(ids), size)):
        chunk = np.array(ids[start : start + size], np.int32)
        end = start + len(chunk)
        pages = np.arange(
            start // config.page_size, ceil_div(end, config.page_size), dtype=np.int32
        )
        following = ids[end] if end < len(ids) else -1
        yield ForwardBatch(
            number=number,
            parameters=_parameters() if number == 0 else None,
            table_slots=np.zeros_like(pages),
            table_columns=pages,
            table_pages=pages,
            prefill_slots=np.array([0], np.int32),
            prefill_starts=np.array([start], np.int32),
            prefill_lengths=np.array([len(chunk)], np.int32),
            prefill_ids=chunk,
            prefill_num_logprobs=np.array([-1], np.int32),
            prefill_next_ids=np.array([following], np.int32),
        )


def _parameters() -> SlotParameters:
    zero = np.zeros(1, np.int32)
    return SlotParameters(
        slots=zero,
        samplings=(Sampling(temperature=0.0),),
        sampling_index=zero,
        seed=np.zeros(1, np.int64),
        sample_index=zero,
        num_generated=zero,
        num_logprobs=np.array([-1], np.int32),
    )


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading the model", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, description="reading the text", completed=done, total=total)

        yield report
