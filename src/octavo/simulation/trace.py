"""Traces: the arrival times and lengths of requests, read from a file of JSON lines or generated."""

import heapq
import random
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from octavo.bench.report import Run
from octavo.errors import ConfigError
from octavo.simulation import text

Positive = Annotated[float, msgspec.Meta(gt=0)]
Length = Annotated[int, msgspec.Meta(ge=1, le=10**7)]
Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
_SECONDS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of a trace.

    The prompt is given as its length, `prompt_tokens`, or as token ids, `prompt`. Prompts given by length share no
    prefix, with two exceptions: requests with the same `prefix` share its first `prefix_tokens` tokens; and prompts of
    the same `conversation` are beginnings of one text, which their outputs continue.

    A request with `think_time` does not arrive before this many seconds after the end of the request before it in the
    same conversation. `at` is then the earliest time.
    """

    at: Annotated[float, msgspec.Meta(ge=0)]  # seconds from the start
    output_tokens: Length
    prompt_tokens: Length | None = None
    prompt: Annotated[list[Token], msgspec.Meta(min_length=1)] | None = None
    tenant: str = ""
    priority: int = 0
    ttft_target: Positive | None = None  # seconds, like `timeout`
    timeout: Positive | None = None
    prefix: Name | None = None
    prefix_tokens: Length | None = None
    conversation: Name | None = None
    think_time: Annotated[float, msgspec.Meta(ge=0)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_tokens is None):
            raise ValueError("give either prompt_tokens or prompt")
        if (self.prefix is None) != (self.prefix_tokens is None):
            raise ValueError("give both prefix and prefix_tokens, or neither")
        if self.prompt is not None and (self.prefix or self.conversation):
            raise ValueError("prefix and conversation are for prompts given by prompt_tokens")
        if self.think_time is not None and self.conversation is None:
            raise ValueError("think_time is for requests of a conversation")


class Arrivals:
    """The arrivals of a trace. Those of requests with `think_time` depend on when other requests end.

    Attributes:
        trace: The requests; other methods refer to them by their index.
    """

    def __init__(self, trace: Sequence[TraceRequest]):
        self.trace = trace
        self._next: list[tuple[float, int]] = []  # heap of (time of arrival, index)
        self._follower: dict[int, int] = {}  # the request that waits for the end of another one
        latest: dict[str | None, int] = {}
        for i, request in enumerate(trace):
            if request.think_time is not None and request.conversation in latest:
                self._follower[latest[request.conversation]] = i
            else:
                heapq.heappush(self._next, (request.at, i))
            latest[request.conversation] = i

    @property
    def next_at(self) -> float | None:
        """Return the time of the next arrival; None if no request is left, or if all wait for the end of others."""
        return self._next[0][0] if self._next else None

    def pop(self) -> tuple[float, int]:
        """Return the time and the index of the next request."""
        return heapq.heappop(self._next)

    def ended(self, index: int, now: float) -> None:
        """Note that a request has ended, with or without success, at the time `now`."""
        if (follower := self._follower.pop(index, None)) is not None:
            request = self.trace[follower]
            heapq.heappush(self._next, (max(request.at, now + (request.think_time or 0.0)), follower))


class Prompts:
    """Makes the token ids of a trace's prompts. The same sequence of requests gives the same tokens."""

    def __init__(self) -> None:
        self._numbers = count()
        self._named: dict[tuple[str, str], int] = {}
        self._prefixes: dict[str, np.ndarray] = {}  # the longest part so far

    def tokens(self, request: TraceRequest) -> list[int]:
        """Return the tokens of a request's prompt."""
        if request.prompt is not None:
            return request.prompt
        length, shared = request.prompt_tokens or 0, request.prefix_tokens or 0
        tokens = text(self._number("conversation", request.conversation), length)
        if request.prefix:
            shared = min(shared, length)
            tokens[:shared] = self._prefix(request.prefix, shared)
        whole: list[int] = tokens.tolist()
        return whole

    def _prefix(self, name: str, length: int) -> np.ndarray:
        """Return the first tokens of a named prefix."""
        known = self._prefixes.get(name)
        if known is None or len(known) < length:
            known = self._prefixes[name] = text(self._number("prefix", name), length)
        return known[:length]

    def _number(self, kind: str, name: str | None) -> int:
        """Return the number of a named text, or of a new text if `name` is None."""
        if name is None:
            return next(self._numbers)
        if (kind, name) not in self._named:
            self._named[kind, name] = next(self._numbers)
        return self._named[kind, name]


def read_trace(path: Path) -> list[TraceRequest]:
    """Return the requests in a file in order of arrival. Raises ConfigError, which gives the number of a wrong line."""
    requests = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    requests.append(_parse(line, f"{path}, line {number}"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if not requests:
        raise ConfigError(f"{path} is empty: it must have a JSON object on each line")
    return sorted(requests, key=lambda request: request.at)


def write_trace(path: Path, requests: Sequence[TraceRequest]) -> None:
    """Write a trace to a file. Raises ConfigError."""
    try:
        path.write_bytes(b"".join(msgspec.json.encode(request) + b"\n" for request in requests))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def poisson_trace(rate: float | None, requests: int, input_len: int, output_len: int, seed: int) -> list[TraceRequest]:
    """Return requests of equal lengths that arrive as a Poisson process of `rate` per second; None for all at once."""
    rng = random.Random(seed)
    at, trace = 0.0, []
    for _ in range(requests):
        trace.append(TraceRequest(at=at, prompt_tokens=input_len, output_tokens=output_len))
        at += rng.expovariate(rate) if rate else 0.0
    return trace


def trace_of(run: Run) -> list[TraceRequest]:
    """Return the requests of a benchmark as a trace, without those that failed."""
    done = [request for request in run.requests if request.output_tokens]
    start = min((request.sent for request in done), default=0.0)
    return [
        TraceRequest(at=request.sent - start, prompt_tokens=request.input_tokens, output_tokens=request.output_tokens)
        for request in sorted(done, key=lambda request: request.sent)
    ]


def parse_rate(value: str) -> float:
    """Return the requests per second of "10000/min", "20/s" or "0.5". Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)(?:/([a-z]+))?", value.strip())
    if not match or float(match[1]) <= 0 or (match[2] or "s") not in _SECONDS:
        raise ConfigError(
            f"rate must be a number of requests such as 10000/min, 20/s or 0.5 (per second), not {value!r}"
        )
    return float(match[1]) / _SECONDS[match[2] or "s"]


def _parse(line: bytes, where: str) -> TraceRequest:
    try:
        return msgspec.json.decode(line, type=TraceRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from None
