"""The operation ``/generate``: two shapes of request, which are told apart by what the prompt is called."""

from __future__ import annotations

from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.protocols.native import NativeRequest, NativeWriter, prepare_native
from tokasaurus.server.protocols.sglang.request import SglangRequest, prepare_sglang
from tokasaurus.server.protocols.sglang.writer import SglangWriter
from tokasaurus.text.preparation import Preparer

__all__ = ["GENERATE"]


def _prepare(body: NativeRequest | SglangRequest, preparer: Preparer) -> Task:
    """Continues prompts, in the engine's own protocol or in SGLang's."""
    if isinstance(body, NativeRequest):
        model = preparer.config.model_name
        return Task(body, [prepare_native(body, preparer)], NativeWriter(body, model))
    prepared = prepare_sglang(body, preparer)
    return Task(body, prepared, SglangWriter(body, prepared, preparer.tokenizer))


def _num_characters(body: NativeRequest | SglangRequest) -> int:
    if isinstance(body, NativeRequest):
        return len(body.prompt) + len(body.system or "") + body.num_bad_word_characters
    return sum(map(len, body.prompts()))


GENERATE = Operation(
    "/generate", NativeRequest, _num_characters, _prepare, alternatives=(SglangRequest,)
)
