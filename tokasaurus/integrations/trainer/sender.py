"""What the ways to send weights share: the engines, and the tensors of a trainer."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from tokasaurus.client import AsyncClient, RetryPolicy
from tokasaurus.errors import ConfigError, TokasaurusError
from tokasaurus.loop_thread import LoopThread

__all__ = ["Engines", "NamedTensors", "WeightsSender", "whole_tensors"]

log = logging.getLogger(__name__)

T = TypeVar("T")

NamedTensors: TypeAlias = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""Tensors by the names of the checkpoint: those of ``transformers``' ``state_dict``."""


class Engines:
    """The clients of some engines, in a thread of their own."""

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        api_key: str | None,
        timeout_s: float | None,
        retry: RetryPolicy | None,
        ca_file: str | PathLike[str] | None,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls:
            raise ConfigError("urls names no engine")
        if len(set(urls)) != len(urls):
            raise ConfigError("urls names an engine twice")
        self._loop = LoopThread()
        self.clients = [
            AsyncClient(url, api_key=api_key, timeout_s=timeout_s, retry=retry, ca_file=ca_file)
            for url in urls
        ]

    def begin(self, work: Callable[[int, AsyncClient], Coroutine[Any, Any, T]]) -> Any:
        """Runs work for every engine at once; returns a future of their results, in order.

        The first engine that fails ends the work for the others, which may wait for it.
        """
        return self._loop.begin(self._all(work, goes_on=False))

    def run(self, work: Callable[[int, AsyncClient], Coroutine[Any, Any, T]]) -> list[T]:
        """The same for every engine, whether or not others fail, and waits for it.

        Raises:
            TokasaurusError: the first engine's that failed; names it if there are several.
        """
        return self._loop.run(self._all(work, goes_on=True))

    async def _all(
        self, work: Callable[[int, AsyncClient], Coroutine[Any, Any, T]], *, goes_on: bool
    ) -> list[T]:
        tasks = [
            asyncio.ensure_future(work(number, client))
            for number, client in enumerate(self.clients)
        ]
        if not goes_on:
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in tasks:
                    task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for client, result in zip(self.clients, results, strict=True):
            if isinstance(result, TokasaurusError) and len(self.clients) > 1:
                log.error("the engine at %s: %s", client.base_url, result)
        failures = [result for result in results if isinstance(result, BaseException)]
        # The work for the others was ended because of another one.
        failures.sort(key=lambda failure: isinstance(failure, asyncio.CancelledError))
        if failures:
            raise failures[0]
        return [result for result in results if not isinstance(result, BaseException)]

    def close(self) -> None:
        self._loop.close(self._close())

    async def _close(self) -> None:
        for client in self.clients:
            await client.close()


class WeightsSender(ABC):
    """Sends all weights of a model to engines. A context manager, which closes connections."""

    @abstractmethod
    def send(self, tensors: NamedTensors, label: str | None = None) -> list[int]:
        """Replaces the weights of every engine. Returns when they run.

        An engine runs either the new weights or those that it had. Of several engines, those that
        have the new ones keep them when another one refuses them.

        Args:
            tensors: all of the model. They are read one after the other.
            label: of the new version, for example the number of the step; None is its number.

        Returns:
            The number of the new version at each engine.

        Raises:
            RequestError: an engine refuses them; says why.
            EngineError: an engine cannot be reached, or fails.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends what connects it with engines."""

    def __enter__(self) -> WeightsSender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def whole_tensors(tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, detached and contiguous; one that is dealt to ranks is gathered (DTensor).

    Raises:
        ConfigError: a name comes twice.
    """
    seen: set[str] = set()
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    for name, tensor in pairs:
        if name in seen:
            raise ConfigError(f"tensors has {name} twice")
        seen.add(name)
        with torch.no_grad():
            gather = getattr(tensor, "full_tensor", None)
            whole = tensor if gather is None else gather()
            yield name, whole.detach().contiguous()
