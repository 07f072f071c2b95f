"""octavo run-batch on many rows: its memory while it is killed again and again, and its speed beside the engine's.

    python benchmarks/run_batch.py rows [--rows 100000] [--kills 5] [--model DIRECTORY]
    python benchmarks/run_batch.py speed [--model smollm2] [--rows 512] [--input-len 128] [--output-len 128]

`rows` answers a file of short requests, by default with a tiny random model. The command is killed with SIGKILL, with
its engine, after equal shares of the rows, and started again. Printed: whether every row has one result, in order, and
how much the memory (PSS) of all processes grows in each run after its first rows. The KV cache is small, so that these
fill it.

`speed` compares the output tokens per second of `run-batch` with those of `octavo bench throughput` on random prompts
of the same lengths, in alternating runs. Neither counts the loading of the model.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OCTAVO = [sys.executable, "-c", "from octavo.cli import main; main()"]
WARM_UP = 5_000  # rows after which memory is measured for the first time
LOOK = 0.1  # seconds between two looks at the output


def write_rows(path: Path, count: int, prompts: Iterator[str | list[int]], output_len: int) -> None:
    with path.open("w") as file:
        for number, prompt in zip(range(count), prompts, strict=False):
            body = {"prompt": prompt, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
            line = {"custom_id": f"row {number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


class BatchProcess:
    """A running `octavo run-batch` whose output grows. Its engine and it are one process group."""

    def __init__(self, folder: Path, flags: list[str]):
        command = [*OCTAVO, "run-batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), *flags]
        self._output = folder / "out.jsonl"
        self._output.touch()
        self._read, self.rows = 0, 0
        self.look()
        self.first = self.rows
        self.process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)

    def look(self) -> int:
        """Return the number of rows that are answered."""
        with self._output.open("rb") as file:
            file.seek(self._read)
            while content := file.read(2**20):
                self._read += len(content)
                self.rows += content.count(b"\n")
        return self.rows

    def memory(self) -> int:
        """Return the bytes of memory of all processes; pages that they share are counted once."""
        return sum(map(_proportional, self._group()))

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def _group(self) -> Iterator[int]:
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(ValueError, OSError):
                if os.getpgid(int(folder.name)) == self.process.pid:
                    yield int(folder.name)


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        if match := re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    return 0


@dataclass
class Memory:
    """What the processes of one run took, by the number of rows answered in this run."""

    samples: list[tuple[int, int]] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Return the bytes by which the most memory after the warm-up exceeds the memory at its end."""
        late = [memory for rows, memory in self.samples if rows >= WARM_UP]
        return max(late) - late[0] if late else 0


def run_until(run: BatchProcess, rows: int) -> Memory:
    """Wait until so many rows are answered, or the command has ended."""
    memory, looked = Memory(), 0.0
    while run.process.poll() is None and run.look() < rows:
        if time.monotonic() - looked > 1.0:
            looked = time.monotonic()
            memory.samples.append((run.rows - run.first, run.memory()))
        time.sleep(LOOK)
    return memory


def measure_rows(arguments: argparse.Namespace, folder: Path) -> None:
    count = arguments.rows
    numbers = random.Random(0)
    texts = (f"Row {number}: {numbers.randrange(10**9)} is" for number in range(count))
    write_rows(folder / "in.jsonl", count, texts, arguments.output_len)
    began = time.monotonic()
    for kill in range(arguments.kills + 1):
        run = BatchProcess(folder, arguments.flags)
        memory = run_until(run, count * (kill + 1) // (arguments.kills + 1))
        if kill < arguments.kills:
            run.kill()
        else:
            _, errors = run.process.communicate()
            if run.process.returncode:
                raise SystemExit(errors)
        first, last = memory.samples[0], memory.samples[-1]
        print(
            f"run {kill + 1}: rows {run.first} to {run.look()}, memory {first[1] / 1e6:.0f} MB at first, "
            f"{last[1] / 1e6:.0f} MB at last, grown by {memory.growth / 1e6:.1f} MB after {WARM_UP} rows",
            flush=True,
        )
    seconds = time.monotonic() - began
    with (folder / "out.jsonl").open() as file:
        ids = [json.loads(line)["custom_id"] for line in file]
    is_right = ids == [f"row {number}" for number in range(count)]
    print(f"{count} rows, each once and in order: {is_right}; {count / seconds:.0f} rows/s, starts included")


def batch_speed(arguments: argparse.Namespace, folder: Path, seed: int) -> float:
    """Return the output tokens per second of run-batch."""
    numbers = random.Random(seed)
    prompts = ([numbers.randrange(1000, 40_000) for _ in range(arguments.input_len)] for _ in range(arguments.rows))
    write_rows(folder / "in.jsonl", arguments.rows, prompts, arguments.output_len)
    (folder / "out.jsonl").unlink(missing_ok=True)
    run = BatchProcess(folder, arguments.flags)
    _, errors = run.process.communicate()
    rate = re.search(r"answered.* ([\d.]+) tokens/s", errors)
    if run.process.returncode or not rate:
        raise SystemExit(errors)
    return float(rate[1])


def engine_speed(arguments: argparse.Namespace, folder: Path, seed: int) -> float:
    """Return the output tokens per second of the engine alone."""
    figures = folder / "figures.json"
    lengths = ["--input-len", str(arguments.input_len), "--output-len", str(arguments.output_len)]
    counts = ["--num-prompts", str(arguments.rows), "--seed", str(seed), "--output-json", str(figures)]
    command = [*OCTAVO, "bench", "throughput", *lengths, *counts, *arguments.flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads(figures.read_text())["output_tokens_per_second"])


def measure_speed(arguments: argparse.Namespace, folder: Path) -> None:
    batch, engine = [], []
    for seed in range(arguments.rounds):
        engine.append(engine_speed(arguments, folder, seed))
        batch.append(batch_speed(arguments, folder, seed))
        print(f"bench throughput {engine[-1]:.0f} tok/s, run-batch {batch[-1]:.0f} tok/s", flush=True)
    share = statistics.median(batch) / statistics.median(engine)
    print(f"medians: {statistics.median(engine):.0f} and {statistics.median(batch):.0f} tok/s, {share:.1%}")


def tiny_model(folder: Path) -> str:
    """Write a tiny random model and return its path."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from tiny_models import save_tiny_model

    return str(save_tiny_model("llama", folder / "model"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    rows = commands.add_parser("rows")
    rows.set_defaults(measure=measure_rows)
    rows.add_argument("--rows", type=int, default=100_000)
    rows.add_argument("--kills", type=int, default=5)
    rows.add_argument("--output-len", type=int, default=4)
    rows.add_argument("--model", help="by default a tiny random one")
    speed = commands.add_parser("speed")
    speed.set_defaults(measure=measure_speed)
    speed.add_argument("--model", default="smollm2")
    speed.add_argument("--rows", type=int, default=512)
    speed.add_argument("--input-len", type=int, default=128)
    speed.add_argument("--output-len", type=int, default=128)
    speed.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments.flags = ["--model", arguments.model or tiny_model(folder)]
        if arguments.measure is measure_rows:
            arguments.flags += ["--kv-cache-memory", "64MiB"]
        arguments.measure(arguments, folder)


if __name__ == "__main__":
    main()
