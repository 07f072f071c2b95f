"""Run a batch file without a server: load the model, send every line to the routes, write the results."""

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import uvloop

from octavo.config import EngineConfig
from octavo.errors import ConfigError, OctavoError
from octavo.fleet.fleet import Fleet
from octavo.fleet.specs import FleetSpec, ModelSpec
from octavo.frontend.links.process import EngineProcess
from octavo.server.app import create_app
from octavo.server.config import ServerConfig
from octavo.server.edge.draining import on_signals
from octavo.terminal import printable

from .lines import Rows
from .results import Counts, ResultFile
from .run import BatchRun, FixedSlots

WAITING = 64  # requests that wait in the engine, so that a new one can start as soon as another has finished
WINDOWS = 4  # rows that may be started before the oldest one has finished, in multiples of the requests that run
REPORT_SECONDS = 10.0  # between lines of progress if stderr is not a terminal


def run(config: EngineConfig, source: Path, target: Path) -> None:
    """Answer the requests in `source` and write the results to `target`, continuing after those that are there.

    Raises ConfigError if the files cannot be used, errors of loading the model, EngineDead, and KeyboardInterrupt after
    Ctrl-C or SIGTERM.
    """
    try:
        if target.exists() and source.samefile(target):
            raise ConfigError("the output must be another file than the input")
        file = source.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from None
    with file, contextlib.closing(ResultFile(target)) as results:
        rows = Rows(file, ServerConfig().max_body_bytes)
        results.resume(rows)
        total = _count_lines(source)
        if results.counts.rows:
            _say(f"continuing after {results.counts.rows} of {total} lines in {target}")
        try:
            if results.counts.rows < total:
                uvloop.run(_run(config, rows, results, total))
        except (KeyboardInterrupt, asyncio.CancelledError):
            _say(f"stopped after {results.counts.rows} of {total} lines; run the same command again to continue")
            raise KeyboardInterrupt from None
        except OctavoError:
            if results.counts.rows:
                _say(f"{results.counts.rows} of {total} lines are done; run the same command again to continue")
            raise
        counts = results.counts
        _say(f"{counts.completed} lines answered, {counts.failed} failed: {target}")


async def _run(config: EngineConfig, rows: Rows, results: ResultFile, total: int) -> None:
    main = asyncio.current_task()
    assert main is not None

    def stop() -> None:
        main.cancel()

    with on_signals(stop):
        async with _loaded(config) as app:
            at_once = config.max_batch_size * config.data_parallel_size + min(WAITING, config.max_batch_size)
            batch = BatchRun(app, FixedSlots(at_once), WINDOWS * at_once)
            try:
                with progress(total, results.counts) as show:
                    async with contextlib.aclosing(batch.results(rows)) as groups:
                        async for group in groups:
                            results.write(group)
                            show()
            finally:
                results.sync()


@contextlib.asynccontextmanager
async def _loaded(config: EngineConfig) -> AsyncGenerator[Any, None]:
    """Load the model in a process of its own and yield the server's application."""
    fleet = Fleet.begin(FleetSpec([ModelSpec(config=config)]), EngineProcess())
    try:
        await fleet.start()
        gc.collect()
        gc.freeze()
        yield create_app(fleet, ServerConfig())
    finally:
        await fleet.close()


@contextlib.contextmanager
def progress(total: int, counts: Counts) -> Generator[Callable[[], None], None, None]:
    """Show the progress of a batch on stderr: a bar on a terminal, otherwise a line from time to time.

    Yields a function to call after `counts` have changed.
    """
    began, first = time.monotonic(), counts.rows

    def rates() -> str:
        seconds = max(time.monotonic() - began, 1e-3)
        tokens = counts.completion_tokens / seconds
        return f"{(counts.rows - first) / seconds:.1f} lines/s, {tokens:.0f} tokens/s, {counts.failed} failed"

    if not sys.stderr.isatty():
        yield _Lines(total, counts, first, rates).show
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from octavo.terminal import console

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=first, rates="")
        yield lambda: bar.update(task, completed=counts.rows, rates=rates())


class _Lines:
    """Prints a line of progress every REPORT_SECONDS."""

    def __init__(self, total: int, counts: Counts, first: int, rates: Callable[[], str]):
        self._total, self._counts, self._first, self._rates = total, counts, first, rates
        self._began = self._last = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._last < REPORT_SECONDS:
            return
        self._last = now
        done = self._counts.rows
        left = (now - self._began) * (self._total - done) / max(done - self._first, 1)
        _say(f"{done} of {self._total} lines, {self._rates()}, {left:.0f} s left")


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"octavo: {printable(message, lines=False)}", file=sys.stderr, flush=True)
