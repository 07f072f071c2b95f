"""What the host's work between steps costs where steps are computed elsewhere: on a device that takes 10 ms for each.

    .venv/bin/python benchmarks/overlap.py

The device is simulated: it computes one step after the other, each for the same time, and the engine waits until a
result is due. The host's work is a busy loop after each step, besides the engine's own. With `--streams`, so many
sequences decode at once. It prints the share of the device's throughput that is left, with steps that are launched
ahead and with steps that are not.
"""

import argparse
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from scheduling import PAGE_SIZE, NoBackend

from octavo.backends.base import StepBatch, StepResult
from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest
from octavo.params import SamplingParams

PROMPT = 8
WARM_UP = 20  # steps


@dataclass(frozen=True)
class Due:
    """A step on the device: its result, and when it is there."""

    at: float
    computed: StepResult

    def result(self) -> StepResult:
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return self.computed


class Device(NoBackend):
    """A NoBackend with a device that takes `seconds` for a step."""

    def __init__(self, seconds: float, runs_ahead: bool):
        self.runs_ahead = runs_ahead
        self._seconds, self._free_at = seconds, 0.0

    def launch(self, batch: StepBatch) -> Due:
        self._free_at = max(time.perf_counter(), self._free_at) + self._seconds
        return Due(self._free_at, self.step(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=10.0, help="ms of a step on the device (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="sequences (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: %(default)s)")
    parser.add_argument(
        "--host", type=float, nargs="+", default=[0, 1, 2, 4, 8], help="ms of work on the host after a step"
    )
    args = parser.parse_args()
    if min(args.step, args.streams, args.steps) <= 0 or min(args.host) < 0:
        parser.error("--step, --streams and --steps must be positive, and --host not negative")
    table = Table("host, ms", "launched ahead", "not ahead")
    for host in args.host:
        shares = [args.step / 1e3 / seconds_per_step(args, host / 1e3, ahead) for ahead in (True, False)]
        table.add_row(f"{host:g}", *(f"{share:.1%}" for share in shares))
    Console().print(table)


def seconds_per_step(args: argparse.Namespace, host: float, runs_ahead: bool) -> float:
    """Return the seconds between two steps, each with `host` seconds of further work on the host."""
    length = PROMPT + WARM_UP + args.steps + 10
    engine = Engine(
        Device(args.step / 1e3, runs_ahead),
        num_pages=args.streams * (length // PAGE_SIZE + 2),
        max_model_len=length,
        max_batch_size=args.streams,
        max_batch_tokens=args.streams * PROMPT,
    )
    for i in range(args.streams):
        engine.add(EngineRequest(str(i), [i % 1000] * PROMPT, SamplingParams(max_tokens=length - PROMPT)))
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            began = time.perf_counter()
        assert len(engine.step()) == args.streams
        until = time.perf_counter() + host
        while time.perf_counter() < until:
            pass
    return (time.perf_counter() - began) / args.steps


if __name__ == "__main__":
    main()
