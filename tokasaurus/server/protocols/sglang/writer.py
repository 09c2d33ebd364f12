"""Answers in the words of SGLang.

Every event of a stream carries the whole text so far. A prompt's first token has no logprob; a
null stands for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tokasaurus.errors import RequestError
from tokasaurus.server.operations.heavy_work import takes_long
from tokasaurus.server.operations.logprobs import finite
from tokasaurus.server.operations.writer import DONE, StreamWriter, event
from tokasaurus.server.protocols.sglang.request import SglangRequest
from tokasaurus.text.generation import Generation
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.samples import SampleOutput, TokenLogprobs, joined_runs
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["SglangWriter"]


class _Sample:
    """What a stream has sent of one sample so far."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.weights_versions: list[tuple[int, int]] = []

    def extend(self, output: SampleOutput) -> SampleOutput:
        """All output so far, as if it had come at once."""
        self.text.append(output.text)
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        self.weights_versions = joined_runs(self.weights_versions, output.weights_versions)
        return SampleOutput(
            output.index,
            "".join(self.text),
            self.token_ids,
            TokenLogprobs.join(self.logprobs) if self.logprobs else None,
            output.finish_reason,
            self.weights_versions,
        )


class SglangWriter(StreamWriter):
    """Writes the answer: an object for each sample, in a list unless there is only one.

    Args:
        request: what was asked.
        prepared: the prompts.
        tokenizer: spells tokens for logprobs.

    Attributes:
        ids: the names of the prompts.
    """

    def __init__(
        self, request: SglangRequest, prepared: Sequence[PreparedRequest], tokenizer: Tokenizer
    ) -> None:
        count = len(prepared)
        self._tokenizer = tokenizer
        self._with_text = bool(request.return_text_in_logprobs)
        self._starts = request.per_prompt("logprob_start_len", count, -1)
        rid = request.rid or request.answer_id("")
        if isinstance(rid, str) and count > 1:
            rid = [f"{rid}_{position}" for position in range(count)]
        self.ids = [rid] if isinstance(rid, str) else rid
        self.answer_id = self.ids[0] if self.ids else ""
        if len(self.ids) != count:
            raise RequestError(f"rid has {len(self.ids)} entries for {count} prompts", "rid")
        self._is_single = request.is_single and prepared[0].params.n == 1
        self._with_logprobs = any(each.params.logprobs is not None for each in prepared)
        self._num_before: list[int] = []  # for each prompt, the samples of the prompts before it
        num_samples = 0
        for each in prepared:
            self._num_before.append(num_samples)
            num_samples += int(each.params.n)
        self._streamed: dict[int, _Sample] = {}
        self._started_at = time.monotonic()

    def takes_long(self, generations: Sequence[Generation]) -> bool:
        return takes_long(generations, self._with_logprobs)

    def whole(self, generations: Sequence[Generation]) -> bytes:
        answers = [
            self._answer(generation, position, output)
            for position, generation in enumerate(generations)
            for output in generation.take_all()
        ]
        return msgspec.json.encode(answers[0] if self._is_single else answers)

    def chunk(
        self, generations: Sequence[Generation], position: int, output: SampleOutput
    ) -> bytes:
        index = self._num_before[position] + output.index
        so_far = self._streamed.setdefault(index, _Sample()).extend(output)
        answer = self._answer(generations[position], position, so_far)
        if not self._is_single:
            answer["index"] = index
        if output.finish_reason is not None:
            del self._streamed[index]
        return event(answer)

    def end(self, generations: Sequence[Generation]) -> bytes:
        return DONE

    def _answer(
        self, generation: Generation, position: int, output: SampleOutput
    ) -> dict[str, Any]:
        meta_info: dict[str, Any] = {
            "id": self.ids[position],
            "finish_reason": self._finish_reason(generation, output),
            "prompt_tokens": generation.num_prompt_tokens,
            "completion_tokens": len(output.token_ids),
            "cached_tokens": generation.num_cached_tokens,
            "e2e_latency": time.monotonic() - self._started_at,
        }
        if not generation.weights.are_original:  # SGLang says the label of its last token's
            versions = output.weights_versions
            version = versions[-1][0] if versions else generation.weights.version
            meta_info["weight_version"] = generation.weights.label(version)
        num_top = generation.request.params.logprobs
        if num_top is not None:
            chosen, top = self._logprobs(output.token_ids, output.logprobs)
            prompt_chosen, prompt_top = self._prompt_logprobs(generation, self._starts[position])
            meta_info["input_token_logprobs"] = prompt_chosen
            meta_info["output_token_logprobs"] = chosen
            if num_top > 0:
                meta_info["input_top_logprobs"] = prompt_top
                meta_info["output_top_logprobs"] = top
        return {"text": output.text, "output_ids": output.token_ids, "meta_info": meta_info}

    def _prompt_logprobs(self, generation: Generation, start: int) -> tuple[list[Any], list[Any]]:
        values = generation.prompt_logprobs
        if values is None:
            return [], []
        ids = generation.request.prompt_ids.tolist()
        chosen, top = self._logprobs(ids[1:], values)
        return [self._entry(None, ids[0]), *chosen][start:], [None, *top][start:]

    def _logprobs(
        self, token_ids: Sequence[int], values: TokenLogprobs | None
    ) -> tuple[list[Any], list[Any]]:
        """The logprobs of each token, and of the likeliest tokens in its place."""
        if values is None:
            return [], []
        logprobs = finite(values.logprobs)
        chosen = [self._entry(*each) for each in zip(logprobs, token_ids, strict=True)]
        rows = zip(finite(values.top_logprobs), values.top_ids.tolist(), strict=True)
        return chosen, [[self._entry(*each) for each in zip(*row, strict=True)] for row in rows]

    def _entry(self, logprob: float | None, token_id: int) -> tuple[float | None, int, str | None]:
        text = self._tokenizer.token_text(token_id) if self._with_text else None
        return logprob, token_id, text

    def _finish_reason(self, generation: Generation, output: SampleOutput) -> dict[str, Any] | None:
        if output.finish_reason is None:
            return None
        if output.finish_reason == "length":
            return {"type": "length", "length": generation.request.max_tokens}
        if output.finish_reason != "stop":
            return {"type": "abort"}
        request, ids = generation.request, output.token_ids
        if ids and ids[-1] in request.stop_token_ids:
            return {"type": "stop", "matched": ids[-1]}
        return {"type": "stop", "matched": self._matched(ids, request.params.stop_strings)}

    def _matched(self, token_ids: Sequence[int], stops: Sequence[str]) -> str | None:
        """The stop string that the last token completed; of several, the one that begins first.

        ``TextStream`` chooses the same one.
        """
        pieces = [self._tokenizer.spelled[token_id] for token_id in token_ids]
        text = b"".join(pieces)
        before = len(text) - len(pieces[-1]) if pieces else 0
        found = []
        for stop in stops:
            spelled = stop.encode()
            # One that was complete earlier is plain text, because of min_new_tokens.
            begin = text.find(spelled, max(0, before - len(spelled) + 1))
            if begin >= 0:
                found.append((begin, -len(spelled), stop))
        return min(found)[2] if found else None
