"""Results of a simulation: figures by their names in the JSON report, tables, and a verdict."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from octavo.simulation import CostModel
from octavo.terminal import console as plain_console
from octavo.terminal import printable

from .replay import Gauge, Replay, Served

PERCENTILES = ("mean", "p50", "p95", "p99")
NOISY = 0.03  # median error of a cost model above which a warning is printed; on an idle machine it is about 1 %
SPREADS = {  # JSON key -> heading
    "time_to_first_token_ms": "To first token (ms)",
    "time_per_output_token_ms": "Per output token (ms)",
    "request_latency_ms": "Whole request (ms)",
}
LOADS = {"tokens_computed": "tokens computed", "busy": "time with a step running"}  # field of Use -> its description


def summarize(replay: Replay) -> dict[str, Any]:
    """Return the replay's figures. A request that did not get all its tokens counts in `failed` only.

    Of several replicas, the figures of pages, running and waiting sequences are means, and the highest peaks.
    """
    done = [served for served in replay.served if not served.problem]
    input_tokens, output_tokens = sum(s.prompt_tokens for s in done), sum(s.output_tokens for s in done)
    seconds = replay.seconds or math.inf
    replica_seconds = seconds * len(replay.replicas)
    targets = [(served, target) for served in done if (target := served.request.ttft_target) is not None]
    tenants = sorted({served.request.tenant for served in replay.served})
    return {
        "requests": len(replay.served),
        "completed": len(done),
        "failed": dict(Counter(served.problem for served in replay.served if served.problem)),
        "duration_seconds": replay.seconds,
        "requests_per_second": len(done) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (input_tokens + output_tokens) / seconds,
        **_spreads(done),
        "targets_met": sum(_to_first(s) <= target for s, target in targets) / len(targets) if targets else None,
        "tenants": {name: _tenant([s for s in replay.served if s.request.tenant == name]) for name in tenants},
        "num_pages": replay.num_pages,
        "pages_held": _gauge(replay.pages, replica_seconds),
        "running": _gauge(replay.running, replica_seconds),
        "waiting": _gauge(replay.waiting, replica_seconds),
        "prefix_hit_rate": sum(s.cached_tokens for s in done) / input_tokens if input_tokens else 0.0,
        "preemptions": replay.preemptions,
        "pages_fetched": replay.pages_fetched,
        "steps": replay.steps,
        "utilization": replay.busy / seconds,
        "offered_per_second": _offered(replay),
        "replicas": [dataclasses.asdict(use) for use in replay.replicas],
        "busiest_to_mean": {name: _busiest([getattr(use, name) for use in replay.replicas]) for name in LOADS},
        "moves": replay.moves,
    }


def print_report(summary: dict[str, Any]) -> None:
    """Print a summary as tables, with the verdict."""
    figures = Table("", "", show_header=False)
    figures.columns[1].justify = "right"
    pages, held = summary["num_pages"], summary["pages_held"]
    for heading, text in (
        ("Requests", f"{summary['requests']:,}"),
        ("Completed", f"{summary['completed']:,}"),
        ("Duration (s)", f"{summary['duration_seconds']:,.1f}"),
        ("Requests per minute", f"{60 * summary['requests_per_second']:,.0f}"),
        ("Output tokens per second", f"{summary['output_tokens_per_second']:,.0f}"),
        ("Pages held, mean", f"{held['mean']:,.0f} of {pages:,} ({held['mean'] / pages:.0%})"),
        ("Pages held, peak", f"{held['peak']:,} of {pages:,} ({held['peak'] / pages:.0%})"),
        ("Running, mean and peak", f"{summary['running']['mean']:,.1f}, {summary['running']['peak']:,}"),
        ("Waiting, mean and peak", f"{summary['waiting']['mean']:,.1f}, {summary['waiting']['peak']:,}"),
        ("Prompt tokens from the cache", f"{summary['prefix_hit_rate']:.1%}"),
        ("Preemptions", f"{summary['preemptions']:,}"),
        ("Steps", f"{summary['steps']:,}"),
        ("Time with a step running", f"{summary['utilization']:.0%}"),
    ):
        figures.add_row(heading, text)
    if summary["pages_fetched"]:
        figures.add_row("Pages fetched from lower tiers", f"{summary['pages_fetched']:,}")
    if (count := len(summary["replicas"])) > 1:
        figures.add_row("Replicas", f"{count:,}")
        for name, text in LOADS.items():
            figures.add_row(f"Busiest replica / mean: {text}", f"{summary['busiest_to_mean'][name]:.2f}")
        figures.add_row("Requests moved to another replica", f"{summary['moves']:,}")
    if summary["targets_met"] is not None:
        figures.add_row("First tokens in time", f"{summary['targets_met']:.1%}")
    console = plain_console()
    console.print(figures, spreads_table(summary))
    if count > 1:
        console.print(_replicas_table(summary["replicas"]))
    if len(summary["tenants"]) > 1:
        console.print(_tenants_table(summary["tenants"]))
    for problem, count in summary["failed"].items():
        console.print(f"{count:,} failed: {printable(problem, lines=False)}")
    console.print(verdict(summary), soft_wrap=True)


def verdict(summary: dict[str, Any]) -> str:
    """Return a sentence that says whether the engines keep up with the arrival rate (see `sustained_per_second`)."""
    offered, sustained = summary["offered_per_second"], summary["sustained_per_second"]
    count = len(summary["replicas"])
    subject = "this engine sustains" if count == 1 else f"these {count} engines sustain"
    if not sustained:
        return "No request was completed."
    most = f"{60 * sustained:,.0f} per minute"
    if offered is None:
        return f"All requests arrived at once and were served at {most}."
    came = f"Requests arrived at {60 * offered:,.0f} per minute"
    if offered <= sustained:
        keep = "it keeps" if count == 1 else "they keep"
        return f"{came}, {offered / sustained:.0%} of what {subject} ({most}): {keep} up."
    growth, engines = 60 * (offered - sustained), math.ceil(count * offered / sustained)
    return (
        f"{came}, and {subject} {most}: the queue grows by {growth:,.0f} per minute. "
        f"{engines} such engines would keep up."
    )


def print_sweep(rows: Sequence[tuple[dict[str, str], dict[str, Any]]]) -> None:
    """Print a table with a row for each simulation: (values by name, summary). Times are in seconds.

    With several replicas, columns about routing replace those about pages. The load of the busiest replica is that by
    tokens computed or by time, whichever is further above the mean.
    """
    several = any(len(summary["replicas"]) > 1 for _, summary in rows)
    last = ("From\ncache", "Busiest\n/ mean") if several else ("Pages,\npeak", "Queue,\nmean", "Pre-\nempted")
    headings = ("Sustains\n/min", "First\ntoken", "p95", "Whole\nrequest", "p95", *last)
    names = [name.replace("_", "\n") for name in rows[0][0]]
    table = Table(*names, *headings, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in table.columns[len(names) :]:
        column.justify = "right"
    for settings, summary in rows:
        times = [summary[key] or {} for key in ("time_to_first_token_ms", "request_latency_ms")]
        routing = (f"{summary['prefix_hit_rate']:.1%}", f"{max(summary['busiest_to_mean'].values()):.2f}")
        pages = (summary["pages_held"]["peak"], summary["waiting"]["mean"], summary["preemptions"])
        table.add_row(
            *settings.values(),
            f"{60 * summary['sustained_per_second']:,.0f}",
            *(f"{spread[name] / 1000:,.2f}" if spread else "" for spread in times for name in ("mean", "p95")),
            *(routing if several else (f"{value:,.0f}" for value in pages)),
        )
    plain_console().print(table)


def print_costs(costs: CostModel, ratios: Sequence[float]) -> None:
    """Print a cost model and its errors. `ratios`: modeled / measured time of each step that was timed."""
    curves = Table("Rows", "Linear layers (ms)", "If sampled (ms)")
    for column in curves.columns:
        column.justify = "right"
    sampled = dict(costs.sampled_ms)
    for count, ms in costs.rows_ms:
        curves.add_row(f"{count:,}", f"{ms:.2f}", f"{sampled[count]:.2f}" if count in sampled else "")
    console = plain_console()
    console.print(curves)
    console.print(
        f"Attention: {1000 * costs.kv_token_us:,.1f} ns per KV token, {1000 * costs.pair_us:,.1f} per pair. "
        f"Python: {1000 * costs.step_ms:,.0f} µs per step, {costs.sequence_us:,.2f} per sequence, "
        f"{costs.row_us:,.2f} per row.",
        soft_wrap=True,
    )
    errors = np.abs(np.array(ratios) - 1)
    console.print(
        f"Error of the model: {np.median(errors):.1%} in the median of the timed steps, {errors.max():.1%} at most."
    )
    if np.median(errors) > NOISY:
        console.print("This error is large; the machine seems to have been busy. Measure again when it is idle.")


def _tenant(served: Sequence[Served]) -> dict[str, Any]:
    done = [s for s in served if not s.problem]
    return {"requests": len(served), "completed": len(done), **_spreads(done)}


def _spreads(done: Sequence[Served]) -> dict[str, dict[str, float] | None]:
    seconds = (
        [_to_first(s) for s in done],
        [(s.last - s.first) / (s.output_tokens - 1) for s in done if s.first is not None and s.output_tokens > 1],
        [s.last - s.arrival for s in done],
    )
    return {key: spread_of(1000 * np.array(values)) for key, values in zip(SPREADS, seconds, strict=True)}


def spread_of(values: np.ndarray) -> dict[str, float] | None:
    """Return the mean and the percentiles of some values; None if there are none."""
    if not len(values):
        return None
    return dict(zip(PERCENTILES, [float(values.mean()), *np.percentile(values, [50, 95, 99]).tolist()], strict=True))


def _to_first(served: Served) -> float:
    assert served.first is not None
    return served.first - served.arrival


def _busiest(loads: Sequence[float]) -> float:
    """Return the highest load, divided by the mean load."""
    return max(loads) * len(loads) / (sum(loads) or math.inf)


def _gauge(gauge: Gauge, seconds: float) -> dict[str, float]:
    return {"mean": gauge.integral / seconds, "peak": gauge.peak}


def _offered(replay: Replay) -> float | None:
    """Return the arrivals per second; None if all requests arrived at once."""
    span = replay.served[-1].arrival - replay.served[0].arrival
    return (len(replay.served) - 1) / span if span else None


def spreads_table(summary: dict[str, Any]) -> Table:
    """Return the times of a summary as a table, in ms."""
    table = Table("", *PERCENTILES)
    for column in table.columns[1:]:
        column.justify = "right"
    for key, heading in SPREADS.items():
        if spread := summary[key]:
            table.add_row(heading, *(f"{spread[name]:,.1f}" for name in PERCENTILES))
    return table


def _replicas_table(replicas: Sequence[dict[str, Any]]) -> Table:
    table = Table("Replica", "Requests", "Tokens computed", "Seconds with a step running")
    for column in table.columns:
        column.justify = "right"
    for number, use in enumerate(replicas):
        table.add_row(str(number), f"{use['requests']:,}", f"{use['tokens_computed']:,}", f"{use['busy']:,.1f}")
    return table


def _tenants_table(tenants: dict[str, Any]) -> Table:
    table = Table("Tenant", "Requests", "Completed", *SPREADS.values(), title="Mean and p95", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tenant in tenants.items():
        spreads = [tenant[key] for key in SPREADS]
        times = (f"{spread['mean']:,.1f}, {spread['p95']:,.1f}" if spread else "" for spread in spreads)
        table.add_row(
            printable(name, lines=False) or "(none)", f"{tenant['requests']:,}", f"{tenant['completed']:,}", *times
        )
    return table
