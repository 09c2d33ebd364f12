"""The examples' rollout: veRL's server for Tokasaurus, without veRL and Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.errors import EngineError
from tokasaurus.integrations.verl.server import TokasaurusHttpServer
from tokasaurus.loop_thread import LoopThread

__all__ = ["Answer", "Rollout", "largest_difference"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model said.

    Attributes:
        token_ids: with the token that ended it.
        logprobs: [tokens], in the distribution that they were drawn from.
    """

    token_ids: list[int]
    logprobs: list[float]


class Rollout:
    """An engine as a trainer uses it. A context manager, which closes connections.

    Args:
        url: of the engine.
        seed: what the seeds of all samples are made of.

    Raises:
        EngineError: the engine does not serve, or wants another key.
    """

    def __init__(self, url: str, seed: int) -> None:
        self._loop = LoopThread()
        self._server = TokasaurusHttpServer({"full_determinism": True, "seed": seed}, url)
        self._num_asked = 0
        self._loop.run(self._server.launch_server())

    def use_cartridge(self, path: Path) -> None:
        """Answers are given behind the present content of a file from now on."""
        cartridge = {"id": str(path), "source": "local", "force_redownload": True}
        self._loop.run(self._server.update_cartridges([cartridge]))

    def answers(
        self, prompts: Sequence[list[int]], *, max_tokens: int, temperature: float
    ) -> list[Answer]:
        """Samples one answer to each prompt, all at once."""
        parameters = {"max_tokens": max_tokens, "temperature": temperature, "logprobs": True}
        outputs = self._outputs(prompts, parameters)
        return [Answer(each.token_ids, each.log_probs) for each in outputs]

    def likeliest(
        self, prompts: Sequence[list[int]], answers: Sequence[Answer], top_k: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """What the model would say in each place of given answers.

        Returns:
            For each answer the likeliest ids and their logprobs, both [answer tokens, top_k].
        """
        outputs = self._outputs(
            [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)],
            {"max_tokens": 1, "prompt_logprobs": top_k},
        )
        found = []
        for prompt, each in zip(prompts, outputs, strict=True):
            there = slice(len(prompt) - 1, -1)  # row i is about token i + 1
            ids = np.array(each.extra_fields["prompt_ids"][there], np.int64)
            found.append((ids, np.array(each.extra_fields["prompt_logprobs"][there], np.float32)))
        return found

    def _outputs(self, prompts: Sequence[list[int]], parameters: dict[str, Any]) -> list[Any]:
        first, self._num_asked = self._num_asked, self._num_asked + len(prompts)

        async def ask() -> list[Any]:
            tasks = [
                asyncio.ensure_future(
                    self._server.generate(prompt, parameters, request_id=str(first + number))
                )
                for number, prompt in enumerate(prompts)
            ]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()  # where one has failed, the others are of no use

        return self._loop.run(ask())

    def close(self) -> None:
        """Closes the connections."""
        self._loop.close(self._server.close())

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
