"""The access log: one line for each request, written by a thread so that no reader of the log can stall the server."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from octavo.tenants.key import Key
from octavo.tenants.window import SlidingWindow

from .ids import request_id

if TYPE_CHECKING:
    from .key_use import KeyUse

PROBES = ("/health", "/ready")  # polled every second or so: logged only if they fail
BATCH_SECONDS = 0.05  # pause after a flush: waking the thread for every line takes longer than writing the line
MAX_REFUSED = 100  # lines a second about requests without a right key: a flood of these must not fill the disk
MAX_QUEUED = 10_000  # lines; more are dropped while the log's reader is stalled
CLIENT_LEFT = 499  # nginx's status for a client that disconnected before its response was complete


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request, for the access log and the response's header.

    The route fills in `model` and the attributes after it. `started` is in seconds of time.perf_counter().
    `response_headers` are added to the header of every response, including error responses. `on_end` is called when the
    response has ended.
    """

    id: str
    method: str
    path: str
    client: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    complete: bool = False
    response_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    on_end: Callable[[], None] | None = None
    model: str | None = None
    replica: str | None = None
    tenant: str | None = None
    key: Key | None = None
    use: "KeyUse | None" = None
    stream: bool = False
    prompt: Any = None
    error: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    time_to_first_token: float | None = None

    @classmethod
    def of(cls, scope: Any) -> "RequestRecord":
        """Return the record that `HttpProtocol` made for an ASGI request; under another server, make a new one."""
        record = scope.get("octavo.record")
        if record is None:
            client = scope.get("client") or ("-", 0)
            record = cls(request_id(scope["headers"]), scope["method"], scope["path"], client[0])
            scope["octavo.record"] = record
        return record  # type: ignore[no-any-return]

    def start_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the header fields of every response. To be called when the response starts."""
        milliseconds = (time.perf_counter() - self.started) * 1e3
        return [
            (b"x-request-id", self.id.encode()),
            (b"request-id", self.id.encode()),  # Anthropic's name for it
            (b"openai-processing-ms", b"%d" % milliseconds),
            *self.response_headers,
        ]


class AccessLog:
    """Writes records to a text stream as lines of text or JSON.

    Args:
        style: "text", "json" or "none".
        stream: the destination; None drops everything.
        prompts: whether to include the prompts of requests.
    """

    def __init__(self, style: str, stream: TextIO | None, prompts: bool = False):
        self.enabled = style != "none" and stream is not None
        self.prompts = prompts
        self._format = _json if style == "json" else _text
        self._stream = stream
        self._queue: SimpleQueue[tuple[datetime, float, RequestRecord] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._dropped = 0
        self._refused = SlidingWindow(MAX_REFUSED, seconds=1.0)

    def write(self, record: RequestRecord) -> None:
        """Queue the line of a request that has ended. Never blocks."""
        if not self.enabled or (record.path in PROBES and record.status < 400):
            return
        is_refusal = record.status == 401
        if self._queue.qsize() >= MAX_QUEUED or (is_refusal and self._refused.take(time.monotonic())):
            self._dropped += 1
            return
        if self._thread is None:
            self._thread = Thread(target=self._run, name="octavo-access-log", daemon=True)
            self._thread.start()
        self._queue.put((datetime.now(UTC), time.perf_counter() - record.started, record))

    def close(self) -> None:
        """Write the queued lines; give up after a second."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        assert self._stream is not None
        while (item := self._queue.get()) is not None:
            now, seconds, record = item
            line = self._format(fields(now, seconds, record, self.prompts))
            dropped, self._dropped = self._dropped, 0
            if dropped:
                line += self._format({"time": _stamp(now), "dropped_lines": dropped})
            with contextlib.suppress(OSError, ValueError):  # a full disk or a closed pipe
                self._stream.write(line)
                if self._queue.empty():
                    self._stream.flush()
                    time.sleep(BATCH_SECONDS)


def fields(now: datetime, seconds: float, record: RequestRecord, prompts: bool = False) -> dict[str, Any]:
    """Return the fields of a line by name. Fields that do not apply are left out.

    Args:
        now: the time at which the request ended.
        seconds: its duration.
        prompts: whether to include the prompt.
    """
    first = record.time_to_first_token
    values = {
        "time": _stamp(now),
        "request_id": record.id,
        "client": record.client,
        "method": record.method,
        "path": record.path,
        "status": record.status if record.complete else CLIENT_LEFT,
        "duration_ms": round(seconds * 1e3, 1),
        "first_token_ms": None if first is None else round(first * 1e3, 1),
        "model": record.model,
        "replica": record.replica,
        "tenant": record.tenant or None,
        "key": record.key and record.key.name,
        "stream": record.stream or None,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "error": record.error,
        "prompt": record.prompt if prompts else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _json(values: dict[str, Any]) -> str:
    return msgspec.json.encode(values).decode() + "\n"


def _text(values: dict[str, Any]) -> str:
    """Format a line as text: the first fields as bare values, the others as name=value.

    Values are quoted where necessary, so that no value can contain a line break or look like another field.
    """
    head = [str(values.pop(name)) for name in ("time", "client", "method", "path", "status") if name in values]
    head = [word if word.isprintable() and " " not in word else _quoted(word) for word in head]
    return " ".join([*head, *(f"{name}={_quoted(value)}" for name, value in values.items())]) + "\n"


def _quoted(value: Any) -> str:
    if isinstance(value, str) and value.isprintable() and value and not set(value) & set(' "='):
        return value
    # Escape unprintable characters: a name may contain some that move a terminal's cursor.
    text = msgspec.json.encode(value).decode()
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _stamp(now: datetime) -> str:
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
