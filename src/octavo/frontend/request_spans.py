"""RequestSpans: make an OpenTelemetry span of each request, with the names of vLLM's attributes (docs/tracing.md)."""

import time

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from octavo.tracing.request_events import ADMITTED, CHUNK, RequestEvent

from .live import LiveRequest
from .replica import Replica

NAME = "llm_request"


class RequestSpans:
    """A RequestWatcher that makes spans of one model's requests.

    The parent of a span is the current one of the task, or thread, that makes the request.
    """

    def __init__(self, tracer: Tracer, model: str):
        self._tracer, self._model = tracer, model
        self._spans: dict[LiveRequest, Span] = {}

    def engine_ready(self, replica: Replica) -> None:
        pass

    def engine_lost(self, replica: Replica, reason: str) -> None:
        """Note the loss in the spans of the requests that the engine served."""
        for live, span in self._spans.items():
            if live.replica is replica:
                span.add_event("engine lost", {"engine": replica.number, "reason": reason})

    def engine_times(self, records: bytes) -> None:
        pass

    def arrived(self, live: LiveRequest, reply_id: str) -> None:
        """Start the span of a request. Only requests that are sampled have one."""
        start = int(live.metrics.arrival_time * 1e9)
        span = self._tracer.start_span(NAME, kind=SpanKind.SERVER, start_time=start)
        if span.is_recording():
            span.set_attributes(self._asked(live, reply_id))
            self._spans[live] = span

    def sent(self, live: LiveRequest, replica: Replica) -> None:
        """Note that a request is queued in an engine, for the first time or again."""
        if span := self._spans.get(live):
            span.add_event("moved" if live.was_sent else "queued", {"engine": replica.number})

    def happened(self, live: LiveRequest, replica: Replica, event: RequestEvent) -> None:
        """Note that a completion was admitted or preempted. There may be too many chunks for a span."""
        if (span := self._spans.get(live)) is None or event.name == CHUNK:
            return
        ago = max(time.monotonic() - event.time, 0.0)
        happened = max(time.time() - ago, live.metrics.arrival_time)  # an engine may have another clock
        attributes: dict[str, str | int] = {"engine": replica.number, "sequence": event.sequence}
        if event.name == ADMITTED:
            attributes["cached_tokens"] = event.tokens
        span.add_event(event.name, attributes, int(happened * 1e9))

    def first_token(self, live: LiveRequest) -> None:
        """Note that a request has got its first token."""
        if span := self._spans.get(live):
            span.add_event("first token")

    def ended(self, live: LiveRequest, reason: str | None = None) -> None:
        """End the span of a request. Its status is an error unless the output is complete or was aborted."""
        if (span := self._spans.pop(live, None)) is None:
            return
        reasons = [completion.finish_reason or reason or "" for completion in live.completions]
        span.set_attribute("gen_ai.response.finish_reasons", reasons)
        span.set_attributes(_measured(live))
        if reason is not None and reason != "aborted":
            span.set_attribute("error.type", reason.partition(":")[0])
            span.set_status(Status(StatusCode.ERROR, reason))
        span.end()

    def close(self) -> None:
        pass

    def _asked(self, live: LiveRequest, reply_id: str) -> dict[str, str | int | float]:
        """Return the attributes of what a request asks for."""
        params, tenant = live.params, live.completions[0].request.tenant
        attributes: dict[str, str | int | float | None] = {
            "gen_ai.request.id": reply_id or live.id,
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": len(live.prompt_token_ids),
            "octavo.tenant": tenant or None,
        }
        return {name: value for name, value in attributes.items() if value is not None}


def _measured(live: LiveRequest) -> dict[str, int | float]:
    """Return the attributes of a request that has ended: its tokens and, in seconds, what it spent its time on."""
    metrics, first = live.metrics, live.metrics.time_to_first_token
    e2e = time.monotonic() - live.arrival
    attributes: dict[str, int | float] = {
        "gen_ai.usage.completion_tokens": live.num_tokens,
        "gen_ai.usage.cached_tokens": metrics.cached_tokens,
        "gen_ai.latency.e2e": e2e,
    }
    if (queued := metrics.time_in_queue) is not None:
        attributes["gen_ai.latency.time_in_queue"] = queued
    if first is not None:
        attributes["gen_ai.latency.time_to_first_token"] = first
        attributes["gen_ai.latency.time_in_model_prefill"] = first - (queued or 0.0)
        attributes["gen_ai.latency.time_in_model_decode"] = e2e - first
        attributes["gen_ai.latency.time_in_model_inference"] = e2e - (queued or 0.0)
    return attributes
