"""Results of a simulated fleet: figures by their names in the JSON report, a table, and a verdict."""

import dataclasses
import math
from typing import Any

from rich.table import Table

from octavo.simulation.report import SPREADS, spread_of, spreads_table
from octavo.terminal import console as plain_console
from octavo.terminal import printable

from .fleet import Fleet
from .frontend_costs import frontend_use
from .plan import capacity
from .record import Done

HOUR = 3600


def summarize(done: Done, fleet: Fleet, price: float | None) -> dict[str, Any]:
    """Return the figures of a fleet, those of cells that were not simulated included.

    Args:
        price: of an engine for an hour.
    """
    use, seconds = done.use, done.use.seconds / max(1, done.use.frontends) or math.inf
    scale = fleet.frontends / max(1, use.frontends)  # all cells / simulated ones
    engines = use.engine_seconds / use.seconds * use.frontends * scale if use.seconds else float(fleet.engines)
    steady, rate = done.steady(), scale * done.rate
    input_tokens, output_tokens = int(steady.prompt.sum()), int(steady.output.sum())
    tokens_per_second = rate * output_tokens / max(1, len(steady.arrival))
    sustained = capacity(done, fleet)
    hours = scale * use.engine_seconds / HOUR
    times = (steady.time_to_first_token, steady.time_per_token, steady.last - steady.arrival)
    resources = {
        "engines": rate / engines / sustained if sustained else 0.0,
        "kv pages": use.page_seconds / max(use.busy_seconds, 1e-9) / max(1, use.num_pages),
        "batch slots": use.running_seconds / max(use.busy_seconds, 1e-9) / max(1, use.max_running),
        "frontends": frontend_use(done),
    }
    return {
        "frontends": fleet.frontends,
        "frontends_simulated": use.frontends,
        "engines": fleet.engines,
        "engines_mean": engines,
        "engines_most": scale * use.most_engines,
        "requests": len(done.arrival) + sum(done.problems.values()),
        "completed": len(done.arrival),
        "failed": dict(done.problems),
        "duration_seconds": seconds,
        "requests_per_second": rate,
        "output_tokens_per_second": tokens_per_second,
        "warm_up_seconds": done.begin,
        "sustained_per_engine": sustained,
        **{key: spread_of(1000 * seconds) for key, seconds in zip(SPREADS, times, strict=True)},
        "prefix_hit_rate": float(steady.cached.sum()) / input_tokens if input_tokens else 0.0,
        "resources": resources,
        "saturates_first": max(resources, key=resources.__getitem__),
        "messages_per_frontend_per_second": use.steps / use.seconds if use.seconds else 0.0,
        "tokens_per_frontend_per_second": tokens_per_second / fleet.frontends,
        "engine_hours": hours,
        "cost": None if price is None else hours * price,
        "cost_per_million_output_tokens": _per_million(price, hours, scale * int(done.output.sum())),
        "use": dataclasses.asdict(use) | {"faults": dict(use.faults)},
    }


def print_report(summary: dict[str, Any]) -> None:
    """Print a summary as tables, with what saturates first."""
    use, console = summary["use"], plain_console()
    figures = Table("", "", show_header=False)
    figures.columns[1].justify = "right"
    simulated = f"{summary['frontends_simulated']:,} of {summary['frontends']:,}"
    rows = [
        ("Engines", f"{summary['engines']:,}"),
        ("Frontends simulated in full", simulated),
        ("Requests simulated", f"{summary['requests']:,}"),
        ("Completed", f"{summary['completed']:,}"),
        ("Duration (s)", f"{summary['duration_seconds']:,.1f}"),
        ("Warm-up, not in the figures below (s)", f"{summary['warm_up_seconds']:,.1f}"),
        ("Requests per minute, whole fleet", f"{60 * summary['requests_per_second']:,.0f}"),
        ("Output tokens per second, whole fleet", f"{summary['output_tokens_per_second']:,.0f}"),
        ("Prompt tokens from the cache", f"{summary['prefix_hit_rate']:.1%}"),
        ("Messages per second to a frontend", f"{summary['messages_per_frontend_per_second']:,.0f}"),
        ("Requests moved to an engine without a queue", f"{use['moves']:,}"),
        ("Preemptions", f"{use['preemptions']:,}"),
    ]
    if use["faults"]:
        rows.append(("Faults", ", ".join(f"{count:,} {name}" for name, count in sorted(use["faults"].items()))))
        rows.append(("Requests that went on on another engine", f"{use['resumed']:,}"))
    if use["scale_outs"] or use["scale_ins"]:
        rows.append(("Engines, mean and most", f"{summary['engines_mean']:,.1f}, {summary['engines_most']:,.0f}"))
        rows.append(("Engines started, drained", f"{use['scale_outs']:,}, {use['scale_ins']:,}"))
    if summary["cost"] is not None:
        rows.append(("Engine hours", f"{summary['engine_hours']:,.2f}"))
        rows.append(("Cost", f"{summary['cost']:,.2f}"))
        rows.append(("Cost per million output tokens", f"{summary['cost_per_million_output_tokens'] or 0:,.3f}"))
    for heading, text in rows:
        figures.add_row(heading, text)
    console.print(figures, spreads_table(summary))
    for problem, count in summary["failed"].items():
        console.print(f"{count:,} failed: {printable(problem, lines=False)}")
    console.print(saturation(summary), soft_wrap=True)


def saturation(summary: dict[str, Any]) -> str:
    """Return a sentence that says how much of each resource the load needs, and which one is short first."""
    first = summary["saturates_first"]
    parts = ", ".join(f"{name} {share:.0%}" for name, share in summary["resources"].items())
    return f"In use: {parts}. What saturates first: {first}."


def _per_million(price: float | None, hours: float, tokens: float) -> float | None:
    return None if price is None or not tokens else hours * price / tokens * 1e6
