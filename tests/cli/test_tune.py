"""octavo tune: what it proposes for a load and a goal, by simulation and with a real model."""

import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import pytest
import yaml

import simulated_costs
from command_line import OCTAVO, complaint, octavo
from octavo.config import EngineConfig
from octavo.simulation import CostModel
from octavo.tuning import goal as goal_module
from octavo.tuning.goal import Goal, Load
from octavo.tuning.search import Proposal, best_of, chosen, propose, trials
from octavo.tuning.trial import Trial, try_out
from server_process import ServerProcess

COSTS = msgspec.structs.replace(
    simulated_costs.COSTS,
    page_bytes=2**20,
    num_pages=1000,
    max_model_len=2048,
    rows_ms=[*simulated_costs.COSTS.rows_ms[:-1], (1024, 192.0)],
    pair_us=0.01,
)
SLOW = msgspec.structs.replace(COSTS, rows_ms=[(count, 3 * ms) for count, ms in COSTS.rows_ms])
CONFIG = EngineConfig(quantization="none")
STREAMS = Load(streams=4, input_len=512, output_len=64)


@pytest.fixture(autouse=True)
def short_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal_module, "MOST_TOKENS", 2000)
    monkeypatch.setattr(goal_module, "FEWEST_REQUESTS", 24)


def all_trials(load: Load, goal: Goal, costs: CostModel = COSTS, config: EngineConfig = CONFIG) -> list[Trial]:
    return list(trials(config, costs, load, goal, set()))


def proposal(load: Load, goal: Goal, costs: CostModel = COSTS) -> Proposal:
    best = chosen({"none": all_trials(load, goal, costs)}, {"none": costs}, goal)
    return propose(best, costs, goal, set(), lambda: None)


def test_small_chunks_of_prompts_meet_a_goal_for_the_time_per_token() -> None:
    """A prompt of 512 tokens in one step makes the other streams wait for it."""
    tried = {trial.config.max_batch_tokens: trial for trial in all_trials(STREAMS, Goal(per_token=11.2))}
    assert tried[512].share > 1 >= tried[64].share
    assert tried[64].times is not None and tried[512].times is not None
    assert tried[64].times.first > tried[512].times.first, "the price for it"
    assert proposal(STREAMS, Goal(per_token=11.2)).trial.config.max_batch_tokens < 512
    assert proposal(STREAMS, Goal(first=120.0)).trial.config.max_batch_tokens == 512


@pytest.mark.parametrize("load", [STREAMS, Load(rate=2.0, input_len=256, output_len=32)])
def test_the_most_load_within_a_goal(load: Load) -> None:
    goal = Goal(first=400.0, per_token=20.0)
    found = proposal(load, goal)
    assert found.meets and found.most is not None and found.most.amount >= load.amount
    config, pages = found.trial.config, (found.trial.config.kv_cache_memory or 0) // COSTS.page_bytes
    assert try_out(config, COSTS, pages, found.most, goal).share <= 1
    assert try_out(config, COSTS, pages, found.most.of(1.3 * found.most.amount + 1), goal).share > 1


def test_a_goal_that_cannot_be_met() -> None:
    found = proposal(STREAMS, Goal(first=1.0))
    assert not found.meets and found.most is None and found.trial.times is not None
    slower = max(all_trials(STREAMS, Goal(first=1.0)), key=lambda trial: trial.times.first if trial.times else 0)
    assert slower.times is not None and found.trial.times.first < slower.times.first, "the best possible is proposed"


def test_more_requests_than_the_machine_serves() -> None:
    tried = all_trials(Load(rate=100.0, input_len=256, output_len=64), Goal(first=1e9))
    assert not any(trial.keeps_up or trial.share <= 1 for trial in tried), "their queue grows, so any goal is missed"
    assert (best_of(tried).sustained or 0) > 0.97 * max(trial.sustained or 0 for trial in tried)


def test_the_most_exact_weights_that_meet_the_goal_win() -> None:
    goal = Goal(per_token=33.0)
    tried = {
        "none": all_trials(STREAMS, goal, SLOW),
        "8bit": all_trials(STREAMS, goal, COSTS, replace(CONFIG, quantization="8bit")),
    }
    costs = {"none": SLOW, "8bit": COSTS}
    assert chosen(tried, costs, goal).config.quantization == "none"
    strict = Goal(per_token=12.5)
    tried = {name: all_trials(STREAMS, strict, costs[name], replace(CONFIG, quantization=name)) for name in tried}
    assert chosen(tried, costs, strict).config.quantization == "8bit"


def test_the_memory_of_the_kv_cache_suffices() -> None:
    found = proposal(STREAMS, Goal(first=300.0))
    pages = (found.trial.config.kv_cache_memory or 0) // COSTS.page_bytes
    assert pages >= COSTS.max_model_len // COSTS.page_size and pages >= 2 * found.trial.pages_held
    assert pages <= 2 * found.trial.pages_held + 16, "and no more, since the load needs more than one long request"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


SHORT = ("--streams", "2", "--input-len", "40", "--output-len", "8")


def test_the_proposed_file_is_served(model: Path, tmp_path: Path) -> None:
    file, base = tmp_path / "octavo.yaml", tmp_path / "base.yaml"
    base.write_text("max_batch_tokens: 96\nserved_model_name: tiny\napi_key: sk-secret\n")
    goal = ("--ttft-ms", "5000", "--tpot-ms", "1000")
    done = octavo("tune", model, *SHORT, *goal, "--config", base, "--max-batch-size", "17", "-o", file)
    assert done.returncode == 0, done
    assert "The goal is met." in done.stdout and "sk-secret" not in done.stdout
    settings = yaml.safe_load(file.read_text())
    assert (settings["max_batch_tokens"], settings["max_batch_size"]) == (96, 17), "what was given stays"
    assert settings["quantization"] == "none", "weights are not changed unasked"
    assert settings["threads"] >= 1 and settings["kv_cache_memory"].endswith("MiB")
    assert file.stat().st_mode & 0o077 == 0, "it has a key"
    with ServerProcess(None, "--config", str(file)) as server:
        headers = {"Authorization": "Bearer sk-secret"}
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 401


def test_an_impossible_goal_ends_with_code_1(model: Path) -> None:
    fixed = ("--threads", "1", "--kv-cache-page-size", "32", "--max-batch-tokens", "64", "--max-batch-size", "4")
    done = octavo("tune", model, *SHORT, "--ttft-ms", "0.001", "--allow-quantization", *fixed)
    assert done.returncode == 1, done
    assert "The goal cannot be met here. The best possible at this load: " in done.stdout
    assert {"none", "8bit", "4bit"} <= set(re.findall(r"\w+", done.stdout))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--rate", "2/s", "--streams", "2"), "leave one out"),
        (("--rate", "fast"), "rate must be a number of requests"),
        (("--output", "no/such/folder/octavo.yaml"), "no such folder"),
        (("--data-parallel-size", "2"), "leave out data_parallel_size"),
        (("--input-len", "100000"), "give a shorter --input-len"),
        (("--ttft", "5"), "--ttft-ms"),
        (("--max-batch-tokens", "0"), "max_batch_tokens must be from 1"),
    ],
)
def test_mistakes_are_told_in_a_line(model: Path, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in complaint("tune", model, *arguments)


def test_ctrl_c_ends_it_cleanly(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    command = [*OCTAVO, "tune", str(model), *SHORT, "--output", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any(line.startswith("Measured") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == ""
    assert not file.exists()
