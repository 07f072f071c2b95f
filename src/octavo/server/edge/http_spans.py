"""HttpSpans: an OpenTelemetry span for each request of a client, which joins the client's trace (docs/tracing.md)."""

from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from .access_log import RequestRecord

Header = tuple[bytes, bytes]
TRACERESPONSE = b"traceresponse"  # of the W3C's draft for responses, as OpenTelemetry sends it
_PROPAGATOR = TraceContextTextMapPropagator()


class HttpSpans:
    """An ASGI application that makes spans of the POST requests to `app`, current while `app` handles them.

    A span is the child of the one in the request's header `traceparent`, and sampled if that one is. The response names
    it in the header `traceresponse`.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer):
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        record = RequestRecord.of(scope)
        parent = _PROPAGATOR.extract(scope["headers"], getter=_Headers())
        span = self._tracer.start_span("POST", context=parent, kind=SpanKind.SERVER)
        context = span.get_span_context()
        if context.is_valid:  # unless OTEL_SDK_DISABLED is set
            value = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            record.response_headers.append((TRACERESPONSE, value.encode()))
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(scope, receive, send)
        finally:
            if span.is_recording():
                _describe(span, scope, record)
            span.end()


class _Headers(Getter[list[Header]]):
    """Reads the header fields of an ASGI request."""

    def get(self, carrier: list[Header], key: str) -> list[str] | None:
        name = key.encode()
        return [value.decode("latin-1") for field, value in carrier if field == name] or None

    def keys(self, carrier: list[Header]) -> list[str]:
        return [field.decode("latin-1") for field, _ in carrier]


def _describe(span: Span, scope: Scope, record: RequestRecord) -> None:
    """Set the attributes of OpenTelemetry's conventions for HTTP servers, when the response has ended."""
    endpoint = scope.get("endpoint")
    attributes: dict[str, str | int | None] = {
        "http.request.method": "POST",
        "url.path": scope["path"],
        "http.route": getattr(endpoint, "path", None),
        "http.response.status_code": record.status or None,
        "octavo.request_id": record.id,
        "octavo.tenant": record.tenant or None,
        "error.type": record.error,
    }
    if route := attributes["http.route"]:
        span.update_name(f"POST {route}")
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    if record.status >= 500 or (record.error and not 400 <= record.status < 500):
        span.set_status(Status(StatusCode.ERROR, record.error or ""))
