"""Throughput and latency by the number of engines: python benchmarks/fleet_size.py COST_MODEL --plot docs/scale.svg

The load of docs/scale.md: conversations, 10,000 requests a minute. Of each fleet, one frontend and its engines are
simulated in full, without faults and with many of them.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo.config import EngineConfig
from octavo.simulation import CostModel
from octavo.simulation.conversations import Conversations
from octavo.simulation.fleet.faults import Faults, parse_faults
from octavo.simulation.fleet.fleet import Fleet
from octavo.simulation.fleet.load import GeneratedLoad

FAULTS = "kill=4/hour,suspend=2/hour,partition=2/hour,slow=4/hour"
EACH = 12  # engines per frontend


@dataclass(frozen=True)
class Point:
    """Figures of one fleet: completed requests per minute, and milliseconds to the first token."""

    rate: float
    first: float
    first_p95: float


def main() -> None:
    """Print a table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path, help="cost model, of octavo simulate --measure")
    parser.add_argument("--rate", type=float, default=10_000, help="requests per minute (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5, help="(default: %(default)s)")
    parser.add_argument("--engines", default="12,16,20,24,30,36,48", help="(default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the figures: a .png or .svg file")
    args = parser.parse_args()
    counts = [int(count) for count in args.engines.split(",")]
    costs, conversations = CostModel.load(args.costs), load(args.rate, args.minutes)
    points = {
        name: [point(costs, conversations, count, args.minutes, faults) for count in counts]
        for name, faults in (("no faults", None), ("faults", parse_faults(FAULTS)))
    }
    table = Table(
        "engines", *(f"{name}: {figure}" for name in points for figure in ("a minute", "p50 (ms)", "p95 (ms)"))
    )
    for i, count in enumerate(counts):
        cells = [(each[i].rate, each[i].first, each[i].first_p95) for each in points.values()]
        table.add_row(f"{count:,}", *(f"{value:,.0f}" for row in cells for value in row))
    Console().print(table)
    if args.plot:
        plot(counts, points, args.rate, args.plot)


def load(rate: float, minutes: float) -> GeneratedLoad:
    """Return conversations of four turns that share system prompts."""
    return GeneratedLoad(
        Conversations(
            requests=round(rate * minutes),
            rate=rate / 60,
            turns=4,
            think_time=20,
            input_len=64,
            output_len=128,
            system_prompts=8,
            system_len=256,
            skew=1.0,
            seed=0,
        )
    )


def point(costs: CostModel, conversations: GeneratedLoad, engines: int, minutes: float, faults: Faults | None) -> Point:
    """Return the figures of a fleet of so many engines."""
    fleet = Fleet(
        config=EngineConfig(max_batch_size=64),
        costs=costs,
        pages=1200,
        engines=engines,
        frontends=max(1, round(engines / EACH)),
        cells=1,
        until=60 * minutes,
        faults=faults,
    )
    done = fleet.simulate(conversations)
    ended = float(((done.last >= done.begin) & (done.last < 60 * minutes)).sum())
    rate = ended / (60 * minutes - done.begin) * 60 * fleet.frontends
    first = 1000 * done.steady().time_to_first_token
    return Point(rate, float(np.median(first)), float(np.percentile(first, 95)))


def plot(counts: list[int], points: dict[str, list[Point]], rate: float, file: Path) -> None:
    """Draw throughput on the left, and the time to the first token on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, each), style in zip(points.items(), ("o-", "s--"), strict=True):
        left.plot(counts, [point.rate for point in each], style, label=name)
        right.plot(counts, [point.first for point in each], style, label=f"{name}, median")
        right.plot(counts, [point.first_p95 for point in each], style, label=f"{name}, 95th percentile")
    left.axhline(rate, color="gray", linewidth=0.8)
    left.set(xlabel="Engines", ylabel="Completed requests per minute", ylim=(0, None))
    right.set(xlabel="Engines", ylabel="Time to first token (ms)", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
