"""An engine in an actor of Ray Data, which answers blocks of requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from tokasaurus.batch.answering import Answering
from tokasaurus.batch.capacity import Capacity
from tokasaurus.batch.records import Usage
from tokasaurus.batch.store import NewAnswer
from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import TokasaurusError
from tokasaurus.integrations.ray.batch_files import BLOCK_ROWS, Block, Directory, write_result
from tokasaurus.integrations.ray.rows import BlockDone, decode_row, encode_row
from tokasaurus.launch.engine_thread import EngineThread
from tokasaurus.launch.replicated import AsyncReplicas, has_processes
from tokasaurus.observability.logging import configure_logging
from tokasaurus.protocol.messages import MAX_PRIORITY
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.routes.batches import SAMPLES_AHEAD
from tokasaurus.server.state import EngineState

__all__ = ["Answerer", "blocks_ahead", "engine_of_an_actor"]

_MAX_BYTES = 32 << 20  # of requests in flight
_USUAL_SEQS = 1024  # in a batch, where the engine itself decides


def engine_of_an_actor(config: EngineConfig, num_threads: int | None) -> EngineConfig:
    """The choices of a user of the cluster, for one engine on the node of its actor.

    Args:
        config: the user's choices.
        num_threads: that each worker may use; None is up to the engine.
    """
    return replace(
        config,
        launcher="local",
        dp_size=1,
        cpu_threads=num_threads,
        max_request_priority=MAX_PRIORITY,  # its lines compete with one another only
    )


def blocks_ahead(config: EngineConfig) -> int:
    """How many blocks an engine gets at once, so that the end of one leaves no gap."""
    num_seqs = config.max_seqs_per_forward or _USUAL_SEQS
    return 1 + -(-SAMPLES_AHEAD * num_seqs // BLOCK_ROWS)


class Answerer:
    """Answers blocks, and writes their results. Ray Data calls it in one event loop.

    Args:
        config: the engine's.
        target: the directory of results.
    """

    def __init__(self, config: EngineConfig, target: Directory) -> None:
        configure_logging("engine", config.log_level, config.log_format)
        self._config = config
        self._target = target
        self._state = EngineState()
        self._answer = Executor(self._state, OPERATIONS).answer
        self._engine: EngineThread | AsyncReplicas | None = None
        self._capacity: Capacity | None = None  # until the engine is there

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, list[bytes]]]:
        """Answers a batch of Ray Data, which has one row.

        Args:
            batch: "row" has a ``Row``. If it is no block, it is passed on.

        Yields:
            "row", with a block that is done, or the error that ends the run: exceptions that are
            raised here reach the driver as text.
        """
        for data in batch["row"]:
            row = decode_row(data)
            if isinstance(row, Block):
                try:
                    row = await self._answer_block(row)
                except TokasaurusError as error:
                    row = error
            yield {"row": [encode_row(row)]}

    async def _answer_block(self, block: Block) -> BlockDone:
        capacity = await self._loaded()
        answers: list[NewAnswer] = []

        async def keep(some: list[NewAnswer]) -> None:
            answers.extend(some)

        await Answering(self._answer, capacity, keep, block.name).run(iter(block.lines))
        answers.sort(key=lambda answer: answer.line)
        write_result(self._target, block, [answer.data for answer in answers])
        return BlockDone(
            block.name,
            len(answers),
            block.num_bytes,
            sum(answer.is_error for answer in answers),
            sum((answer.usage for answer in answers), Usage()),
        )

    async def _loaded(self) -> Capacity:
        """Loads the engine, once; returns its room for requests."""
        if self._engine is None:
            make = AsyncReplicas if has_processes(self._config) else EngineThread
            self._engine = make(self._config, self._state)
        config = (await self._engine.engine()).config
        if self._capacity is None:
            self._capacity = Capacity(SAMPLES_AHEAD * config.max_seqs_per_forward, _MAX_BYTES)
        return self._capacity
