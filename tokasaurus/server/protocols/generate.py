"""The operation ``/generate``: two shapes of request, told apart by the name of the prompt."""

from __future__ import annotations

from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.protocols.native import NativeRequest, NativeWriter, prepare_native
from tokasaurus.server.protocols.sglang.request import SglangRequest, prepare_sglang
from tokasaurus.server.protocols.sglang.writer import SglangWriter
from tokasaurus.text.preparation import Preparer

__all__ = ["GENERATE"]


def _prepare(request: NativeRequest | SglangRequest, preparer: Preparer) -> Task:
    """Continues prompts, in the engine's own protocol or in SGLang's."""
    if isinstance(request, NativeRequest):
        prompts = [prepare_native(request, preparer)]
        writer = NativeWriter(request, preparer.config.model_name)
        return Task(request, prompts, writer, writer if request.stream else None)
    prompts = prepare_sglang(request, preparer)
    answer = SglangWriter(request, prompts, preparer.tokenizer)
    return Task(request, prompts, answer, answer if request.stream else None, answer.ids)


def _num_characters(request: NativeRequest | SglangRequest) -> int:
    if isinstance(request, NativeRequest):
        return len(request.prompt) + len(request.system or "") + request.num_bad_word_characters
    return sum(map(len, request.prompts()))


GENERATE = Operation(
    "/generate",
    "text_completion",
    NativeRequest,
    _num_characters,
    _prepare,
    alternatives=(SglangRequest,),
)
