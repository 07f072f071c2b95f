"""Latencies of a quiet tenant beside a flood, by scheduling policy: python benchmarks/policies.py [--plot FILE]

In every round the quiet tenant sends a few requests at once: alone; beside a tenant that sends as many, so that each
has half the batch (an equal share); and beside one that sends 50 times as many. The quiet tenant's requests are marked
as urgent, which `priority` and `deadline` take into account. A real engine on SmolLM2; latencies from arrival, means
and 95th percentiles.
"""

import argparse
import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo import LLM, SamplingParams
from octavo.config import POLICIES
from octavo.outputs import RequestOutput

COMPANY = {"alone": 0, "equal share": 1, "flood": 50}  # requests of the other tenant for each of the quiet one's
QUIET_TERMS: dict[str, Any] = {"tenant": "quiet", "priority": -1, "ttft_target": 1.0}


@dataclass(frozen=True)
class Latencies:
    """Of one tenant's requests, in seconds: mean and 95th percentile."""

    first_token: tuple[float, float]
    whole: tuple[float, float]

    @classmethod
    def of(cls, outputs: list[RequestOutput]) -> "Latencies":
        metrics = [output.metrics for output in outputs]
        first = [m.first_token_time - m.arrival_time for m in metrics]
        whole = [m.finished_time - m.arrival_time for m in metrics]
        return cls(*((float(np.mean(times)), float(np.percentile(times, 95))) for times in (first, whole)))


def main() -> None:
    args = arguments()
    measured: dict[str, dict[str, tuple[Latencies, Latencies | None]]] = {}
    for policy in args.policies.split(","):
        with LLM(
            args.model,
            scheduling_policy=policy,
            max_batch_size=2 * args.at_once,
            max_batch_tokens=128,
            max_model_len=512,
        ) as llm:
            llm.generate([[5] * args.input_len] * 2 * args.at_once, SamplingParams(max_tokens=8))  # memory is touched
            measured[policy] = {}
            for company, others in COMPANY.items():
                quiet, other = asyncio.run(rounds(llm, args, others))
                measured[policy][company] = (Latencies.of(quiet), Latencies.of(other) if other else None)
    Console(width=120).print(table(measured))
    if args.plot:
        plot(measured, args.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="a second apart (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=4, help="requests of the quiet one, half a batch (%(default)s)")
    parser.add_argument("--input-len", type=int, default=48, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=24, help="tokens to generate for each (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the quiet one's latencies: a .png or .svg file")
    return parser.parse_args()


async def rounds(llm: LLM, args: argparse.Namespace, others: int) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """What came of the quiet tenant's requests, and of the other's, which arrive just before in each round."""
    draw = random.Random(0)
    params = SamplingParams(max_tokens=args.output_len, ignore_eos=True, temperature=0)

    def ask(count: int, **terms: Any) -> "asyncio.Task[list[RequestOutput]]":
        prompts = [[draw.randrange(1000, 40_000) for _ in range(args.input_len)] for _ in range(count)]
        return asyncio.create_task(llm.agenerate(prompts, params, **terms))

    quiet, other = [], []
    for _ in range(args.rounds):
        if others:
            other.append(ask(others * args.at_once, tenant="other"))
        quiet.append(ask(args.at_once, **QUIET_TERMS))
        await asyncio.sleep(1)
    return [o for task in quiet for o in await task], [o for task in other for o in await task]


def table(measured: dict[str, dict[str, tuple[Latencies, Latencies | None]]]) -> Table:
    columns = ("quiet: first token, ms", "whole, ms", "whole / equal share", "other: first token, ms", "whole, ms")
    shown = Table("policy", "the quiet one", *columns)
    for policy, companies in measured.items():
        equal, _ = companies["equal share"]
        for company, (quiet, other) in companies.items():
            cells = [spread(quiet.first_token), spread(quiet.whole), f"{quiet.whole[0] / equal.whole[0]:.2f}"]
            cells += [spread(other.first_token), spread(other.whole)] if other else ["", ""]
            shown.add_row(policy, company, *cells, end_section=company == "flood")
    return shown


def spread(seconds: tuple[float, float]) -> str:
    mean, tail = (f"{value * 1e3:,.0f}" for value in seconds)
    return f"{mean} ({tail})"


def plot(measured: dict[str, dict[str, tuple[Latencies, Latencies | None]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(measured))
    for i, company in enumerate(COMPANY):
        means = [companies[company][0].whole[0] for companies in measured.values()]
        tails = [companies[company][0].whole[1] for companies in measured.values()]
        bars = axes.bar(places + 0.27 * (i - 1), means, 0.25, label=company)
        axes.bar_label(bars, [f"{mean:.2g}" for mean in means], label_type="center", fontsize=8)
        axes.plot(places + 0.27 * (i - 1), tails, "k_", label="95th percentile" if company == "flood" else None)
    axes.set(
        yscale="log",
        ylim=(0.1, None),
        ylabel="Seconds until the quiet tenant's answer",
        xticks=places,
        xticklabels=list(measured),
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(title="The quiet tenant is", ncols=2)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file)


if __name__ == "__main__":
    main()
