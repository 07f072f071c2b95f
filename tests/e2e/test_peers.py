"""benchmarks/peers.py: Octavo for real, beside stand-ins that take a known time."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peer_timing
import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers.py"
SHAPE = ("--input-len", 8, "--output-len", 5, "--repeats", 1)


def peers(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PEERS), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def stand_in(path: Path, script: str) -> Path:
    """An engine that is this shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def figures(report: Path, engine: str) -> dict[int, dict[str, Any]]:
    """Number of streams -> what the only run of the engine gave."""
    return {run["streams"]: run["figures"] for run in json.loads(report.read_text())["runs"] if run["engine"] == engine}


def test_offline(tiny_llama: Path, tmp_path: Path) -> None:
    python = stand_in(tmp_path / "python", """echo loading; echo '{"first": 0.5, "all": 2.5}'; echo "{}" >&2""")
    stand_in(tmp_path / "llama-batched-bench", """echo '{"t_pp": 9, "t": 9}'; echo '{"t_pp": 2, "t": 10}'""")
    engines = ["--vllm", python, tiny_llama, "--llama-cpp", tmp_path, tiny_llama]
    report = tmp_path / "report.json"
    done = peers("--model", tiny_llama, *engines, "--streams", "1,3", *SHAPE, "--output-json", report)
    assert (done.returncode, done.stderr) == (0, "")
    output, prefill, decode = (f"{kind}_tokens_per_second" for kind in ("output", "prefill", "decode"))
    vllm, llama_cpp = (figures(report, f"{peer} {tiny_llama.name}") for peer in ("vLLM", "llama.cpp"))
    assert vllm == {1: {output: 2, prefill: 16, decode: 2}, 3: {output: 6}}
    assert llama_cpp == {1: {output: 0.5, prefill: 4, decode: 0.5}, 3: {output: 1.5}}
    octavo = figures(report, "Octavo none")
    assert 5 / octavo[1][output] == pytest.approx(8 / octavo[1][prefill] + 4 / octavo[1][decode])
    for streams, peer in ((1, 2), (3, 6)):
        assert f" {octavo[streams][output] / peer:.2f} x " in done.stdout


def test_over_http(tiny_llama: Path, tmp_path: Path) -> None:
    serve = f"{sys.executable} -m octavo.entrypoints.openai.api_server --model {tiny_llama}"
    python = stand_in(tmp_path / "python", f'for port; do :; done; exec {serve} "$port"')  # the last argument
    report = tmp_path / "report.json"
    engines = ["--model", tiny_llama, "--vllm", python, tiny_llama]
    done = peers(*engines, "--http", "--streams", 2, *SHAPE, "--output-json", report)
    assert (done.returncode, done.stderr) == (0, "")
    for engine in ("Octavo none", f"vLLM {tiny_llama.name}"):
        run = figures(report, engine)[2]
        assert run["failed"] == 0
        assert run["input_tokens"] >= 4 * 8
        assert run["output_tokens_per_second"] > 0
        assert run["time_to_first_token_ms"] > 0


def test_what_a_peer_leaves_behind_is_waited_for(tiny_llama: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    report = """'{"first": 1, "all": 2}'"""
    python = stand_in(tmp_path / "python", f"(sleep 1; touch {left}) > /dev/null 2>&1 &\necho {report}")
    done = peers("--model", tiny_llama, "--vllm", python, tiny_llama, "--streams", 1, *SHAPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert left.exists()


def test_what_a_peer_complained_of_is_shown(tiny_llama: Path, tmp_path: Path) -> None:
    python = stand_in(tmp_path / "python", "echo no such model >&2; exit 3")
    done = peers("--model", tiny_llama, "--vllm", python, tiny_llama, "--streams", 1, *SHAPE)
    assert done.returncode == 1
    assert "no such model" in done.stderr
    served = peers("--model", tiny_llama, "--vllm", python, tiny_llama, "--streams", 1, *SHAPE, "--http")
    assert served.returncode == 1
    assert "no such model" in served.stderr


def test_peers_are_warmed_up_and_see_no_prompt_twice(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[list[list[int]], int]] = []

    def generate(prompts: list[list[int]], output_len: int) -> tuple[int, float]:
        calls.append((prompts, output_len))
        return len(prompts) * output_len, 0.5 * len(calls)

    shape = argparse.Namespace(streams=3, input_len=7, output_len=5)
    peer_timing.measure(shape, generate)
    assert [output_len for _, output_len in calls] == [5, 5]
    prompts = [tuple(prompt) for prompts, _ in calls for prompt in prompts]
    assert [len(prompt) for prompt in prompts] == [7] * 6
    assert len(set(prompts)) == 6
    report = json.loads(capsys.readouterr().out)
    assert report["first"] == 1.0  # of the second run
    assert 0 < report["all"] < 1
    with pytest.raises(AssertionError, match="12 tokens came"):
        peer_timing.measure(shape, lambda *_: (12, 0.5))
