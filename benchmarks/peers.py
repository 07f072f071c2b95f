"""Octavo beside its peers on this machine: the same shapes, alternately, each run in a process of its own.

    python benchmarks/peers.py --openvino PYTHON MODEL --vllm PYTHON MODEL --llama-cpp BIN_DIR GGUF

docs/performance.md says how to set the peers up. Machines are noisy: read the ratios, and the spread beside them.
"""

import argparse
import ctypes
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from peer_engines import Engine, LlamaCpp, Octavo, OpenVino, Shape, Vllm, octavo_bench
from rich.console import Console
from rich.table import Table

START_SECONDS = 300  # that a server may take until it is ready
Figures = dict[str, float]


@dataclass(frozen=True)
class Run:
    engine: str
    streams: int
    figures: Figures
    others: float  # cores that everything else on the machine kept busy meanwhile


def main() -> None:
    args = parse_arguments()
    adopt_orphans()
    octavos = [Octavo(args.model, quantization) for quantization in args.quantization.split(",")]
    peers: list[Engine] = [OpenVino(*paths) for paths in args.openvino]
    peers += [Vllm(*paths) for paths in args.vllm]
    peers += [LlamaCpp(*paths) for paths in args.llama_cpp]
    runs: list[Run] = []
    for repeat in range(args.repeats):
        for streams in map(int, args.streams.split(",")):
            shape = Shape(streams, args.input_len, args.output_len)
            for engine in [*octavos, *peers]:
                run = measure(engine, shape, args.http)
                runs.append(run)
                figures = ", ".join(f"{value:,.1f} {readable(key)}" for key, value in run.figures.items())
                print(f"{repeat + 1}/{args.repeats} {engine.name}, streams {streams}: {figures}", end="")
                print(f" (others kept {run.others:.1f} cores busy)", flush=True)
                if args.output_json:  # after every run: a long comparison may be cut short
                    report = {"settings": vars(args), "runs": [asdict(run) for run in runs]}
                    args.output_json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    console = Console(width=120)  # a name is not cut, nor folded, where the output goes to a file
    for table in comparisons(runs, [octavo.name for octavo in octavos]):
        console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Octavo beside its peers. Each peer may be named several times.")
    peer = partial(parser.add_argument, nargs=2, type=existing, action="append", default=[])
    peer("--openvino", metavar=("PYTHON", "DIR"), help="a Python with openvino-genai, and what optimum-cli exported")
    peer("--vllm", metavar=("PYTHON", "DIR"), help="a Python with vllm, and a Hugging Face directory; it runs in bf16")
    peer("--llama-cpp", metavar=("BIN_DIR", "GGUF"), help="where llama-batched-bench and llama-server are, and a model")
    parser.add_argument("--model", default="smollm2", help="the same model, for Octavo (default: %(default)s)")
    parser.add_argument("--quantization", default="none", help="Octavo's, comma-separated; none is bf16 (the default)")
    parser.add_argument("--streams", default="1,64", help="prompts at once, comma-separated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens to generate, two or more (%(default)s)")
    parser.add_argument("--http", action="store_true", help="run them as servers, under `octavo bench serve`")
    parser.add_argument("--output-json", type=Path, help="write every run to this file too")
    args = parser.parse_args()
    if args.output_len < 2:
        parser.error("--output-len must be 2 or more: the first token is prefill's, the others are decode's")
    if args.http and args.openvino:
        parser.error("--http: OpenVINO GenAI is a library, its server another product")
    return args


def existing(path: str) -> Path:
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"there is no {path}")
    return Path(path).absolute()


def measure(engine: Engine, shape: Shape, http: bool) -> Run:
    before, started = cpu_seconds(), time.perf_counter()
    figures = over_http(engine, shape) if http else offline(engine, shape)
    wait_for_orphans()
    others = (cpu_seconds() - before) / (time.perf_counter() - started)
    return Run(engine.name, shape.streams, figures, others)


def offline(engine: Engine, shape: Shape) -> Figures:
    """Output tokens per second count the whole run; prefill and decode can be told apart where one stream runs."""
    first, all_tokens = engine.offline(shape)
    figures = {"output_tokens_per_second": shape.streams * shape.output_len / all_tokens}
    if shape.streams == 1:
        figures["prefill_tokens_per_second"] = shape.input_len / first
        figures["decode_tokens_per_second"] = (shape.output_len - 1) / (all_tokens - first)
    return figures


def over_http(engine: Engine, shape: Shape) -> Figures:
    """Two requests for each stream, after a run that warms up with other prompts.

    The input tokens are the servers' own count: it should be the same for all.
    """
    flags = [f"--concurrency={shape.streams}", f"--num-prompts={2 * shape.streams}"]
    flags += [f"--input-len={shape.input_len}", f"--output-len={shape.output_len}"]
    with served(engine, shape) as url:
        for seed in (1, 0):
            report = octavo_bench("serve", f"--base-url={url}", f"--seed={seed}", *flags)
    figures = {key: report[key] for key in ("output_tokens_per_second", "input_tokens", "failed")}
    for key in ("time_to_first_token_ms", "time_per_output_token_ms"):
        figures[key] = report[key]["mean"]
    return figures


@contextmanager
def served(engine: Engine, shape: Shape) -> Iterator[str]:
    """The engine's server, ready: its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = engine.server(shape, port)
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_SECONDS
            while not answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{log.read()[-4000:]}\n{engine.name} does not serve")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=60)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # what it left behind


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:  # nothing listens yet, or it answers that it is still loading
        return False


def adopt_orphans() -> None:
    """Become the parent of processes that an engine leaves behind, as vLLM does of its workers."""
    set_child_subreaper = 36  # of prctl(2)
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def wait_for_orphans() -> None:
    """Nothing of a run is left when the next begins, and all the processor time that it took is known."""
    with suppress(ChildProcessError):
        while True:
            os.wait()


def cpu_seconds() -> float:
    """Processor time that everything but this script's children has used since the machine started."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - children.ru_utime - children.ru_stime


def comparisons(runs: list[Run], octavos: list[str]) -> Iterator[Table]:
    """For each number of streams and each figure: medians, least and most, and Octavo's medians over each peer's."""
    for streams in sorted({run.streams for run in runs}):
        by_engine: dict[str, list[Figures]] = {}
        for run in runs:
            if run.streams == streams:
                by_engine.setdefault(run.engine, []).append(run.figures)
        for key in by_engine[octavos[0]][0]:
            values = {engine: [figures[key] for figures in several] for engine, several in by_engine.items()}
            medians = {engine: statistics.median(several) for engine, several in values.items()}
            table = Table("engine", title=f"{readable(key)}, streams: {streams}")
            for heading in ["median", "least", "most", *(f"{octavo} is" for octavo in octavos)]:
                table.add_column(heading, justify="right")
            for engine, several in values.items():
                numbers = [f"{value:,.1f}" for value in (medians[engine], min(several), max(several))]
                if engine not in octavos and medians[engine]:
                    numbers += [f"{medians[octavo] / medians[engine]:.2f} x" for octavo in octavos]
                table.add_row(engine, *numbers)
            yield table


def readable(key: str) -> str:
    return key.replace("_", " ")


if __name__ == "__main__":
    main()
