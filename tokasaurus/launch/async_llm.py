"""The embedded engine for programs with an event loop.

    from tokasaurus import AsyncLLM, SamplingParams

    async with AsyncLLM("path/to/model") as llm:
        output = await llm.generate("Once upon a time", SamplingParams(max_tokens=50))
        print(output.outputs[0].text)

The twin of ``LLM``, with one prompt for each call. Calls that are in flight together share batches.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch.control import (
    Weights,
    pause_action,
    sleep_actions,
    wake_up_actions,
    weights_of,
)
from tokasaurus.launch.engine_thread import EngineThread
from tokasaurus.launch.outputs import GrowingOutput, RequestOutput, request_output
from tokasaurus.launch.program_engine import (
    CartridgeLike,
    Conversation,
    ProgramEngine,
    Prompt,
    specs_of,
)
from tokasaurus.launch.replicated import QUIET, AsyncReplicas, has_processes
from tokasaurus.launch.unused_flags import warn_of_unused_flags
from tokasaurus.protocol.commands import AbortAll, Action, CommandDone, FlushCache, Resume
from tokasaurus.server.control.commands import CommandRunner
from tokasaurus.server.operations.heavy_work import MANY_CHARACTERS, in_thread_if, takes_long
from tokasaurus.server.protocols.embeddings import embedding, pooling_named
from tokasaurus.server.state import EngineState
from tokasaurus.text.cartridges import Prefix
from tokasaurus.text.generation import Generation
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["Answer", "AsyncLLM"]


@dataclass(frozen=True)
class _Question:
    """One call: how its request is prepared, and what its output repeats."""

    prepare: Callable[[ProgramEngine, Prefix | None], PreparedRequest]
    is_heavy: bool  # to prepare
    prompt: str | None = None
    cartridges: Sequence[CartridgeLike] | CartridgeLike | None = None


class Answer(Coroutine[Any, Any, RequestOutput]):
    """The answer to one call, which begins when it is awaited or iterated over.

    ``await`` gives the whole output. ``async for`` gives an output with everything so far, whenever
    there is more; the last one is ``finished``. Where the task is cancelled or the iteration ends
    early, the engine drops the request.
    """

    def __init__(
        self,
        whole: Callable[[], Coroutine[Any, Any, RequestOutput]],
        pieces: Callable[[], AsyncGenerator[RequestOutput, None]],
    ) -> None:
        self._whole = whole
        self._pieces = pieces
        self._begun: Coroutine[Any, Any, RequestOutput] | None = None

    def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        return self._pieces()

    def __await__(self) -> Generator[Any, Any, RequestOutput]:
        return self._coroutine().__await__()

    def send(self, value: Any) -> Any:
        return self._coroutine().send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine().throw(*error)

    def close(self) -> None:
        if self._begun is not None:
            self._begun.close()

    def _coroutine(self) -> Coroutine[Any, Any, RequestOutput]:
        if self._begun is None:
            self._begun = self._whole()
        return self._begun


class AsyncLLM:
    """An engine in this process, in a thread of its own; with several workers, in processes.

    The model is loaded by ``async with``, or by the first call. The engine then belongs to the
    event loop that runs.

    Args:
        model: a Hugging Face directory or repository id; None is the bundled model.
        flags: those of the ``toka`` command line. A warning names those that only a server needs.

    Raises:
        ConfigError: a flag is unknown or wrong. Whatever depends on the model or the machine is
            raised where the model is loaded.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **flags: Any) -> None:
        if model is not None:
            flags["model"] = fspath(model)
        self._config = EngineConfig.from_flags(**{**QUIET, **flags})
        warn_of_unused_flags(self._config, "AsyncLLM")
        self._state = EngineState()
        self._runner = CommandRunner(self._state)
        self._thread: EngineThread | AsyncReplicas | None = None

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        cartridges: Sequence[CartridgeLike] | CartridgeLike | None = None,
    ) -> Answer:
        """Continues a prompt.

        Args:
            prompt: a string, or a list of token ids.
            sampling_params: default ``SamplingParams()``.
            cartridges: as for :meth:`LLM.generate`.

        Raises:
            RequestError: when awaited: the prompt or its parameters are wrong.
            EngineDead: when awaited: the engine was closed, or one of its batches failed.
        """
        params = sampling_params or SamplingParams()
        return self._answer(
            _Question(
                lambda engine, prefix: engine.prepare(prompt, params, prefix),
                len(prompt) > MANY_CHARACTERS or _compiles(params),
                prompt if isinstance(prompt, str) else None,
                cartridges,
            )
        )

    def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cartridges: Sequence[CartridgeLike] | CartridgeLike | None = None,
    ) -> Answer:
        """Answers a conversation with the model's chat template.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``.
            sampling_params: as for :meth:`generate`.
            chat_template_kwargs: further arguments of the template.
            cartridges: as for :meth:`LLM.generate`.

        Raises:
            RequestError: as for :meth:`generate`, or the template refuses the messages.
        """
        params = sampling_params or SamplingParams()
        return self._answer(
            _Question(
                lambda engine, prefix: engine.prepare_chat(
                    messages, params, chat_template_kwargs, prefix
                ),
                len(str(messages)) > MANY_CHARACTERS or _compiles(params),
                cartridges=cartridges,
            )
        )

    async def embed(self, prompt: Prompt, *, pooling: str | None = None) -> NDArray[np.float32]:
        """Computes one vector of length 1 from the model's last hidden states.

        Args:
            prompt: a string, or a list of token ids.
            pooling: "mean" over the prompt's tokens, or "last"; default ``embedding_pooling``.

        Returns:
            [hidden].

        Raises:
            RequestError: the prompt is wrong.
        """

        def prepare(engine: ProgramEngine, prefix: Prefix | None) -> PreparedRequest:
            return engine.prepare_embedding(prompt, pooling_named(pooling, engine.config))

        question = _Question(prepare, len(prompt) > MANY_CHARACTERS)
        async with self._running(question, stream=False) as run:
            return embedding(await run.finished())

    async def pause(self, mode: str = "abort") -> None:
        """Computes nothing more until :meth:`resume`; later calls wait.

        Args:
            mode: "abort" ends every call with the tokens so far and the finish reason "abort";
                "wait" lets the sequences that have begun end; "keep" lets all go on after
                :meth:`resume`.

        Raises:
            RequestError: there is no such mode.
            Conflict: a "wait" was ended by a resume, or by a pause that keeps.
        """
        await self._run(pause_action(mode))

    async def resume(self) -> None:
        """Goes on after a pause. Raises Conflict while memory is released."""
        await self._run(Resume())

    async def abort_all(self) -> int:
        """Ends every call with the tokens so far and the finish reason "abort".

        A call that has nothing to answer with, such as an embedding, raises EngineAborted.

        Returns:
            The number of samples that it ended.
        """
        (done,) = await self._run(AbortAll())
        return done.num_sequences

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Pauses, and frees the memory of the weights and the KV cache until :meth:`wake_up`.

        Args:
            level: 1 or 2; 0 frees nothing.
            mode: as for :meth:`pause`.

        Raises:
            RequestError: the level or the mode is wrong.
        """
        actions = sleep_actions(level, mode)
        with (await self._loaded()).generations.commands.falling_asleep():
            await self._run(*actions)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Restores memory; when all is restored, resumes if a sleep had paused the engine.

        The weights are read again from the files that they came from. If these are gone, the engine
        waits for :meth:`update_weights`.

        Args:
            tags: "weights", "kv_cache" or both; default both.

        Raises:
            RequestError: there is no such tag.
            Conflict: the memory is restored, but there are no weights to run.
        """
        await self._run(*wake_up_actions((await self._loaded()).generations.commands, tags))

    async def reset_prefix_cache(self) -> None:
        """Drops every cached page that no running sequence holds."""
        await self._run(FlushCache())

    async def update_weights(self, path: Weights) -> int:
        """Replaces all weights of the model; calls in flight go on with the new ones.

        Args:
            path: as for :meth:`LLM.update_weights`.

        Returns:
            The version of the new weights: the first ones are 0, and each update makes the next.

        Raises:
            RequestError: the files cannot be these weights; nothing has changed.
            Conflict: the memory of the weights is released.
        """
        files = await asyncio.to_thread(weights_of, path)
        await self._loaded()
        done = await self._runner.update_weights(files, lambda result: None)
        return done.weights_version

    async def get_tokenizer(self) -> Tokenizer:
        """The tokenizer in use."""
        return (await self._loaded()).tokenizer

    async def asgi_app(self) -> ASGIApp:
        """The HTTP API of ``toka`` on this engine, for clients in this process: no port is opened.

        It has every route but those of files and batches. Give it to ``httpx.ASGITransport``. It
        answers to every name in ``Host``: whatever serves it elsewhere knows its own.
        """
        from tokasaurus.server.app import create_app
        from tokasaurus.server.http.request_ids import RequestIds

        config = (await self._loaded()).config
        return RequestIds(create_app(replace(config, allowed_hosts=("*",)), self._state))

    async def close(self) -> None:
        """Ends every call with ``EngineDead``, and frees the model and the cache."""
        self._state.die("it was closed")
        if self._thread is not None:
            await self._thread.close()

    async def __aenter__(self) -> AsyncLLM:
        try:
            await self._loaded()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # --- calls ------------------------------------------------------------------------------------

    async def _loaded(self) -> ProgramEngine:
        """The engine, which can serve at this moment."""
        if self._thread is None:
            if self._state.status == "dead":
                self._state.check()
            make = AsyncReplicas if has_processes(self._config) else EngineThread
            self._thread = make(self._config, self._state)
        engine = await self._thread.engine()
        self._state.check()
        return engine

    async def _run(self, *actions: Action) -> list[CommandDone]:
        await self._loaded()
        return await self._runner.run(*actions) if actions else []

    def _answer(self, question: _Question) -> Answer:
        return Answer(partial(self._whole, question), partial(self._pieces, question))

    async def _whole(self, question: _Question) -> RequestOutput:
        async with self._running(question, stream=False) as run:
            generation = await run.finished()
        with_logprobs = generation.request.params.logprobs is not None
        return await in_thread_if(
            takes_long([generation], with_logprobs) or generation.request.receipts is not None,
            lambda: request_output(generation, question.prompt, run.tokenizer),
        )

    async def _pieces(self, question: _Question) -> AsyncGenerator[RequestOutput, None]:
        async with self._running(question, stream=True) as run:
            output = GrowingOutput(run.generation, question.prompt, run.tokenizer)
            while not output.finished:
                await run.changed()
                if output.grow():
                    has_receipt = run.generation.request.receipts is not None
                    yield await in_thread_if(output.finished and has_receipt, output.so_far)

    @contextlib.asynccontextmanager
    async def _running(self, question: _Question, *, stream: bool) -> AsyncIterator[_Run]:
        engine = await self._loaded()
        async with _prefixed(engine, question) as prefix:
            prepare = partial(question.prepare, engine, prefix)
            request = await in_thread_if(question.is_heavy, prepare)
            self._state.check()
            run = _Run(engine, request, stream)
            try:
                yield run
            finally:
                if not run.generation.finished:
                    engine.generations.abort(run.generation)


