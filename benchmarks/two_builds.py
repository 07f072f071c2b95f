"""Compare the steps of two builds of Octavo on SmolLM2.

    python benchmarks/two_builds.py OTHER_PYTHON [ROUNDS [RECIPES [THREADS]]]

OTHER_PYTHON is the interpreter of the other build's virtual environment. Both builds hold their models at the same
time, and take turns of a few steps, so that other load on the machine meets both. The ratio is the median over rounds
of the other build's time divided by this one's: above 1, this build is faster. Processor time counts all threads.
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from octavo.config import EngineConfig

RECIPES = ["none", "8bit", "auto"]
STEPS = [(1, 1, 128, 30), (8, 1, 192, 16), (64, 1, 192, 6), (1, 512, 0, 2)]  # sequences, new, before; steps in a turn
TURN = "import sys; sys.path.insert(0, {path!r}); from two_builds import serve; serve()"


def serve() -> None:
    """Read (threads, recipe, sequences, new, before, steps) line by line; answer with the least time of a step."""
    from steps import PAGE_SIZE, step_batch

    from octavo.backends.cpu import load
    from octavo.model import describe_model
    from octavo.weights import open_checkpoint, resolve

    checkpoint = open_checkpoint(resolve("smollm2"))
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    backends: dict[str, Any] = {}
    for line in sys.stdin:
        threads, recipe, sequences, new, before, steps = json.loads(line)
        if recipe not in backends:
            backends[recipe] = load(
                spec, parameters, page_size=PAGE_SIZE, max_batch_tokens=512, max_batch_size=64, max_model_len=8192,
                threads=threads, dtype="auto", quantization=recipe, device="auto",
                progress=lambda done, total: None,
            )  # fmt: skip
            backends[recipe].allocate_kv(512)
        batch = step_batch(sequences, new, before)
        wall, processor = [], []
        for _ in range(steps + 1):
            start = time.perf_counter(), time.process_time()
            backends[recipe].step(batch)
            wall.append(time.perf_counter() - start[0])
            processor.append(time.process_time() - start[1])
        print(json.dumps((min(wall[1:]), min(processor[1:]))), flush=True)


def main() -> None:
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    recipes = sys.argv[3].split(",") if len(sys.argv) > 3 else RECIPES
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else EngineConfig().num_threads
    code = TURN.format(path=sys.path[0])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    builds: list[Any] = [subprocess.Popen([python, "-c", code], **pipes) for python in (sys.argv[1], sys.executable)]

    def turn(build: Any, *question: Any) -> list[float]:
        print(json.dumps(question), file=build.stdin, flush=True)
        answer: list[float] = json.loads(build.stdout.readline())
        return answer

    print("recipe  sequences x new  other ms  this ms  ratio of times (quartiles)  of processor times")
    for recipe in recipes:
        for sequences, new, before, steps in STEPS:
            pairs = []
            for i in range(rounds):
                order = [0, 1] if i % 2 else [1, 0]
                times = {which: turn(builds[which], threads, recipe, sequences, new, before, steps) for which in order}
                pairs.append((times[0], times[1]))
            ratios = [other[0] / this[0] for other, this in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            processor = statistics.median(other[1] / this[1] for other, this in pairs)
            other_ms, this_ms = (1e3 * statistics.median(p[k][0] for p in pairs) for k in (0, 1))
            print(
                f"{recipe:7} {sequences:4} x {new:4} {other_ms:14.2f} {this_ms:8.2f}"
                f"   {middle:.3f} ({low:.3f} to {high:.3f})   {processor:.3f}",
                flush=True,
            )
    for build in builds:
        build.stdin.close()
        build.wait()


if __name__ == "__main__":
    main()
