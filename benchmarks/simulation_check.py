"""The accuracy of `octavo simulate`: python benchmarks/simulation_check.py

A cost model is measured on an engine, which then serves traces in real time: a light load, one near capacity, and one
above it. The simulator replays the same traces in virtual time. Near capacity the queue amplifies small errors; so the
first row of each load compares the total duration of the real run's steps with what the model predicts for the same
steps. The load of other processes, which disturbs the comparison, is printed beside each. On a busy machine, use
--cpu-time: it counts the CPU time of one compute thread instead of wall-clock time.
"""

import argparse
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo.backends.base import Backend, ComputesAtOnce, StepBatch, StepResult
from octavo.config import EngineConfig
from octavo.engine.loading import load_engine
from octavo.simulation import Shape
from octavo.simulation.measure import measure
from octavo.simulation.replay import Replay, replay, simulate
from octavo.simulation.report import summarize
from octavo.simulation.trace import TraceRequest
from octavo.weights import resolve

LOADS = {"light": 0.4, "near capacity": 0.8, "overloaded": 2.0}  # request rates, as fractions of the sustained one
INPUT, OUTPUT = (16, 400), (16, 160)  # tokens: minimum and maximum
PROBE = 200  # requests at once, to find the sustained rate


class Recorder(ComputesAtOnce):
    """A Backend that records the shapes of its steps."""

    def __init__(self, backend: Backend):
        self.spec, self.page_size, self.page_bytes = backend.spec, backend.page_size, backend.page_bytes
        self.shapes: list[Shape] = []
        self._backend = backend

    def step(self, batch: StepBatch) -> StepResult:
        self.shapes.append(Shape.of(batch))
        return self._backend.step(batch)


class CpuClock:
    """CPU seconds of this process, and those that it was told to wait."""

    def __init__(self) -> None:
        self._waited = 0.0

    def __call__(self) -> float:
        return time.process_time() + self._waited

    def wait(self, seconds: float) -> None:
        self._waited += seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="A simulation beside the real run of the same traces.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--seconds", type=float, default=40, help="of arrivals, for each load (default: %(default)s)")
    parser.add_argument("--max-batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, in place of time on the wall")
    args = parser.parse_args()
    config = EngineConfig(
        model=args.model,
        quantization=args.quantization,
        max_batch_size=args.max_batch_size,
        kv_cache_memory="850MiB",  # all of it is touched in measuring: memory is slow the first time
        max_queue=10**6,
        threads=1 if args.cpu_time else None,
    )
    engine = load_engine(config, resolve(config.model))
    wait = time.sleep
    if args.cpu_time:
        engine.clock = clock = CpuClock()
        wait = clock.wait
    costs, ratios = measure(engine, config, time.process_time if args.cpu_time else time.perf_counter)
    print(f"costs: off by {np.median(np.abs(np.array(ratios) - 1)):.1%} in the median of the steps timed")
    num_pages, vocabulary = engine.kv.pool.num_pages, engine.backend.spec.vocab_size
    probe = simulate(trace(PROBE, None, vocabulary), config, costs, num_pages)
    sustained = PROBE / probe.seconds
    engine.backend = recorder = Recorder(engine.backend)
    table = Table("Load", "", "Real", "Simulated", "Off by", title=f"Sustains {60 * sustained:,.0f} a minute")
    for name, part in LOADS.items():
        recorder.shapes.clear()
        arrivals = trace(max(20, round(args.seconds * part * sustained)), part * sustained, vocabulary)
        before, started = others_seconds(), time.perf_counter()
        real = replay(arrivals, engine, wait, max_live=10**6)
        others = (others_seconds() - before) / (time.perf_counter() - started)
        rows = [("its steps, together (s)", real.busy, sum(map(costs.seconds, recorder.shapes)))]
        simulated = figures(simulate(arrivals, config, costs, num_pages))
        rows += [(heading, value, simulated[heading]) for heading, value in figures(real).items()]
        cells = [f"{name}\n(others kept\n{others:.1f} cores busy)", "", "", "", ""]
        for column, text in enumerate(zip(*map(texts, rows), strict=True), 1):
            cells[column] = "\n".join(text)
        table.add_row(*cells, end_section=True)
    Console().print(table)


def texts(row: tuple[str, float, float]) -> tuple[str, str, str, str]:
    heading, real, modeled = row
    return heading, f"{real:,.2f}", f"{modeled:,.2f}", f"{modeled / real - 1:+.1%}"


def others_seconds() -> float:
    """Return the CPU time that all other processes of this machine have used, in seconds."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - mine.ru_utime - mine.ru_stime


def trace(requests: int, rate: float | None, vocabulary: int) -> list[TraceRequest]:
    """Return requests with random prompts, arriving at `rate` per second, or all at once if it is None."""
    rng = random.Random(requests)
    at, made = 0.0, []
    for _ in range(requests):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(*INPUT))]
        made.append(TraceRequest(at=at, prompt=prompt, output_tokens=rng.randint(*OUTPUT)))
        at += rng.expovariate(rate) if rate else 0.0
    return made


def figures(run: Replay) -> dict[str, float]:
    summary = summarize(run)
    return {
        "output tokens/s": summary["output_tokens_per_second"],
        "first token, mean (s)": summary["time_to_first_token_ms"]["mean"] / 1000,
        "whole request, mean (s)": summary["request_latency_ms"]["mean"] / 1000,
        "whole request, p95 (s)": summary["request_latency_ms"]["p95"] / 1000,
    }


if __name__ == "__main__":
    main()
