"""The engine of a program: text core, manager and worker in one process, called in a loop.

    from tokasaurus import LLM, SamplingParams

    with LLM("path/to/model") as llm:
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=50)):
            print(output.outputs[0].text)

The names are those of vLLM's offline API. The engine is that of ``toka``, without HTTP and without
other processes, and generates the same tokens. With several workers (``dp_size``, ``pp_size``,
``tp_size``) the managers and the workers have processes of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import Conflict, RequestError, TokasaurusError
from tokasaurus.launch.cartridge_store import StoreInThread, cartridges_of
from tokasaurus.launch.control import Weights, sleep_actions, wake_up_actions, weights_of
from tokasaurus.launch.embedded import EmbeddedEngine
from tokasaurus.launch.launching import placed
from tokasaurus.launch.outputs import RequestOutput, request_output
from tokasaurus.launch.program_engine import CartridgeLike, Conversation, Prompt, specs_of
from tokasaurus.launch.replicated import QUIET, ReplicatedEngine, has_processes
from tokasaurus.launch.unused_flags import warn_of_unused_flags
from tokasaurus.loop_thread import LoopThread
from tokasaurus.protocol.commands import Action, CommandDone, FlushCache
from tokasaurus.server.protocols.embeddings import embedding, pooling_named
from tokasaurus.text.cartridges import Prefix
from tokasaurus.text.commands import OnDone
from tokasaurus.text.generation import Generation
from tokasaurus.text.params import SamplingParams
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["LLM"]


class LLM:
    """An engine in this process; with several workers, as of ``dp_size=2``, in processes below it.

    Args:
        model: a Hugging Face directory or repository id; None is the bundled model.
        flags: those of the ``toka`` command line. A warning names those that only a server needs.

    Raises:
        ConfigError: a flag is unknown, wrong, or contradicts another.
        ModelError: the model cannot be found or served.
        LaunchError: other machines are not there.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **flags: Any) -> None:
        if model is not None:
            flags["model"] = fspath(model)
        config = EngineConfig.from_flags(**{**QUIET, **flags})
        warn_of_unused_flags(config, "LLM")
        slices, launcher = placed(config)
        # The caller runs in this process, and could run any code without a template.
        server = dataclasses.replace(slices.server, trust_request_chat_template=True)
        slices = dataclasses.replace(slices, server=server)
        self._engine = (
            ReplicatedEngine(slices, launcher) if has_processes(config) else EmbeddedEngine(slices)
        )
        self._lock = threading.Lock()
        self._loop = LoopThread()  # finds cartridges
        self._store = StoreInThread(self._engine.config, self._loop)
        self._engine.cartridges = cartridges_of(
            self._engine.config, self._engine.generations, self._store
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        cartridges: Sequence[CartridgeLike] | CartridgeLike | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts.

        Args:
            prompts: strings or lists of token ids, or a single one.
            sampling_params: one for all, or one for each prompt; default ``SamplingParams()``.
            use_tqdm: show progress on standard error.
            cartridges: trained KV caches that come before each prompt, in this order: files, or
                ``{"id": ..., "source": ...}``. Texts are then tokenized without BOS.

        Returns:
            One output per prompt, in the same order.

        Raises:
            RequestError: a prompt, its parameters or a cartridge is wrong; nothing was generated.
            Conflict: the engine is asleep.
        """
        texts = _as_list(prompts)
        params = _per_prompt(sampling_params, len(texts))
        with self._behind(cartridges) as prefix:
            requests = [
                _named(number, partial(self._engine.prepare, prompt, each, prefix))
                for number, (prompt, each) in enumerate(zip(texts, params, strict=True))
            ]
            names = [prompt if isinstance(prompt, str) else None for prompt in texts]
            return self._run(requests, names, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cartridges: Sequence[CartridgeLike] | CartridgeLike | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations with the model's chat template.

        Args:
            messages: a conversation, which is a list of ``{"role": ..., "content": ...}``, or
                several conversations.
            sampling_params: as for :meth:`generate`.
            use_tqdm: show progress on standard error.
            chat_template_kwargs: further arguments of the template.
            cartridges: as for :meth:`generate`.

        Raises:
            RequestError: as for :meth:`generate`, or the template refuses the messages.
        """
        conversations: list[Any] = list(messages)
        if not conversations or isinstance(conversations[0], Mapping):
            conversations = [conversations]
        params = _per_prompt(sampling_params, len(conversations))
        prepare = partial(self._engine.prepare_chat, template_arguments=chat_template_kwargs)
        with self._behind(cartridges) as prefix:
            requests = [
                _named(number, partial(prepare, conversation, each, prefix=prefix))
                for number, (conversation, each) in enumerate(
                    zip(conversations, params, strict=True)
                )
            ]
            return self._run(requests, [None] * len(requests), use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        use_tqdm: bool = True,
    ) -> NDArray[np.float32]:
        """Computes one vector of length 1 per prompt from the model's last hidden states.

        Args:
            prompts: strings or lists of token ids, or a single one.
            pooling: "mean" over a prompt's tokens, or "last"; default ``embedding_pooling``.
            use_tqdm: show progress on standard error.

        Returns:
            [prompts, hidden], in the order of the prompts.

        Raises:
            RequestError: a prompt is wrong; nothing was computed.
        """
        texts = _as_list(prompts)
        if not texts:
            return np.empty((0, 0), np.float32)
        kind = pooling_named(pooling, self._engine.config)
        requests = [
            _named(number, partial(self._engine.prepare_embedding, prompt, kind))
            for number, prompt in enumerate(texts)
        ]
        return np.stack([embedding(each) for each in self._finished(requests, use_tqdm)])

    def sleep(self, level: int = 1) -> None:
        """Frees the memory of the weights and the KV cache, until :meth:`wake_up`.

        Args:
            level: 1 or 2; 0 frees nothing.

        Raises:
            RequestError: the level is wrong.
        """
        with self._engine.generations.commands.falling_asleep():
            # Between two calls there is no sequence that the mode could concern.
            for action in sleep_actions(level, "keep"):
                self._command(action)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Restores memory; the engine is awake when all of it is restored.

        The weights are read again from the files that they came from. If these are gone, the engine
        wakes up after :meth:`update_weights`.

        Args:
            tags: "weights", "kv_cache" or both; default both.

        Raises:
            RequestError: there is no such tag.
            Conflict: the memory is restored, but there are no weights to run.
        """
        for action in wake_up_actions(self._engine.generations.commands, tags):
            self._command(action)

    def reset_prefix_cache(self) -> None:
        """Drops every cached page."""
        self._command(FlushCache())

    def update_weights(self, path: Weights) -> int:
        """Replaces all weights of the model.

        Args:
            path: a directory with safetensors files, one such file, or a list of them. Together
                they have every tensor, under the names of the model's own checkpoint. They must
                not be written to before this returns.

        Returns:
            The version of the new weights: the first ones are 0, and each update makes the next.

        Raises:
            RequestError: the files cannot be these weights; nothing has changed.
            Conflict: the memory of the weights is released.
        """
        files = weights_of(path)
        update = self._engine.generations.update_weights
        return self._carry_out(partial(update, files)).weights_version

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer in use."""
        return self._engine.tokenizer

    @property
    def num_preemptions(self) -> int:
        """How many times a running sequence was preempted since the start."""
        return self._engine.num_preemptions

    def close(self) -> None:
        """Frees the model and the cache. The engine cannot be used afterwards."""
        self._engine.close()
        self._loop.close(self._store.close())

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- the loop ---------------------------------------------------------------------------------

    def _run(
        self, requests: list[PreparedRequest], prompts: list[str | None], use_tqdm: bool
    ) -> list[RequestOutput]:
        return [
            request_output(generation, prompt, self._engine.tokenizer)
            for generation, prompt in zip(self._finished(requests, use_tqdm), prompts, strict=True)
        ]

    def _finished(self, requests: list[PreparedRequest], use_tqdm: bool) -> list[Generation]:
        with self._lock:
            self._check_awake()
            changed: list[int] = []  # numbers of generations that may have finished
            generations = [
                self._engine.generations.start(request, on_change=partial(changed.append, number))
                for number, request in enumerate(requests)
            ]
            try:
                with _deferred_interrupt() as interrupted:
                    self._drive(generations, changed, interrupted, use_tqdm)
            except BaseException:
                self._abandon(generations)
                raise
            return generations

    def _drive(
        self,
        generations: list[Generation],
        changed: list[int],
        interrupted: threading.Event,
        use_tqdm: bool,
    ) -> None:
        """Runs the engine until all generations have finished, or Ctrl-C was pressed."""
        tokens_before, started = self._engine.num_generated_tokens, time.perf_counter()
        unfinished = set(range(len(generations)))
        with tqdm(
            total=len(generations), desc="Processed prompts", unit="prompt", disable=not use_tqdm
        ) as bar:
            while unfinished:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                self._engine.step()
                for number in changed:
                    generation = generations[number]
                    if generation.error is not None:
                        raise generation.error
                    if generation.finished and number in unfinished:
                        unfinished.remove(number)
                        bar.update()
                if changed:
                    changed.clear()
                    num_tokens = self._engine.num_generated_tokens - tokens_before
                    speed = num_tokens / (time.perf_counter() - started)
                    bar.set_postfix_str(f"{speed:.0f} output tokens/s", refresh=False)

    @contextlib.contextmanager
    def _behind(
        self, cartridges: Sequence[CartridgeLike] | CartridgeLike | None
    ) -> Iterator[Prefix | None]:
        """What comes before prompts, as long as the block lasts."""
        specs = specs_of(cartridges)
        if not specs:
            yield None
            return
        known = self._engine.cartridges
        versions = self._loop.run(known.resolve(specs))
        outcome: list[TokasaurusError | None] = []
        with self._lock, _deferred_interrupt() as interrupted:
            self._check_awake()
            lease = known.enter(specs, versions, outcome.append)
            while not outcome:
                self._engine.step()
        try:
            if interrupted.is_set():
                raise KeyboardInterrupt
            if outcome[0] is not None:
                raise outcome[0]
            yield lease.prefix
        finally:
            with self._lock:
                lease.release()

    def _check_awake(self) -> None:
        commands = self._engine.generations.commands
        if commands.is_paused or commands.released:
            raise Conflict("the engine is asleep and computes nothing; call wake_up() first")

    def _command(self, action: Action) -> CommandDone:
        return self._carry_out(partial(self._engine.generations.command, action))

    def _carry_out(self, submit: Callable[[OnDone], None]) -> CommandDone:
        """Runs the engine until it has answered a command; Ctrl-C works only afterwards."""
        with self._lock, _deferred_interrupt() as interrupted:
            results: list[CommandDone | TokasaurusError] = []
            submit(results.append)
            while not results:
                self._engine.step()
        if interrupted.is_set():
            raise KeyboardInterrupt
        (result,) = results
        if isinstance(result, TokasaurusError):
            raise result
        return result

    def _abandon(self, generations: list[Generation]) -> None:
        """Ends the running requests after an interrupt, so that the engine can be used again."""
        for generation in generations:
            self._engine.generations.abort(generation)
        while not (self._engine.closed or self._engine.idle):
            self._engine.step()


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Makes Ctrl-C set an event: to break off a batch half-way would ruin the engine's state."""
    interrupted = threading.Event()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals interrupt only the main thread
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _named(number: int, prepare: Callable[[], PreparedRequest]) -> PreparedRequest:
    """Prepares a prompt; an error says which one it is about."""
    try:
        return prepare()
    except RequestError as error:
        raise type(error)(f"prompt number {number}: {error.message}", error.field) from None


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # one prompt: a string, or its ids
    return list(prompts)  # type: ignore[arg-type]


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"{len(params)} sampling_params for {num_prompts} prompts; give one, or one for each",
            "sampling_params",
        )
    return list(params)
