"""Python's time per step, by policy: python benchmarks/scheduling.py [--running 2000] [--waiting 10000]

A real engine on a backend that computes nothing: schedule (with the policy), build (the arrays of the step) and advance
(recording its tokens). Requests end and others are admitted all the time. Medians, and 95th percentiles.
"""

import argparse
import random
import statistics
import time
from types import SimpleNamespace

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo.backends.base import ComputesAtOnce, StepBatch, StepResult
from octavo.config import POLICIES, EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import load_policy
from octavo.engine.messages import EngineRequest
from octavo.engine.running_ahead import rows_of
from octavo.params import SamplingParams

PAGE_SIZE, VOCAB, MAX_TOKENS = 32, 50_000, 512
PHASES = ("schedule", "build", "advance")


class NoBackend(ComputesAtOnce):
    """A Backend that computes nothing: every token is 7."""

    page_size, page_bytes = PAGE_SIZE, 0
    spec = SimpleNamespace(vocab_size=VOCAB, hidden_size=0)

    def step(self, batch: StepBatch) -> StepResult:
        return StepResult(np.full(len(batch.sample_rows), 7, np.int32))

    def copy_page(self, source: int, target: int) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=2000, help="sequences that run (default: %(default)s)")
    parser.add_argument("--waiting", type=int, default=10_000, help="sequences that wait (default: %(default)s)")
    parser.add_argument("--tenants", type=int, default=100, help="tenants they belong to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="steps of each policy (default: %(default)s)")
    args = parser.parse_args()
    if min(args.running, args.waiting, args.tenants, args.steps) < 1:
        parser.error("all of them must be at least 1")
    table = Table("policy", *(f"{phase}, µs" for phase in PHASES), "all, ms")
    for policy in POLICIES:
        taken = [sorted(phase) for phase in zip(*steps(policy, args), strict=True)]
        medians = [statistics.median(phase) for phase in taken]
        tails = [phase[len(phase) * 95 // 100] for phase in taken]
        cells = [f"{median * 1e6:.0f} ({tail * 1e6:.0f})" for median, tail in zip(medians, tails, strict=True)]
        table.add_row(policy, *cells, f"{sum(medians) * 1e3:.2f}")
    Console(width=120).print(table)


def steps(policy: str, args: argparse.Namespace) -> list[tuple[float, float, float]]:
    """Return the seconds of each step in each of PHASES."""
    requests = Requests(args.tenants)
    engine = Engine(
        NoBackend(),
        num_pages=args.running * (MAX_TOKENS // PAGE_SIZE),
        max_model_len=MAX_TOKENS,
        max_batch_size=args.running,
        max_batch_tokens=args.running + 2048,
        policy=load_policy(EngineConfig(scheduling_policy=policy)),
        clock=requests.clock,
    )
    while engine.scheduler.num_waiting < args.running + args.waiting:
        engine.add(requests.next())
    taken = []
    warming_up = 100  # until about as many end as are admitted
    for i in range(warming_up + args.steps):
        started = time.perf_counter()
        plan = engine.scheduler.schedule()
        planned = time.perf_counter()
        batch = engine._builder.build(plan)
        built = time.perf_counter()
        result = engine.backend.step(batch)
        computed = time.perf_counter()
        engine._advance(plan, *rows_of(plan, batch), result)
        advanced = time.perf_counter()
        if i >= warming_up:
            taken.append((planned - started, built - planned, advanced - computed))
        while engine.scheduler.num_waiting < args.waiting:
            engine.add(requests.next())
    return taken


class Requests:
    """An endless series of requests, the same in every run; most come from a few tenants."""

    def __init__(self, tenants: int):
        self._random = random.Random(0)
        self._tenants = tenants
        self._made = 0

    def clock(self) -> float:
        """Return the time in seconds: a request arrives every millisecond."""
        return self._made / 1000

    def next(self) -> EngineRequest:
        draw = self._random
        self._made += 1
        return EngineRequest(
            id=str(self._made),
            prompt=[draw.randrange(VOCAB) for _ in range(draw.randint(16, 112))],
            params=SamplingParams(max_tokens=draw.randint(64, 192), seed=self._made),
            eos=[2],
            tenant=str(int(draw.paretovariate(1)) % self._tenants),
            priority=draw.randint(0, 4),
            ttft_target=draw.uniform(0.1, 20),
        )


if __name__ == "__main__":
    main()
