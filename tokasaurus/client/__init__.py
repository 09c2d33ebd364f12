"""The client of a running engine, or of one in this process.

    from tokasaurus.client import Client

    with Client("http://127.0.0.1:10210") as client:
        answer = client.chat("What is 3 + 4?", temperature=0, logprobs=5)
        print(answer.text, answer.token_ids, answer.logprobs.chosen)

Errors are those of ``tokasaurus.errors``. Nothing here loads torch, except for an embedded engine.
"""

from __future__ import annotations

from tokasaurus.client.async_client import AsyncClient, AsyncStream
from tokasaurus.client.client import Client, Stream
from tokasaurus.client.results import (
    Answer,
    Batch,
    BatchResult,
    Cartridge,
    Choice,
    Health,
    Logprobs,
    Model,
    Piece,
    StoredFile,
    ToolCall,
    Usage,
    WeightsVersion,
)
from tokasaurus.client.retrying import RetryPolicy

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Batch",
    "BatchResult",
    "Cartridge",
    "Choice",
    "Client",
    "Health",
    "Logprobs",
    "Model",
    "Piece",
    "RetryPolicy",
    "StoredFile",
    "Stream",
    "ToolCall",
    "Usage",
    "WeightsVersion",
]
