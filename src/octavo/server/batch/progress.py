"""Show on stderr how far a batch is, how fast it goes and how long it will take."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator

from octavo.terminal import console, printable

from .results import Counts

REPORT_SECONDS = 10.0  # between lines of progress if stderr is not a terminal


@contextlib.contextmanager
def progress(total: int, counts: Counts, unit: str = "lines") -> Generator[Callable[[], None], None, None]:
    """Show the progress of a batch: a bar on a terminal, otherwise a line from time to time.

    Yields a function to call after `counts` have changed.

    Args:
        unit: what is counted.
    """
    began, first = time.monotonic(), counts.rows

    def rates() -> str:
        seconds = max(time.monotonic() - began, 1e-3)
        tokens = counts.completion_tokens / seconds
        return f"{(counts.rows - first) / seconds:.1f} {unit}/s, {tokens:.0f} tokens/s, {counts.failed} failed"

    if not sys.stderr.isatty():
        yield _Lines(total, counts, unit, rates).show
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=first, rates="")
        yield lambda: bar.update(task, completed=counts.rows, rates=rates())


def summary(counts: Counts, unit: str) -> str:
    """Return what a run has done, as text."""
    text = f"{counts.completed} {unit} answered, {counts.failed} failed"
    if not counts.seconds:
        return text
    return f"{text}, in {counts.seconds:.1f} s, {counts.completion_tokens / counts.seconds:.1f} tokens/s"


def say(message: str) -> None:
    """Print one line to stderr, if it is open."""
    with contextlib.suppress(OSError, ValueError):
        print(f"octavo: {printable(message, lines=False)}", file=sys.stderr, flush=True)


class _Lines:
    """Prints a line of progress every REPORT_SECONDS."""

    def __init__(self, total: int, counts: Counts, unit: str, rates: Callable[[], str]):
        self._total, self._counts, self._unit, self._rates = total, counts, unit, rates
        self._first = counts.rows
        self._began = self._last = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._last < REPORT_SECONDS:
            return
        self._last = now
        done = self._counts.rows
        left = (now - self._began) * (self._total - done) / max(done - self._first, 1)
        say(f"{done} of {self._total} {self._unit}, {self._rates()}, {left:.0f} s left")
