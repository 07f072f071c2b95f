"""Progress bars, shown only if stderr is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec


@contextlib.contextmanager
def loading_bar(label: str = "loading weights") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for loading weights or similar work. Yield a function to call with (done, total) bytes."""
    if not sys.stderr.isatty() or not find_spec("rich"):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("load", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def generation_bar(num_requests: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of requests and tokens per second.

    Yield a function to call with the number of output tokens of each finished request.
    """
    if not enabled or not sys.stderr.isatty() or not find_spec("rich"):
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    speed = TextColumn("{task.fields[speed]} tokens/s")
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), speed, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generate", total=num_requests, speed="-")
        tokens = 0

        def advance(new: int) -> None:
            nonlocal tokens
            tokens += new
            elapsed = bar.tasks[0].elapsed
            bar.update(task, advance=1, speed=f"{tokens / elapsed:.0f}" if elapsed else "-")

        yield advance
