"""Octavo beside its peers on this machine: the same shapes, alternately, each engine in a process of its own.

    python benchmarks/peers.py --openvino-python VENV/bin/python --openvino-model EXPORTED_DIR

docs/performance.md says how to set a peer up. Machines are noisy: read the ratio, and the spread beside it.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
Rate = Callable[[int], float]  # number of streams -> output tokens per second


def main(
    openvino_python: Annotated[Path, typer.Option(help="Python of the environment that has openvino-genai.")],
    openvino_model: Annotated[Path, typer.Option(help="Directory that optimum-cli exported.")],
    model: Annotated[str, typer.Option(help="The same model, for Octavo.")] = "smollm2",
    quantization: Annotated[str, typer.Option(help="Octavo's; none is bf16, as the peer's.")] = "none",
    batches: Annotated[str, typer.Option(help="Numbers of streams, comma-separated.")] = "1,64",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each engine at each number of streams.")] = 3,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate, greedy, past end-of-sequence.")] = 128,
) -> None:
    shape = [f"--input-len={input_len}", f"--output-len={output_len}"]
    engines: dict[str, Rate] = {
        "Octavo": lambda streams: octavo(model, quantization, streams, shape),
        "OpenVINO GenAI": lambda streams: peer(
            [openvino_python, HERE / "peer_openvino.py", openvino_model], streams, shape
        ),
    }
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    for _ in range(repeats):
        for streams in map(int, batches.split(",")):
            for name, rate in engines.items():
                before, started = cpu_seconds(), time.perf_counter()
                rates[streams, name].append(rate(streams))
                others = (cpu_seconds() - before) / (time.perf_counter() - started)
                print(f"{name}, {streams} streams: {rates[streams, name][-1]:.0f} tok/s", end="")
                print(f" (others kept {others:.1f} cores busy)", flush=True)
    Console().print(comparison(rates))


def octavo(model: str, quantization: str, streams: int, shape: list[str]) -> float:
    script = str(Path(sys.executable).with_name("octavo"))
    settings = [f"--quantization={quantization}", f"--num-prompts={streams}", *shape]
    command = [script, "bench", "throughput", model, *settings]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run([*command, f"--output-json={report}"], check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(report.read_text())["output_tokens_per_second"])


def peer(command: list[str | Path], streams: int, shape: list[str]) -> float:
    """Run a peer's script; the last line it prints is its output tokens per second."""
    command = [*command, f"--streams={streams}", *shape]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def cpu_seconds() -> float:
    """Processor time that everything but this script's children has used since the machine started."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - children.ru_utime - children.ru_stime


def comparison(rates: dict[tuple[int, str], list[float]]) -> Table:
    """Medians, with the least and the most of the runs, and Octavo's median over each."""
    table = Table("streams", "engine", "output tok/s", "least", "most", "Octavo is", title="medians")
    for (streams, name), runs in sorted(rates.items()):
        median = statistics.median(runs)
        ratio = statistics.median(rates[streams, "Octavo"]) / median
        numbers = (f"{value:,.0f}" for value in (median, min(runs), max(runs)))
        table.add_row(str(streams), name, *numbers, "" if name == "Octavo" else f"{ratio:.2f} x")
    return table


if __name__ == "__main__":
    typer.run(main)
