"""RequestTrace: write the life of each request, and the engines' events, to a trace file (docs/tracing.md)."""

import os
import time

from octavo.tracing.events import instant, name_engine, name_process, request_event
from octavo.tracing.file import TraceFile
from octavo.tracing.request_events import ADMITTED, CHUNK, RequestEvent

from .live import LiveRequest
from .replica import Replica

COUNTED = {ADMITTED: "cached_tokens", CHUNK: "tokens"}
"""What the tokens of an engine's events are, in the file."""


class RequestTrace:
    """A RequestWatcher that writes one model's requests and engines. Raises ConfigError if the file cannot be written.

    Args:
        path: the trace file.
        model: the model's name.
    """

    def __init__(self, path: str, model: str):
        self._file = TraceFile(path)
        self._model = model
        self._pid = os.getpid()

    def engine_ready(self, replica: Replica) -> None:
        """Write that an engine serves from now on."""
        pid = self._pid_of(replica)
        self._file.write(name_process(self._pid, "octavo"))
        if pid != self._pid:
            self._file.write(name_process(pid, f"{replica.name} of {self._model}"))
        self._file.write(name_engine(pid, self._model, replica.number))
        self._write_engine_event("engine ready", replica)

    def engine_lost(self, replica: Replica, reason: str) -> None:
        """Write that an engine has ended unexpectedly."""
        self._write_engine_event("engine ended", replica, reason=reason)

    def engine_times(self, records: bytes) -> None:
        """Write the times of steps that an engine has sent."""
        self._file.write_records(records)

    def arrived(self, live: LiveRequest, reply_id: str) -> None:
        """Write the begin of a request, with the id that a server's client sees in the reply."""
        args = {
            "model": self._model,
            "reply": reply_id,
            "prompt_tokens": len(live.prompt_token_ids),
            "completions": len(live.completions),
            "tenant": live.completions[0].request.tenant,
            "priority": live.completions[0].request.priority,
        }
        self._file.write(request_event("b", live.id, live.id, live.arrival, self._pid, args))

    def sent(self, live: LiveRequest, replica: Replica) -> None:
        """Write that a request is sent to an engine, for the first time or again."""
        args = self._engine(replica) | {"sequences": [each.request.id for each in live.unfinished]}
        self._write(live, "moved" if live.was_sent else "sent", args)

    def happened(self, live: LiveRequest, replica: Replica, event: RequestEvent) -> None:
        """Write what an engine has done with a completion of a request."""
        args: dict[str, object] = {"sequence": event.sequence}
        if event.name in COUNTED:
            args[COUNTED[event.name]] = event.tokens
        self._file.write(request_event("n", event.name, live.id, event.time, self._pid_of(replica), args))

    def first_token(self, live: LiveRequest) -> None:
        """Write that a request has got its first token."""
        self._write(live, "first token", {})

    def ended(self, live: LiveRequest, reason: str | None = None) -> None:
        """Write the end of a request.

        Args:
            reason: why it ended before its output was complete; by default the finish reasons of its completions.
        """
        reasons = dict.fromkeys(str(completion.finish_reason) for completion in live.completions)
        args = {
            "reason": reason or ", ".join(reasons),
            "output_tokens": sum(len(completion.token_ids) for completion in live.completions),
            "cached_tokens": live.metrics.cached_tokens,
        }
        self._file.write(request_event("e", live.id, live.id, time.monotonic(), self._pid, args))

    def close(self) -> None:
        """Finish writing the file."""
        self._file.close()

    def _write(self, live: LiveRequest, name: str, args: dict[str, object]) -> None:
        self._file.write(request_event("n", name, live.id, time.monotonic(), self._pid, args))

    def _write_engine_event(self, name: str, replica: Replica, **args: str) -> None:
        self._file.write(instant(name, time.monotonic(), self._pid, self._engine(replica) | args))

    def _engine(self, replica: Replica) -> dict[str, object]:
        return {"model": self._model, "engine": replica.number, "engine_pid": self._pid_of(replica)}

    def _pid_of(self, replica: Replica) -> int:
        """Return the id of the process in which a replica's engine runs."""
        pid = replica.link.pid if replica.link is not None else None
        return pid or self._pid
