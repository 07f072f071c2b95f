"""Spans: send OpenTelemetry spans to a collector, in a thread, so that no request waits for it (docs/tracing.md)."""

import logging
import os
from collections.abc import Sequence
from threading import Thread
from urllib.parse import urlsplit

from octavo.errors import ConfigError
from octavo.version import __version__

try:
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.trace import Tracer
except ImportError:
    raise ConfigError("--otlp-endpoint needs OpenTelemetry: pip install 'octavo[otel]'") from None

CLOSE_SECONDS = 2.0
PROTOCOLS = ("http/protobuf", "grpc")
DEFAULT_PATH = "/v1/traces"
_SENDING = "opentelemetry.exporter.otlp"  # the logger of all exporters
_QUEUE = "opentelemetry.sdk._shared_internal"

log = logging.getLogger("octavo")


class Spans:
    """Makes spans, and sends them to the collector at `endpoint`. Raises ConfigError if a package for it is missing.

    They are queued, 2,048 at most: a collector that does not answer, or is slow, costs no more than older spans. The
    environment variables OTEL_... of OpenTelemetry's SDK set the rest, such as the protocol, headers and sampling.
    """

    def __init__(self, endpoint: str):
        self._warning = _OneWarning(endpoint)
        _replace_logging(self._warning)
        exporter = _Exporter(_exporter(endpoint), self._warning)
        resource = Resource.create({SERVICE_NAME: "octavo", "service.version": __version__})
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))

    @property
    def tracer(self) -> Tracer:
        return self._provider.get_tracer("octavo", __version__)

    def close(self) -> None:
        """Send what is queued, for at most CLOSE_SECONDS."""
        sending = Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)


class _Exporter(SpanExporter):
    """Sends spans with `exporter`, and tells the warning whether the collector took them."""

    def __init__(self, exporter: SpanExporter, warning: "_OneWarning"):
        self._exporter, self._warning = exporter, warning

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._warning.taken()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _OneWarning(logging.Handler):
    """Turns the many messages of an exporter whose collector does not answer into one."""

    def __init__(self, endpoint: str):
        super().__init__(logging.WARNING)
        self._endpoint, self._has_warned = endpoint, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._has_warned:
            self._has_warned = True
            message = "the collector at %s does not take spans, which are dropped until it does: %s"
            log.warning(message, self._endpoint, record.getMessage())

    def taken(self) -> None:
        """Note that the collector has taken spans."""
        if self._has_warned:
            self._has_warned = False
            log.warning("the collector at %s takes spans again", self._endpoint)


def _replace_logging(handler: logging.Handler) -> None:
    """Pass the messages of exporters to `handler` only."""
    sending = logging.getLogger(_SENDING)
    sending.handlers, sending.propagate = [handler], False
    logging.getLogger(_QUEUE).setLevel(logging.ERROR)


def _exporter(endpoint: str) -> SpanExporter:
    """Return what sends spans to `endpoint`. Raises ConfigError."""
    address = urlsplit(endpoint)
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    given = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    protocol = given or ("grpc" if address.scheme == "grpc" else "http/protobuf")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"the OTLP protocol must be {' or '.join(PROTOCOLS)}, not {protocol!r}")
    if protocol == "grpc":
        return _grpc_exporter(endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    if address.scheme == "grpc":
        raise ConfigError(f"{endpoint} is an address for gRPC; the OTLP protocol is {protocol}")
    return OTLPSpanExporter(endpoint=endpoint if address.path.strip("/") else endpoint.rstrip("/") + DEFAULT_PATH)


def _grpc_exporter(endpoint: str) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError:
        package = "opentelemetry-exporter-otlp-proto-grpc"
        raise ConfigError(f"OTLP over gRPC needs a package of its own: pip install {package}") from None
    address = urlsplit(endpoint)
    exporter: SpanExporter = OTLPSpanExporter(endpoint=address.netloc, insecure=address.scheme != "https")
    return exporter
