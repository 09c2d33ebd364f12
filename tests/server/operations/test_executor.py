"""An engine that changes while a request is prepared: the right error comes, and nothing runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import PREPARER, TOKENIZER, with_config

from tokasaurus.errors import EngineDead, EngineError, EngineNotReady, EngineOverloaded
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import SamplingParams

COMPLETIONS = "/v1/completions"


class Engine:
    """A ready engine with room for one request, and a request during which something happens."""

    def __init__(self, happens: Callable[[Engine], object]) -> None:
        self.sent: list[Any] = []
        self.generations = Generations(
            with_config(max_queued_requests=1), TOKENIZER, self.sent.append
        )
        self.state = EngineState()
        self.state.ready(PREPARER, self.generations)
        operation = OPERATIONS[COMPLETIONS]

        def prepare(request: Any, preparer: Any) -> Any:
            task = operation.prepare(request, preparer)
            happens(self)
            return task

        self.operation = replace(operation, prepare=prepare)

    def ask(self) -> None:
        executor = Executor(self.state, {COMPLETIONS: self.operation})

        async def ask() -> None:
            with await executor.execute(self.operation, {"prompt": "one"}, lambda user: "me", 0):
                pass

        asyncio.run(ask())

    def fill(self) -> None:
        prompt = PREPARER.prepare([70], SamplingParams())
        self.generations.start(prompt, client="me")
        self.sent.clear()


@pytest.mark.parametrize(
    ("happens", "error", "said"),
    [
        pytest.param(lambda e: e.state.die("by fire"), EngineDead, "by fire", id="it dies"),
        pytest.param(lambda e: e.state.drain(), EngineNotReady, "shutting down", id="it drains"),
        pytest.param(Engine.fill, EngineOverloaded, "max_queued_requests=1", id="it fills up"),
    ],
)
def test_an_engine_that_changes_while_a_prompt_is_tokenized(
    happens: Callable[[Engine], object], error: type[EngineError], said: str
):
    engine = Engine(happens)
    with pytest.raises(error, match=said):
        engine.ask()
    assert engine.sent == []


def test_an_engine_is_asked_twice_whether_it_serves(monkeypatch: pytest.MonkeyPatch):
    engine, asked = Engine(lambda e: None), []
    monkeypatch.setattr(engine.state, "check", lambda: asked.append(True))
    engine.ask()
    assert len(asked) == 2
    assert len(engine.sent) == 2  # the request, and its end