@contextlib.asynccontextmanager
async def _prefixed(engine: ProgramEngine, question: _Question) -> AsyncIterator[Prefix | None]:
    """What comes before the prompt of a call, as long as the call lasts."""
    specs = specs_of(question.cartridges)
    if not specs:
        yield None
        return
    lease = await engine.cartridges.acquire(specs)
    try:
        yield lease.prefix
    finally:
        lease.release()


class _Run:
    """A request in flight, and the event that there is news of it."""

    def __init__(self, engine: ProgramEngine, request: PreparedRequest, stream: bool) -> None:
        self.tokenizer = engine.tokenizer
        self._news = asyncio.Event()
        self.generation = engine.generations.start(request, stream=stream, on_change=self._news.set)

    async def changed(self) -> None:
        """Waits for news. Raises the error that ends the request."""
        await self._news.wait()
        self._news.clear()
        if self.generation.error is not None:
            # Everything in flight may share the error, but no traceback.
            raise self.generation.error.with_traceback(None)

    async def finished(self) -> Generation:
        """Waits for the end. Raises the error that ends the request."""
        while True:
            await self.changed()
            if self.generation.finished:
                return self.generation


def _compiles(params: SamplingParams) -> bool:
    """Whether it takes a while to check the parameters."""
    return params.structured_outputs is not None or params.bad_words is not None
