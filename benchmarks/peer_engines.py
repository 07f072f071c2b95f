"""The engines that peers.py compares: how each is run offline, and as a server."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).parent
OCTAVO = (sys.executable, "-c", "from octavo.cli import main; main()")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GB; left alone, vLLM wants nearly all of the memory
SPARE_TOKENS = 64  # a text of `input_len` words may be a few tokens more

Command = Sequence[str | Path]


@dataclass(frozen=True)
class Shape:
    """`streams` prompts at once, each of `input_len` tokens, and `output_len` tokens for each: two or more."""

    streams: int
    input_len: int
    output_len: int


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    def offline(self, shape: Shape) -> tuple[float, float]:
        """Run it once, warmed up, in a process of its own: seconds to the first token, and to all of them.

        The first is told only of one stream: with more, engines mix some streams' prompts with others' output.
        """
        ...

    def server(self, shape: Shape, port: int) -> Command:
        """The command that serves so many streams on `port` of this machine."""
        ...


@dataclass(frozen=True)
class Octavo:
    model: str
    quantization: str

    @property
    def name(self) -> str:
        return f"Octavo {self.quantization}"

    def offline(self, shape: Shape) -> tuple[float, float]:
        # The median of three: the first run, on KV pages never touched before, stands in for the peers' warm-up.
        flags = [f"--quantization={self.quantization}", f"--num-prompts={shape.streams}", "--repeat=3"]
        flags += [f"--input-len={shape.input_len}", f"--output-len={shape.output_len}"]
        report = octavo_bench("throughput", self.model, *flags)
        return report["time_to_first_token_ms"]["mean"] / 1000, report["duration_seconds"]

    def server(self, shape: Shape, port: int) -> Command:
        flags = [f"--quantization={self.quantization}", f"--port={port}", "--no-enable-prefix-caching"]
        return [*OCTAVO, "serve", self.model, *flags]


@dataclass(frozen=True)
class OpenVino:
    python: Path
    model: Path

    @property
    def name(self) -> str:
        return f"OpenVINO {self.model.name}"

    def offline(self, shape: Shape) -> tuple[float, float]:
        return run_script(self.python, "peer_openvino.py", self.model, shape)

    def server(self, shape: Shape, port: int) -> Command:
        raise NotImplementedError("OpenVINO GenAI is a library")


@dataclass(frozen=True)
class Vllm:
    python: Path
    model: Path

    @property
    def name(self) -> str:
        return f"vLLM {self.model.name}"

    def offline(self, shape: Shape) -> tuple[float, float]:
        return run_script(self.python, "peer_vllm.py", self.model, shape)

    def server(self, shape: Shape, port: int) -> Command:
        longest = max(2048, shape.input_len + shape.output_len + SPARE_TOKENS)
        flags = ["--dtype=bfloat16", f"--max-model-len={longest}", f"--max-num-seqs={shape.streams}"]
        flags += ["--no-enable-prefix-caching", f"--port={port}"]
        return [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, *flags]


@dataclass(frozen=True)
class LlamaCpp:
    binaries: Path
    model: Path

    @property
    def name(self) -> str:
        return f"llama.cpp {self.model.name}"

    def offline(self, shape: Shape) -> tuple[float, float]:
        context = max(512, shape.streams * (shape.input_len + shape.output_len))  # its warm-up takes a few tokens too
        command = [self.binaries / "llama-batched-bench", "--model", self.model, "--output-format", "jsonl"]
        command += ["--ctx-size", str(context)]
        command += ["-npp", str(shape.input_len), "-ntg", str(shape.output_len - 1)]  # its prefill gives the first
        command += ["-npl", f"{shape.streams},{shape.streams}"]  # twice: the last counts
        report = last_json(run(command))
        return report["t_pp"], report["t"]

    def server(self, shape: Shape, port: int) -> Command:
        context = shape.streams * (shape.input_len + shape.output_len + SPARE_TOKENS)
        flags = ["--parallel", str(shape.streams), "--ctx-size", str(context), "--port", str(port)]
        return [self.binaries / "llama-server", "--model", self.model, *flags]


def octavo_bench(*arguments: str) -> dict[str, Any]:
    """The report of `octavo bench`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        run([*OCTAVO, "bench", *arguments, f"--output-json={file}"])
        return json.loads(file.read_text())


def run_script(python: Path, script: str, model: Path, shape: Shape) -> tuple[float, float]:
    """Run one of the peers' scripts, which see to the same shape."""
    flags = [f"--streams={shape.streams}", f"--input-len={shape.input_len}", f"--output-len={shape.output_len}"]
    report = last_json(run([python, HERE / script, model, *flags]))
    return report["first"], report["all"]


def run(command: Command) -> str:
    """What the command prints. If it fails, this script ends with what it complained of."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def last_json(output: str) -> dict[str, Any]:
    """The last line that is an object; engines log what they please around it."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
