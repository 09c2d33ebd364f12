"""The trace of one request, in the words of OpenTelemetry's conventions for generative AI.

::

    chat MODEL      ├──────────────────────────────────────────────┤
      prepare       ├────┤                                             reading, tokenizing
      queue              ├─────────┤                                   until its first sample runs
      prefill                      ├────────┤                          until its first token
      decode                                ├──────────────────────┤

Times between the beginning and the end are those at which the manager's reports arrive here. A
request with several prompts has one span of each kind: until the first of them runs, and so on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tokasaurus.observability.request_names import current_request
from tokasaurus.observability.tracing import Span, Tracing
from tokasaurus.protocol.messages import Stage
from tokasaurus.text.generation import Generation
from tokasaurus.text.preparation import PreparedRequest

__all__ = ["RequestTrace", "begin_trace"]

_MAX_MODEL_CHARS = 256  # clients can invent long names


def begin_trace(
    tracing: Tracing | None, kind: str, body: Any, model: str, headers: Mapping[str, str]
) -> RequestTrace | None:
    """Begins the trace of a request; None if there are no traces, or it is not sampled.

    Args:
        tracing: None if there are no traces.
        kind: of operation, such as "chat".
        body: of the request, of any shape.
        model: the engine's, which answers whatever the request names.
        headers: ``traceparent`` and ``tracestate`` of the request, if it has them.
    """
    if tracing is None:
        return None
    named = body.get("model") if isinstance(body, dict) else None
    named = named[:_MAX_MODEL_CHARS] if isinstance(named, str) else model
    started_ns = time.time_ns()
    attributes = {
        "gen_ai.operation.name": kind,
        "gen_ai.provider.name": "tokasaurus",
        "gen_ai.request.model": named,
        "gen_ai.response.model": model,
    }
    if current_request():
        attributes["tokasaurus.request_id"] = current_request()
    span = tracing.begin(f"{kind} {named}", headers, attributes, started_ns)
    return None if span is None else RequestTrace(tracing, span, started_ns)


class RequestTrace:
    """The trace of one request. ``end`` must be called, and may be called again.

    Args:
        tracing: makes the spans.
        span: of the request.
        started_ns: when it came.
    """

    def __init__(self, tracing: Tracing, span: Span, started_ns: int) -> None:
        self._tracing = tracing
        self._span: Span | None = span
        self._started_ns = started_ns
        self._sent_ns: int | None = None
        self._admitted_ns: int | None = None
        self._first_token_ns: int | None = None
        self._streams = False

    def send(self, prompts: Sequence[PreparedRequest], *, streams: bool) -> None:
        """The request's prompts go to the manager now."""
        self._sent_ns = time.time_ns()
        self._streams = streams
        if self._span is not None:
            self._span.set_attributes(_parameters(prompts))
            self._span.set_attribute("gen_ai.request.stream", streams)

    def reach(self, stage: Stage) -> None:
        """The manager says that a prompt of the request has reached a stage."""
        now_ns = time.time_ns()
        if stage is Stage.ADMITTED:
            self._admitted_ns = self._admitted_ns or now_ns
        elif stage is Stage.FIRST_TOKEN:
            self._first_token_ns = self._first_token_ns or now_ns
        elif self._span is not None:
            self._span.add_event("preempted", timestamp=now_ns)

    def end(
        self,
        generations: Sequence[Generation] = (),
        answer_id: str = "",
        error: BaseException | None = None,
    ) -> None:
        """The request has ended.

        Args:
            generations: of its prompts.
            answer_id: the id of the answer; "" if it has none.
            error: that ended it; None if none did.
        """
        span, self._span = self._span, None
        if span is None:
            return
        end_ns = time.time_ns()
        self._add_parts(span, end_ns)
        if error is None:
            error = next((each.error for each in generations if each.error is not None), None)
        attributes = self._outcome(generations)
        if answer_id and error is None:
            attributes["gen_ai.response.id"] = answer_id
        self._tracing.end(span, end_ns, attributes, error)

    def _add_parts(self, span: Span, end_ns: int) -> None:
        marks = (self._started_ns, self._sent_ns, self._admitted_ns, self._first_token_ns)
        names = ("prepare", "queue", "prefill", "decode")
        for name, start_ns, next_ns in zip(names, marks, (*marks[1:], None), strict=True):
            if start_ns is None:
                return
            self._tracing.add_part(span, name, start_ns, end_ns if next_ns is None else next_ns)

    def _outcome(self, generations: Sequence[Generation]) -> dict[str, Any]:
        samples = [sample for generation in generations for sample in generation.samples]
        outcome: dict[str, Any] = {
            "gen_ai.usage.input_tokens": sum(each.num_prompt_tokens for each in generations),
            "gen_ai.usage.output_tokens": sum(each.num_generated_tokens for each in generations),
            "gen_ai.usage.cache_read.input_tokens": sum(
                each.num_cached_tokens for each in generations
            ),
        }
        reasons = [sample.finish_reason for sample in samples if sample.finish_reason is not None]
        if reasons:
            outcome["gen_ai.response.finish_reasons"] = reasons
        if self._first_token_ns is not None:
            seconds = (self._first_token_ns - self._started_ns) / 1e9
            outcome["tokasaurus.time_to_first_token"] = seconds
            if self._streams:
                outcome["gen_ai.response.time_to_first_chunk"] = seconds
        return outcome


def _parameters(prompts: Sequence[PreparedRequest]) -> dict[str, Any]:
    """How the request is sampled; its prompts have that in common."""
    prompt = prompts[0]
    params, sampling = prompt.params, prompt.sampling
    found: dict[str, Any] = {
        "gen_ai.request.max_tokens": prompt.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": prompt.seed,
    }
    if sampling.top_k:
        found["gen_ai.request.top_k"] = sampling.top_k
    if params.n != 1:
        found["gen_ai.request.choice.count"] = int(params.n)
    adjustments = sampling.adjustments
    if adjustments is not None:
        found["gen_ai.request.frequency_penalty"] = adjustments.frequency_penalty
        found["gen_ai.request.presence_penalty"] = adjustments.presence_penalty
    return found
