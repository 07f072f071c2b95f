"""Answer the rows of a batch without a server: load the model, send every row to the routes, write the results."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import uvloop

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import EngineDead
from octavo.fleet.fleet import Fleet
from octavo.fleet.specs import FleetSpec, ModelSpec
from octavo.frontend.links.process import EngineProcess
from octavo.server.app import create_app
from octavo.server.config import ServerConfig
from octavo.server.edge.draining import on_signals

from .lines import Row
from .progress import progress, say
from .results import ResultFile
from .run import BatchRun, FixedSlots

WAITING = 64  # requests that wait in the engine, so that a new one can start as soon as another has finished
WINDOWS = 4  # rows that may be started before the oldest one has finished, in multiples of the requests that run


@dataclass(frozen=True)
class LocalBatch:
    """Rows to be answered by a model that is loaded for them.

    Args:
        total: number of rows, those included that an earlier run has finished.
        unit: what the rows are called in messages.
    """

    config: EngineConfig
    results: ResultFile
    total: int
    unit: str = "lines"

    def run(self, open_rows: Callable[[AsyncLLM], Iterator[Row]]) -> None:
        """Load the model, and answer the rows after those that have results.

        Args:
            open_rows: returns the rows that have no results yet; called with the loaded model.

        Raises errors of loading the model, EngineDead, and KeyboardInterrupt after Ctrl-C or SIGTERM. Then, prints how
        to continue.
        """
        with self._advice():
            uvloop.run(self._run(open_rows))

    async def _run(self, open_rows: Callable[[AsyncLLM], Iterator[Row]]) -> None:
        main = asyncio.current_task()
        assert main is not None

        def stop() -> None:
            main.cancel()

        with on_signals(stop):
            async with _loaded(self.config) as (app, llm):
                rows = await asyncio.to_thread(open_rows, llm)
                if done := self.results.counts.rows:
                    say(f"continuing after {done} of {self.total} {self.unit}")
                await self._answer(app, rows)

    async def _answer(self, app: Any, rows: Iterator[Row]) -> None:
        config, results = self.config, self.results
        at_once = config.max_batch_size * config.data_parallel_size + min(WAITING, config.max_batch_size)
        batch = BatchRun(app, FixedSlots(at_once), WINDOWS * at_once)
        began = time.monotonic()
        try:
            with progress(self.total, results.counts, self.unit) as show:
                async with contextlib.aclosing(batch.results(rows)) as groups:
                    async for group in groups:
                        results.write(group)
                        show()
        finally:
            results.sync()
            results.counts.seconds = time.monotonic() - began

    @contextlib.contextmanager
    def _advice(self) -> Generator[None]:
        try:
            yield
        except (KeyboardInterrupt, asyncio.CancelledError):
            say(f"stopped after {self._done}; run the same command again to continue")
            raise KeyboardInterrupt from None
        except EngineDead:
            if self.results.counts.rows:
                say(f"{self._done} are done; run the same command again to continue")
            raise

    @property
    def _done(self) -> str:
        return f"{self.results.counts.rows} of {self.total} {self.unit}"


@contextlib.asynccontextmanager
async def _loaded(config: EngineConfig) -> AsyncGenerator[tuple[Any, AsyncLLM], None]:
    """Load the model in a process of its own and yield the server's application, and the model."""
    fleet = Fleet.begin(FleetSpec([ModelSpec(config=config)]), EngineProcess())
    try:
        await fleet.start()
        gc.collect()
        gc.freeze()
        yield create_app(fleet, ServerConfig()), fleet.default.llm
    finally:
        await fleet.close()
