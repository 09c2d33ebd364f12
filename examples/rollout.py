"""The examples' rollout: token ids in, token ids and their logprobs out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.client import AsyncClient
from tokasaurus.errors import EngineError
from tokasaurus.loop_thread import LoopThread

__all__ = ["Answer", "Rollout", "largest_difference"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model said.

    Attributes:
        token_ids: with the token that ended it.
        logprobs: float32 [tokens], in the distribution that they were drawn from.
    """

    token_ids: list[int]
    logprobs: NDArray[np.float32]


class Rollout:
    """An engine as a trainer uses it. A context manager, which closes connections.

    Args:
        url: of the engine.
        seed: of all samples: each has its own.
    """

    def __init__(self, url: str, seed: int) -> None:
        self._loop = LoopThread()
        self._client = AsyncClient(url)
        self._seeds = itertools.count(seed << 32)
        self._cartridges: list[dict[str, Any]] | None = None

    def use_cartridge(self, path: Path) -> None:
        """Answers are given behind the present content of a file from now on."""
        self._loop.run(self._client.cartridges.upload(path, name="student"))
        self._cartridges = [{"id": "student", "source": "local"}]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
    ) -> list[Answer]:
        """Samples one answer to each prompt, all at once."""

        async def answer(prompt: Sequence[int], seed: int) -> Answer:
            said = await self._client.complete(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                logprobs=0,
                logprobs_mode="processed",
                cartridges=self._cartridges,
            )
            assert said.token_ids is not None
            assert said.logprobs is not None
            return Answer(said.token_ids.tolist(), said.logprobs.chosen)

        async def all_answers() -> list[Answer]:
            return await asyncio.gather(*(answer(each, next(self._seeds)) for each in prompts))

        return self._loop.run(all_answers())

    def likeliest(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], top_k: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """What the model would say at each place of given answers.

        Returns:
            For each answer the most likely ids and their logprobs, both [answer tokens, top_k].
        """

        async def score(
            prompt: Sequence[int], answer: Sequence[int]
        ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            said = await self._client.generate(
                [*prompt, *answer], prompt_logprobs=top_k, max_tokens=1
            )
            assert said.prompt_logprobs is not None
            there = slice(len(prompt), None)
            return (
                said.prompt_logprobs.top_ids[there].astype(np.int64),
                said.prompt_logprobs.top[there],
            )

        async def all_scores() -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
            return await asyncio.gather(*map(score, prompts, answers))

        return self._loop.run(all_scores())

    def close(self) -> None:
        """Closes the connections."""
        self._loop.close(self._client.close())

    def __enter__(self) -> Rollout:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def largest_difference(answers: Sequence[Answer], logprobs: Tensor, allowed: float) -> float:
    """Between the logprobs of the engine and those of the trainer.

    Args:
        answers: of the engine.
        logprobs: of the trainer, [tokens of all answers], one after the other.
        allowed: the largest that may be.

    Raises:
        EngineError: it is larger: the two do not run the same model.
    """
    of_engine = np.concatenate([each.logprobs for each in answers])
    largest = float(np.abs(of_engine - logprobs.cpu().numpy()).max())
    if largest > allowed:
        raise EngineError(
            f"a token's logprob differs by {largest:.2g} between engine and trainer, more than"
            f" most_difference={allowed:g}: they do not run the same model in the same precision"
        )
    return largest
