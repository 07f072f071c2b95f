"""Complete prompts from an iterator of any length, in order, with a bounded number of them in memory."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from octavo.errors import EngineDead, OctavoError
from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput

from .frontend import Frontend
from .live import LiveRequest, Sink
from .loop_thread import LoopThread
from .requests import Request

QUEUED = 64  # requests that wait in the engine, so that one can start as soon as another has finished
WINDOW_BLOCKS = 4  # blocks that are read but not yielded, so that one long output does not hold up all others

Prepare = Callable[[Any], tuple[Request, list[int]]]
"""Converts a prompt to a request and its token ids. Raises OctavoError if the prompt cannot be served."""


@dataclass(slots=True, eq=False)
class _Row:
    """A prompt, from when it is read until its output is yielded. It has a request until it is submitted."""

    request: Request | None = None
    tokens: list[int] = field(default_factory=list)
    live: LiveRequest | None = None
    output: RequestOutput | None = None


class PromptStream:
    """Reads prompts block by block, completes them, and yields their outputs in the order of the prompts.

    A block has as many prompts as may be in the engine at once. It is submitted in the order of its token ids, so that
    prompts with a common prefix run next to each other, while the pages of the prefix are cached.

    Args:
        thread: the thread of `frontend`.
        max_batch_size: number of sequences that the engine runs at the same time.
    """

    def __init__(
        self, thread: LoopThread, frontend: Frontend, prompts: Iterable[Any], prepare: Prepare, max_batch_size: int
    ):
        self._thread, self._frontend, self._prepare = thread, frontend, prepare
        self._prompts = iter(prompts)
        self._is_exhausted = False
        self._failure: Exception | None = None  # of the iterator; raised after the outputs of the prompts before it
        queued = min(QUEUED, max_batch_size)
        self._block = max_batch_size + queued
        self._refill = max(queued // 2, 1)  # requests that are submitted together
        self._rows: deque[_Row] = deque()  # those read but not yielded, in the order of the prompts
        self._pending: deque[_Row] = deque()  # those not submitted yet, in the order of submission
        self._running = 0
        self._ended: SimpleQueue[tuple[_Row, Exception | None]] = SimpleQueue()

    def outputs(self) -> Generator[RequestOutput, None, None]:
        """Yield one output per prompt. If the generator is closed, the requests that still run are aborted.

        Raises EngineDead, and the iterator's exceptions after the outputs of the prompts before it.
        """
        try:
            while True:
                self._collect()
                self._submit()
                if self._needs_block:
                    self._read_block()
                elif self._rows and (output := self._rows[0].output):
                    self._rows.popleft()
                    yield output
                elif self._rows:
                    self._end(*self._ended.get())
                elif self._failure is not None:
                    raise self._failure
                else:
                    return
        finally:
            self._thread.post(self._frontend.abort, [row.live for row in self._rows if row.live])

    @property
    def _needs_block(self) -> bool:
        """Return whether the engine may soon have fewer requests than it can run, and the window has space."""
        has_space = len(self._rows) <= (WINDOW_BLOCKS - 1) * self._block
        return not (self._pending or self._is_exhausted) and self._has_free_places and has_space

    @property
    def _has_free_places(self) -> bool:
        return self._block - self._running >= self._refill

    def _read_block(self) -> None:
        """Read and tokenize the next prompts."""
        rows = []
        try:
            for prompt in itertools.islice(self._prompts, self._block):
                rows.append(row := _Row())
                try:
                    row.request, row.tokens = self._prepare(prompt)
                except OctavoError as error:
                    row.output = _failed(error)
        except Exception as error:
            self._failure = error
        self._is_exhausted = len(rows) < self._block or self._failure is not None
        self._rows.extend(rows)
        self._pending.extend(sorted((row for row in rows if row.request), key=lambda row: row.tokens))

    def _submit(self) -> None:
        if not (self._pending and self._has_free_places):
            return
        free = self._block - self._running
        rows = [self._pending.popleft() for _ in range(min(free, len(self._pending)))]
        self._thread.call(self._start, rows)
        self._running += sum(row.live is not None for row in rows)

    def _start(self, rows: list[_Row]) -> None:
        """Submit the requests of rows. Called on the frontend's thread, once for many rows."""
        for row in rows:
            assert row.request is not None
            try:
                [row.live] = self._frontend.submit([row.request], [row.tokens], self._sink(row))
            except EngineDead:
                raise
            except OctavoError as error:
                row.output = _failed(error)
            row.request, row.tokens = None, []

    def _sink(self, row: _Row) -> Sink:
        def sink(_: LiveRequest, output: RequestOutput | Exception) -> None:
            if isinstance(output, Exception):
                self._ended.put((row, output))
            elif output.finished:
                self._ended.put((row, None))

        return sink

    def _collect(self) -> None:
        """Take the requests that have ended, without waiting."""
        while not self._ended.empty():
            self._end(*self._ended.get())

    def _end(self, row: _Row, error: Exception | None) -> None:
        """Set the output of a row whose request has ended. Raises EngineDead, which is the error of all rows."""
        self._running -= 1
        live, row.live = row.live, None
        assert live is not None
        if isinstance(error, EngineDead) or (error is not None and not isinstance(error, OctavoError)):
            raise error
        row.output = live.whole() if error is None else _failed(error, live)


def _failed(error: OctavoError, live: LiveRequest | None = None) -> RequestOutput:
    """Return the output of a prompt that was refused, or of a request that failed."""
    return RequestOutput(
        request_id=live.id if live else "",
        prompt=live.prompt if live else None,
        prompt_token_ids=live.prompt_token_ids if live else [],
        outputs=[CompletionOutput(0, "", [], "error")],
        finished=True,
        metrics=live.metrics if live else RequestMetrics(arrival_time=time.time()),
        seed=live.seed if live else 0,
        error=error,
    )
