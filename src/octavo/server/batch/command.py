"""octavo run-batch: answer a file of requests without a server."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.server.config import ServerConfig

from .lines import Row, Rows
from .local import LocalBatch
from .progress import say, summary
from .results import ResultFile


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

        def open_rows(_: AsyncLLM) -> Iterator[Row]:
            return rows

        total = _count_lines(source)
        if results.counts.rows < total:
            LocalBatch(config, results, total).run(open_rows)
        say(f"{summary(results.counts, 'lines')}: {target}")


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
