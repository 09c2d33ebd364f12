"""The operation ``/v1/completions``."""

from __future__ import annotations

from tokasaurus.server.operations.operation import Operation, Task
from tokasaurus.server.protocols.completions.request import CompletionRequest
from tokasaurus.server.protocols.completions.writer import CompletionWriter
from tokasaurus.text.preparation import Preparer

__all__ = ["COMPLETIONS"]


def _prepare(request: CompletionRequest, preparer: Preparer) -> Task:
    """Continues prompts."""
    tokenizer, config = preparer.tokenizer, preparer.config
    given = request.prompts()
    # A cartridge begins with the BOS token that the model expects.
    special = request.add_special_tokens
    if special is None:
        special = preparer.prefix is None
    ids = [
        tokenizer.encode(each, add_special_tokens=special) if isinstance(each, str) else each
        for each in given
    ]
    prompts = [
        preparer.prepare(each, request.params_for(len(each), preparer.max_request_tokens))
        for each in ids
    ]
    echoes = None
    if request.echo:  # ``prepare`` has refused ids beyond the vocabulary, so all of them decode
        echoes = [e if isinstance(e, str) else tokenizer.decode_prompt(e) for e in given]
    writer = CompletionWriter(request, config.model_name, tokenizer, echoes)
    return Task(request, prompts, writer, writer if request.stream else None)


def _num_characters(request: CompletionRequest) -> int:
    prompts = request.prompts()
    return sum(map(len, prompts)) + len(prompts) * request.num_bad_word_characters


COMPLETIONS = Operation(
    "/v1/completions", "text_completion", CompletionRequest, _num_characters, _prepare
)
