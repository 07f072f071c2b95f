"""A load generator for any OpenAI-compatible server: sends many streaming requests and records when tokens arrive.

The client often shares its cores with the server, so it must use little processor time: an asyncio.Protocol feeds the
httptools parser on uvloop. (An httpx stream uses several times as much for the same tokens.)
"""

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import httpx
import msgspec

from octavo.errors import ConfigError

from .report import RequestTimes, Run

# Words that are one token each in nearly every vocabulary; the exact counts come from `usage` in the answers.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason"
)


@dataclass(frozen=True)
class Endpoint:
    """The address of one API of a server.

    Attributes:
        base_url: Ends in /v1.
        path: "/completions" or "/chat/completions", below `base_url`.
        ignore_eos: Whether requests have the field `ignore_eos`, which Octavo, vLLM and llama.cpp understand and OpenAI
            refuses.
    """

    base_url: str
    path: str
    model: str
    headers: dict[str, str]
    ignore_eos: bool

    def body(self, prompt: str, output_len: int) -> bytes:
        """Return the JSON of a greedy, streamed request."""
        chat = self.path == "/chat/completions"
        request: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        request |= {"model": self.model, "max_tokens": output_len, "temperature": 0}
        request |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            request["ignore_eos"] = True
        return msgspec.json.encode(request)


def find_endpoint(base_url: str, path: str, model: str | None, api_key: str | None, ignore_eos: bool) -> Endpoint:
    """Return the endpoint for `model`, or for the first model that the server lists. Raises ConfigError."""
    root = base_url.rstrip("/")
    root = root if root.endswith("/v1") else root + "/v1"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{root}/models", headers=headers, timeout=10)
        answer.raise_for_status()
        models = [entry["id"] for entry in answer.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{root}/models did not answer like an OpenAI-compatible server: {error}") from None
    if model is None and not models:
        raise ConfigError(f"{root}/models lists no models: name one with --model")
    return Endpoint(root, path, model or models[0], headers, ignore_eos)


def random_prompts(count: int, length: int, seed: int) -> list[str]:
    """Return `count` texts of `length` random words, which are about as many tokens."""
    rng = random.Random(seed)
    words = WORDS.split()
    return [" ".join(rng.choices(words, k=length)) for _ in range(count)]


async def measure(
    endpoint: Endpoint,
    prompts: list[str],
    output_len: int,
    concurrency: int,
    request_rate: float | None,
    seed: int,
    advance: Callable[[int], None],
) -> Run:
    """Send every prompt, after one unmeasured request that warms the server up.

    Args:
        concurrency: Maximum number of requests in flight at the same time.
        request_rate: Arrivals per second of a Poisson process; None for all at once.
        advance: Called with 1 when a request has finished.

    Raises:
        ConfigError: The warm-up request failed.
    """
    warm_up = await send(endpoint, endpoint.body(prompts[-1][::-1], min(output_len, 4)), input_tokens=0)
    if warm_up.error:
        raise ConfigError(f"a request to {endpoint.base_url}{endpoint.path} failed: {warm_up.error}")
    rng = random.Random(seed)
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: str) -> RequestTimes:
        async with gate:
            times = await send(endpoint, endpoint.body(prompt, output_len), input_tokens=len(prompt.split()))
        advance(1)
        return times

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for prompt in prompts:
            tasks.append(group.create_task(one(prompt)))
            if request_rate:
                await asyncio.sleep(rng.expovariate(request_rate))
    return Run([task.result() for task in tasks], time.perf_counter() - started)


async def send(endpoint: Endpoint, body: bytes, input_tokens: int) -> RequestTimes:
    """Send one streamed request and return its times, from connecting to the last byte. Failures are in `error`."""
    url = urlsplit(endpoint.base_url)
    secure = url.scheme == "https"
    times = RequestTimes(time.perf_counter(), input_tokens)
    exchange = _Exchange(times)
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.create_connection(
            lambda: exchange,
            url.hostname or "",
            url.port or (443 if secure else 80),
            ssl=ssl.create_default_context() if secure else None,
        )
        transport.write(_http_request(endpoint, url.netloc, url.path + endpoint.path, body))
        try:
            await exchange.done
        finally:
            transport.close()
    except (OSError, httptools.HttpParserError) as error:
        times.error = str(error) or type(error).__name__
    return times


def _http_request(endpoint: Endpoint, host: str, path: str, body: bytes) -> bytes:
    headers = {
        "Host": host,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **endpoint.headers,
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    """The fields of a streamed chunk that are needed; msgspec skips the others without decoding them."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class _Exchange(asyncio.Protocol):
    """Receives the answer to one request, a stream of server-sent events, and records it in `times`."""

    def __init__(self, times: RequestTimes):
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._times = times
        self._parser: Any = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now = 0.0

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(error or ConnectionError("the server closed the connection before the answer was complete"))

    def on_body(self, body: bytes) -> None:
        self._rest += body
        if self._parser.get_status_code() != 200:
            return  # an error message, which is read at the end
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                self._read(line[5:])

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._times.error = f"HTTP {status}: {self._rest.decode(errors='replace').strip()[:300]}"
        self._finish(None)

    def _read(self, event: bytes) -> None:
        try:
            chunk = _decode_chunk(event)
        except msgspec.MsgspecError as error:
            self._times.error = f"the server sent an event that is not a completion chunk: {error}"
            return
        if chunk.error:
            self._times.error = f"the server reports {chunk.error}"
        if any(choice.text or (choice.delta and choice.delta.content) for choice in chunk.choices):
            self._times.arrivals.append(self._now)
            self._times.output_tokens = max(self._times.output_tokens, len(self._times.arrivals))
        if chunk.usage:
            self._times.input_tokens = chunk.usage.prompt_tokens
            self._times.output_tokens = chunk.usage.completion_tokens

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)
