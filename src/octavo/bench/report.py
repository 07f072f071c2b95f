"""Results of benchmarks as tables and as JSON, and the progress bar while they run."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from octavo.errors import ConfigError
from octavo.terminal import console as plain_console
from octavo.version import __version__

REFRESH_SECONDS = 0.5  # between redraws of a progress bar, which slow down the measured program

# JSON key -> heading, for figures with a mean and percentiles over requests or tokens
SPREADS = {
    "time_to_first_token_ms": "Time to first token (ms)",
    "inter_token_latency_ms": "Between tokens (ms)",
    "time_per_output_token_ms": "Per output token (ms)",
    "request_latency_ms": "Whole request (ms)",
}
# JSON key -> heading, for single figures, in order
FIGURES = {
    "output_tokens_per_second": "Output tokens per second",
    "total_tokens_per_second": "Total tokens per second",
    "requests_per_second": "Requests per second",
    "completed": "Completed requests",
    "failed": "Failed requests",
    "input_tokens": "Input tokens",
    "output_tokens": "Output tokens",
    "duration_seconds": "Duration (s)",
    "load_seconds": "Loading (s)",
    "python_share": "Python's share of a step",
}


@dataclass(slots=True)
class RequestTimes:
    """One request. Times are in seconds of time.perf_counter().

    Attributes:
        arrivals: The arrival of each token; over HTTP, of each chunk with text.
        error: The reason for a failure; None if the request succeeded.
    """

    sent: float
    input_tokens: int
    output_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """Requests that ran together, and the duration of the run in seconds.

    Attributes:
        python_share: Fraction of the time in engine steps that was spent outside the backend; None if unknown.
    """

    requests: Sequence[RequestTimes]
    seconds: float
    python_share: float | None = None


def summarize(run: Run) -> dict[str, Any]:
    """Return the run's figures by their names in the JSON report. A failed request counts in `failed` only."""
    done = [r for r in run.requests if r.error is None and r.arrivals]
    output_tokens = sum(r.output_tokens for r in done)
    input_tokens = sum(r.input_tokens for r in done)
    summary: dict[str, Any] = {
        "output_tokens_per_second": output_tokens / run.seconds,
        "total_tokens_per_second": (input_tokens + output_tokens) / run.seconds,
        "requests_per_second": len(done) / run.seconds,
        "completed": len(done),
        "failed": len(run.requests) - len(done),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "duration_seconds": run.seconds,
    }
    if run.python_share is not None:
        summary["python_share"] = run.python_share
    gaps = [np.diff(r.arrivals) for r in done]
    spreads = (
        np.array([r.arrivals[0] - r.sent for r in done]),
        np.concatenate(gaps) if gaps else np.array([]),
        np.array([(r.arrivals[-1] - r.arrivals[0]) / (r.output_tokens - 1) for r in done if r.output_tokens > 1]),
        np.array([r.arrivals[-1] - r.sent for r in done]),
    )
    for key, seconds in zip(SPREADS, spreads, strict=True):
        summary[key] = _spread(seconds * 1000)
    return summary


def joined(runs: Sequence[Run]) -> Run:
    """Return consecutive runs as one."""
    seconds = sum(run.seconds for run in runs)
    python_seconds = sum((run.python_share or 0) * run.seconds for run in runs)
    return Run([request for run in runs for request in run.requests], seconds, python_seconds / seconds)


def median_run(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the summary of the run with the median output rate. With several runs, `repeats` has the rate of each."""
    summaries = sorted(map(summarize, runs), key=lambda summary: float(summary["output_tokens_per_second"]))
    chosen = summaries[(len(summaries) - 1) // 2]
    if len(runs) > 1:
        chosen["repeats"] = [summary["output_tokens_per_second"] for summary in summaries]
    return chosen


def show(title: str, settings: dict[str, Any], summary: dict[str, Any], output_json: Path | None) -> None:
    """Print tables of `summary`, and write it with `settings` to a JSON file if one is named. Raises ConfigError."""
    write_json(title, settings, summary, output_json)
    console = plain_console()
    console.print(_figures_table(title, summary), _spreads_table(summary))
    if "repeats" in summary:
        console.print("Output tokens per second of each run:", " ".join(f"{rate:,.0f}" for rate in summary["repeats"]))


def write_json(title: str, settings: dict[str, Any], summary: dict[str, Any], output_json: Path | None) -> None:
    """Write a report to a JSON file; do nothing without one. Raises ConfigError if the file cannot be written."""
    if output_json is None:
        return
    report = {"octavo_version": __version__, "benchmark": title, "settings": settings, **summary}
    try:
        output_json.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {output_json}: {error.strerror}") from None


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if stderr is a terminal. Yields a function to call with the amount of further progress."""
    bar = Progress(console=Console(stderr=True), auto_refresh=False, transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task(label, total=total)
    drawn = 0.0

    def advance(count: int) -> None:
        nonlocal drawn
        bar.advance(task, count)
        if (now := time.perf_counter()) - drawn > REFRESH_SECONDS:
            drawn = now
            bar.refresh()

    with bar:
        yield advance


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def _figures_table(title: str, summary: dict[str, Any]) -> Table:
    table = Table("", "", title=title, title_justify="left", show_header=False)
    table.columns[1].justify = "right"
    for key, heading in FIGURES.items():
        if (value := summary.get(key)) is not None:
            whole = isinstance(value, int)
            table.add_row(
                heading, f"{value:.1%}" if key == "python_share" else f"{value:,}" if whole else f"{value:,.2f}"
            )
    return table


def _spreads_table(summary: dict[str, Any]) -> Table:
    table = Table("", "mean", "p50", "p90", "p99")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, heading in SPREADS.items():
        if spread := summary[key]:
            table.add_row(heading, *(f"{spread[name]:,.2f}" for name in ("mean", "p50", "p90", "p99")))
    return table
