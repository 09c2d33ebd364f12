from __future__ import annotations

import pytest
from fake_engine import CONFIG, TOKENIZER, FakeEngine

from tokasaurus.text.generations import Generations


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def core(fake: FakeEngine) -> Generations:
    """A text core on the fake engine, without HTTP."""
    return Generations(CONFIG, TOKENIZER, fake.send)
