"""A small OpenTelemetry collector: takes spans over OTLP/HTTP and keeps them."""

import gzip
import queue
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class Span:
    """A span as it arrived. Times are in seconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: float
    end: float
    attributes: dict[str, Any]
    events: list[tuple[str, float, dict[str, Any]]]
    is_error: bool
    message: str
    resource: dict[str, Any]


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def spans_of(body: bytes) -> list[Span]:
    """The spans of an OTLP request."""
    request = ExportTraceServiceRequest.FromString(body)
    return [
        Span(
            each.name, each.trace_id.hex(), each.span_id.hex(), each.parent_span_id.hex(), each.kind,
            each.start_time_unix_nano / 1e9, each.end_time_unix_nano / 1e9, _attributes(each.attributes),
            [(event.name, event.time_unix_nano / 1e9, _attributes(event.attributes)) for event in each.events],
            each.status.code == 2, each.status.message, _attributes(group.resource.attributes),
        )
        for group in request.resource_spans for scope in group.scope_spans for each in scope.spans
    ]  # fmt: skip


class OtlpReceiver:
    """Listens on a free port, or on `port`, for a `with` block. `paths` are those of the requests."""

    def __init__(self, port: int = 0) -> None:
        self.paths: list[str] = []
        self._arrived: queue.SimpleQueue[Span] = queue.SimpleQueue()
        self._spans: list[Span] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.paths.append(self.path)
                for span in spans_of(body):
                    receiver._arrived.put(span)
                reply = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait(self, is_wanted: Any, count: int = 1, seconds: float = 20) -> list[Span]:
        """The spans for which `is_wanted` is true, as soon as there are `count` of them."""
        deadline = time.monotonic() + seconds
        while len(found := [span for span in self._spans if is_wanted(span)]) < count:
            try:
                self._spans.append(self._arrived.get(timeout=max(deadline - time.monotonic(), 0.01)))
            except queue.Empty:
                names = [span.name for span in self._spans]
                raise AssertionError(f"{len(found)} of {count} spans arrived; all: {names}") from None
        return found
