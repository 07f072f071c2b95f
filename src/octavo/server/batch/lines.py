"""The lines of batch files in OpenAI's format: requests in, results out."""

import uuid
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import xxhash

URLS = ("/v1/chat/completions", "/v1/completions")
ENVELOPE_BYTES = 65_536  # of a line, besides the body of the request


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One line of the input: a request, or what is wrong with the line."""

    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: "LineError | None" = None


class LineError(msgspec.Struct, frozen=True):
    """Why a line was not sent to a route."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the output, with its line break, and what it adds to the totals."""

    line: bytes
    failed: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Input(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _InputId(msgspec.Struct):
    custom_id: str


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Output(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Response | None
    error: LineError | None


class _DoneResponse(msgspec.Struct):
    status_code: int


class _DoneLine(msgspec.Struct):
    custom_id: str | None
    response: _DoneResponse | None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Streamed(msgspec.Struct):
    stream: bool | None = None


_ENCODER = msgspec.json.Encoder()
_INPUT = msgspec.json.Decoder(_Input)
_INPUT_ID = msgspec.json.Decoder(_InputId)
_DONE = msgspec.json.Decoder(_DoneLine)
_BODY = msgspec.json.Decoder(_Body)
_STREAMED = msgspec.json.Decoder(_Streamed)


class Rows:
    """Iterates over the rows of an input file. Blank lines are skipped.

    Args:
        file: the input, open for reading in binary mode.
        max_body_bytes: the maximum size of a request's body; a longer line becomes a row with an error.
        urls: the routes that the lines may name.
    """

    def __init__(self, file: BinaryIO, max_body_bytes: int, urls: Collection[str] = URLS):
        self._file = file
        self._limit = max_body_bytes + ENVELOPE_BYTES
        self._urls = urls
        self._known = HashSet()

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while line := self._file.readline(self._limit):
            if len(line) == self._limit and not line.endswith(b"\n"):
                while (rest := self._file.readline(self._limit)) and not rest.endswith(b"\n"):
                    pass
                return _faulty(None, "line_too_long", f"the line is longer than {self._limit} bytes")
            if stripped := line.strip().removeprefix(b"\xef\xbb\xbf"):
                return self._row(stripped)
        raise StopIteration

    def _row(self, line: bytes) -> Row:
        try:
            request = _INPUT.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _faulty(_custom_id(line), "invalid_line", f"the line is not a request: {error}")
        id, url = request.custom_id, request.url
        if not self._known.add(xxhash.xxh3_64_intdigest(id.encode("utf-8", "surrogatepass"))):
            return _faulty(id, "duplicate_custom_id", "an earlier line has the same custom_id")
        if request.method != "POST":
            return _faulty(id, "invalid_method", f"method must be POST, not {request.method[:20]!r}")
        if url not in self._urls:
            return _faulty(id, "invalid_url", f"url must be {' or '.join(self._urls)}, not {url[:100]!r}")
        body = bytes(request.body)
        if _is_streamed(body):
            return _faulty(id, "invalid_stream", "stream must be false in a batch")
        return Row(id, url, body)


class HashSet:
    """A set of 64-bit hashes in 12 to 24 bytes each."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, value: int) -> bool:
        """Add a hash. Return whether it is new."""
        value = value or 1  # 0 marks an empty slot
        if not self._insert(value):
            return False
        self._count += 1
        if self._count * 3 > len(self._slots) * 2:
            old, self._slots = self._slots, array("Q", bytes(8 * 2 * len(self._slots)))
            for each in old:
                if each:
                    self._insert(each)
        return True

    def _insert(self, value: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        index = value & mask
        while slots[index]:
            if slots[index] == value:
                return False
            index = (index + 1) & mask
        slots[index] = value
        return True


def result_of(row: Row, status: int, request_id: str, body: bytes) -> Result:
    """Return the result of a request that a route has answered with a JSON body."""
    response = _Response(status, request_id, msgspec.Raw(body))
    line = _ENCODER.encode(_Output(_new_id(), row.custom_id, response, None)) + b"\n"
    usage = (_BODY.decode(body).usage if status == 200 else None) or _Usage()
    return Result(line, status != 200, usage.prompt_tokens, usage.completion_tokens)


def failed(row: Row, error: LineError) -> Result:
    """Return the result of a row that was not sent to a route."""
    return Result(_ENCODER.encode(_Output(_new_id(), row.custom_id, None, error)) + b"\n", True)


def read_result(line: bytes) -> tuple[str | None, bool]:
    """Return the custom_id of a result and whether it failed. Raises msgspec.DecodeError."""
    done = _DONE.decode(line)
    return done.custom_id, done.response is None or done.response.status_code != 200


def _faulty(id: str | None, code: str, message: str) -> Row:
    return Row(id, error=LineError(code, message[:400]))


def _custom_id(line: bytes) -> str | None:
    try:
        return _INPUT_ID.decode(line).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_streamed(body: bytes) -> bool:
    try:
        return bool(_STREAMED.decode(body).stream)
    except msgspec.DecodeError:
        return False  # the route says what is wrong


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"
