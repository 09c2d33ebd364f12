"""The table of all operations: what a client can ask of the engine, by path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tokasaurus.server.operations.operation import Operation
from tokasaurus.server.protocols.chat.operation import CHAT
from tokasaurus.server.protocols.completions.operation import COMPLETIONS
from tokasaurus.server.protocols.embeddings import EMBEDDINGS
from tokasaurus.server.protocols.generate import GENERATE
from tokasaurus.server.protocols.responses.operation import RESPONSES

__all__ = ["BATCH_OR_CHAT", "OPERATIONS"]

BATCH_OR_CHAT = "/batch/cartridge/chat/completions"
"""Takes a chat, or many as ``/custom/synchronous-batch-completions`` does."""

# Names under which clients of cartridges know an operation. All of them take the same requests.
_OTHER_NAMES = {
    "/custom/cartridge/completions": COMPLETIONS,
    "/v1/cartridge/completions": COMPLETIONS,
    "/custom/cartridge/chat/completions": CHAT,
    "/v1/cartridge/chat/completions": CHAT,
    BATCH_OR_CHAT: CHAT,
}

OPERATIONS: Mapping[str, Operation] = {
    **{each.path: each for each in (COMPLETIONS, CHAT, EMBEDDINGS, GENERATE, RESPONSES)},
    **{path: dataclasses.replace(each, path=path) for path, each in _OTHER_NAMES.items()},
}
