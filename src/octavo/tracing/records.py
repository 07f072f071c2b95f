"""Records: an engine's events as plain data, which cost its steps least. The trace file's thread formats them."""

import time
from collections.abc import Sequence

import msgspec

from .events import instant, line, microseconds, name_thread

HOST, SWAP, PREFILL, DECODE, SAMPLING, IDLE = "host", "swap", "prefill", "decode", "sampling", "idle"
"""The categories of an engine's slices: the parts of its time."""


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """A step and its stages, whose begins are in seconds of time.monotonic().

    Attributes:
        thread: the id of the engine's thread.
        collecting: finished transfers.
        sampled: the seconds of the computation that were spent on sampling.
        prefill, decode, drafts: rows of prompts, of sequences with one token to compute, and of draft tokens.
    """

    thread: int
    collecting: float
    scheduling: float
    computing: float
    emitting: float
    ended: float
    sampled: float
    prefill: int
    decode: int
    drafts: int


class Slice(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """What a thread did from `began` to `ended`, in seconds of time.monotonic(). `part` is its category."""

    thread: int
    name: str
    part: str
    began: float
    ended: float


class ThreadName(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """What a thread is."""

    thread: int
    name: str


class Dropped(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """How many records were dropped, as they were not taken in time."""

    count: int


Record = Step | Slice | ThreadName | Dropped
_Batch = tuple[int, list[Record]]
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_Batch)


def encode_records(pid: int, records: Sequence[Record]) -> bytes:
    """Return records of the process `pid` as bytes."""
    return _ENCODER.encode((pid, records))


def lines_of(data: bytes) -> bytes:
    """Return the lines of a trace file for encoded records."""
    pid, records = _DECODER.decode(data)
    return b"".join(_lines(pid, record) for record in records)


def count(data: bytes) -> int:
    """Return the number of encoded records."""
    return len(_DECODER.decode(data)[1])


def _lines(pid: int, record: Record) -> bytes:
    match record:
        case Step():
            return _step(pid, record)
        case Slice():
            start = microseconds(record.began)
            event = {"name": record.name, "cat": record.part, "ph": "X", "pid": pid, "tid": record.thread}
            return line(event | {"ts": start, "dur": microseconds(record.ended) - start})
        case ThreadName():
            return name_thread(pid, record.thread, record.name)
        case Dropped():
            return instant("events dropped", time.monotonic(), pid, {"events": record.count})


def _step(pid: int, step: Step) -> bytes:
    """Return the lines of a step. Backends compute all rows together: their time is divided by numbers of rows."""
    start, scheduling = microseconds(step.collecting), microseconds(step.scheduling)
    computing, emitting, ended = map(microseconds, (step.computing, step.emitting, step.ended))
    sampling = emitting - microseconds(min(step.sampled, step.emitting - step.computing))
    rows = step.prefill + step.decode + step.drafts
    decoding = computing + (sampling - computing) * step.prefill // max(rows, 1)
    thread = f'"pid":{pid},"tid":{step.thread}'
    args = f'"prefill_tokens":{step.prefill},"decode_tokens":{step.decode},"draft_tokens":{step.drafts}'
    lines = [f',{{"name":"step","ph":"X",{thread},"ts":{start},"dur":{ended - start},"args":{{{args}}}}}\n']
    for name, part, begin, end in (
        ("collect transfers", SWAP, start, scheduling),
        ("schedule", HOST, scheduling, computing),
        ("prefill", PREFILL, computing, decoding),
        ("decode", DECODE, decoding, sampling),
        ("sampling", SAMPLING, sampling, emitting),
        ("emit", HOST, emitting, ended),
    ):
        if end > begin:
            lines.append(f',{{"name":"{name}","cat":"{part}","ph":"X",{thread},"ts":{begin},"dur":{end - begin}}}\n')
    return "".join(lines).encode()  # formatted by hand: a third of the time of a JSON encoder
