"""The table of all operations: what a client can ask of the engine, by path."""

from __future__ import annotations

from collections.abc import Mapping

from tokasaurus.server.operations.operation import Operation
from tokasaurus.server.protocols.chat.operation import CHAT
from tokasaurus.server.protocols.completions.operation import COMPLETIONS
from tokasaurus.server.protocols.embeddings import EMBEDDINGS
from tokasaurus.server.protocols.generate import GENERATE
from tokasaurus.server.protocols.responses.operation import RESPONSES

__all__ = ["OPERATIONS"]

OPERATIONS: Mapping[str, Operation] = {
    each.path: each for each in (COMPLETIONS, CHAT, EMBEDDINGS, GENERATE, RESPONSES)
}
