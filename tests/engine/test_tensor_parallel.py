"""Engines of several ranks: the same tokens as one process, whatever dies; nothing is left behind."""

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from command_line import OCTAVO, complaint
from octavo import LLM, AsyncLLM, SamplingParams
from octavo.backends.cpu import calibration
from octavo.backends.cpu.ranks import share_memory
from octavo.backends.rank_process import Load, Loaded, RankProcess
from octavo.errors import ConfigError, EngineDead
from octavo.weights import open_checkpoint
from rank_requests import PARAMS, PROMPTS, answers, children, has_ended, ranks_of, wait_until
from server_process import ServerProcess, free_port

LONG = SamplingParams(seed=1, max_tokens=300, ignore_eos=True)


MODELS = [
    ("llama-ranks", {}, [2, 4]),
    ("llama-odd-heads", {"quantization": "8bit"}, [2]),
    ("qwen3", {"quantization": "4bit", "kv_cache_dtype": "int8"}, [2]),
    ("mistral", {}, [2]),
    ("qwen2", {"speculative_tokens": 3}, [2]),
]


@pytest.mark.parametrize(("name", "settings", "sizes"), MODELS, ids=[name for name, _, _ in MODELS])
def test_same_answers(
    tiny_model: Callable[[str], Path], name: str, settings: dict[str, Any], sizes: list[int], tmp_path: Path
) -> None:
    model = str(tiny_model(name))
    with LLM(model, **settings) as llm:
        expected, identity = answers(llm.generate(PROMPTS, PARAMS)), llm.info.fingerprint
    assert len(expected) == len(PROMPTS)
    for size in sizes:
        with LLM(model, **settings, tensor_parallel_size=size, threads=1, max_batch_tokens=50) as llm:
            processes = ranks_of(os.getpid())
            assert len(processes) == size - 1 and llm.info.fingerprint == identity
            assert answers(llm.generate(PROMPTS, PARAMS)) == expected
            again = llm.generate(PROMPTS, PARAMS)
            assert answers(again) == expected and sum(output.metrics.cached_tokens for output in again) > 200
        assert all(map(has_ended, processes))


@pytest.mark.exhaustive
def test_same_answers_of_eight_ranks(tiny_model: Callable[[str], Path]) -> None:
    test_same_answers(tiny_model, "llama-ranks", {"quantization": "8bit"}, [8], Path())
    test_same_answers(tiny_model, "llama-odd-heads", {}, [4, 8], Path())


@pytest.mark.parametrize("name", ["llama-ranks", "llama-odd-heads"])
def test_pages_and_states_pass_between_sizes(tiny_model: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """By one folder of pages, and by the file of a KV state."""
    prompt, params = PROMPTS[2], PARAMS[2]
    expected, state_file = None, tmp_path / "state.kv"
    for size in (2, 1, 2):
        with LLM(str(tiny_model(name)), tensor_parallel_size=size, threads=1, kv_disk=str(tmp_path / "pages")) as llm:
            output = llm.generate(prompt, params)[0]
            expected = expected or answers([output])
            assert answers([output]) == expected
            assert output.metrics.cached_tokens == (0 if not state_file.exists() else 128)
            if state_file.exists():
                state = llm.load_kv_cache_state(state_file)
                continued = llm.generate([5, 6, 7], params, kv_cache_state=state)[0]
                assert continued.metrics.cached_tokens >= 128
            llm.get_kv_cache_state(output.request_id).save(state_file)


def test_a_request_moves_from_one_process_to_two_ranks(tiny_model: Callable[[str], Path]) -> None:
    async def main() -> None:
        async with AsyncLLM(str(tiny_model("llama-ranks"))) as llm, asyncio.timeout(60):
            expected = answers(await llm.agenerate(PROMPTS, PARAMS))
            stayed = (await llm.agenerate(PROMPTS[1], LONG))[0].outputs[0].token_ids
            llm.config = dataclasses.replace(llm.config, tensor_parallel_size=2, threads=1)  # of the next engine
            tokens: list[int] = []
            killed = None
            async for increment in llm.stream(PROMPTS[1], LONG):
                tokens += increment.outputs[0].token_ids
                if killed is None and len(tokens) > 20:
                    killed = llm._frontend.replicas[0].link.pid
                    os.kill(killed, signal.SIGKILL)
            assert killed is not None and len(ranks_of(llm._frontend.replicas[0].link.pid)) == 1
            assert tokens == stayed
            assert answers(await llm.agenerate(PROMPTS, PARAMS)) == expected

    asyncio.run(main())


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Callable[[str], Path]) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_model("llama-ranks"), "-tp", "2", "--threads", "1", "--max-batch-size", "4") as server:
        yield server


def complete(server: ServerProcess, seed: int) -> str:
    body = {"model": "tiny", "prompt": "class", "max_tokens": 200, "seed": seed, "ignore_eos": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    return str(reply.raise_for_status().json()["choices"][0]["text"])


def test_the_plan_says_how_the_model_is_divided(two_ranks: ServerProcess, tiny_model: Callable[[str], Path]) -> None:
    assert "2 processes, each with its part of the weights\n" in two_ranks.banner
    assert "1 thread in each rank (as set)" in two_ranks.banner
    with LLM(str(tiny_model("llama-odd-heads")), tensor_parallel_size=2, threads=1) as llm:
        assert "each has the KV cache of all of them" in llm.info.plan.lines()["ranks"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV], ids=["killed", "faulty"])
def test_a_dead_rank_loses_no_request(two_ranks: ServerProcess, how: signal.Signals) -> None:
    expected = complete(two_ranks, 0)
    with ThreadPoolExecutor(16) as pool:
        alone = list(pool.map(lambda seed: complete(two_ranks, seed), range(16)))
        assert alone[0] == expected
        engine = two_ranks.engine_pid()
        [rank] = ranks_of(engine)
        replies = [pool.submit(complete, two_ranks, seed) for seed in range(16)]
        wait(replies, return_when=FIRST_COMPLETED)  # others are computed, and most wait
        began = time.monotonic()
        os.kill(rank, how)
        wait_until(lambda: has_ended(engine))
        assert time.monotonic() - began < 2, "on a busy machine; else some milliseconds"
        assert [reply.result() for reply in replies] == alone
    assert f"rank 1 has ended: killed by {how.name}" in two_ranks.stderr()


def test_an_idle_rank_is_missed_too(two_ranks: ServerProcess) -> None:
    expected, engine = complete(two_ranks, 0), two_ranks.engine_pid()
    [rank] = ranks_of(engine)
    began = time.monotonic()
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: has_ended(engine))
    assert time.monotonic() - began < 2
    assert complete(two_ranks, 0) == expected


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "suspended"])
def test_ranks_end_with_their_engine(two_ranks: ServerProcess, stopped: bool) -> None:
    complete(two_ranks, 0)
    engine = two_ranks.engine_pid()
    [rank] = ranks_of(engine)
    if stopped:
        os.kill(rank, signal.SIGSTOP)
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: has_ended(rank), 2)
    complete(two_ranks, 0)


def test_a_rank_dies_below_an_llm(tiny_model: Callable[[str], Path]) -> None:
    with LLM(str(tiny_model("llama-ranks")), tensor_parallel_size=2, threads=1) as llm:
        expected = answers(llm.generate(PROMPTS, PARAMS))
        [rank] = ranks_of(os.getpid())
        os.kill(rank, signal.SIGKILL)
        wait_until(lambda: has_ended(rank))
        assert answers(llm.generate(PROMPTS, PARAMS)) == expected


def test_a_rank_that_dies_while_it_loads(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(self: RankProcess, message: object) -> None:
        self._popen.kill()

    monkeypatch.setattr(RankProcess, "send", kill)
    with pytest.raises(EngineDead, match="rank 1 has ended while it loaded: killed by SIGKILL"):
        LLM(str(tiny_model("llama-ranks")), tensor_parallel_size=2)
    assert not ranks_of(os.getpid())


def test_a_rank_that_never_comes(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankProcess, "send", lambda self, _: os.kill(self._popen.pid, signal.SIGSTOP))
    monkeypatch.setattr("octavo.backends.rank_process.SILENCE", 0.5)
    with pytest.raises(EngineDead, match=r"rank 1 has not answered for 0\.5 seconds"):
        LLM(str(tiny_model("llama-ranks")), tensor_parallel_size=2)
    assert not ranks_of(os.getpid())


def test_an_error_of_a_rank_is_the_error_of_the_load(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.backends.cpu.ranks.Load", lambda path, *others: Load("/missing/model", *others))
    with pytest.raises(FileNotFoundError, match=r"missing.*\(rank 1\)"):
        LLM(str(tiny_model("llama-ranks")), tensor_parallel_size=2)
    assert not ranks_of(os.getpid())


def test_a_rank_that_dies_while_importances_are_measured(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for it within a layer then."""

    def kill_and_run(*arguments: Any) -> Any:
        for rank in ranks_of(os.getpid()):
            os.kill(rank, signal.SIGKILL)
        return run_layer(*arguments)

    run_layer = calibration._run_layer
    monkeypatch.setattr(calibration, "_run_layer", kill_and_run)
    with pytest.raises(EngineDead, match="rank 1 has ended while it loaded: killed by SIGKILL"):
        LLM(str(tiny_model("llama-ranks")), tensor_parallel_size=2, quantization="4bit")
    assert not ranks_of(os.getpid())


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_a_part_with_damaged_weights(tiny_model: Callable[[str], Path], quantization: str, tmp_path: Path) -> None:
    """One line and exit code 2, as with one process; no process is left."""
    shutil.copytree(tiny_model("llama-ranks"), tmp_path, dirs_exist_ok=True)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][:, -1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    alone = complaint("serve", tmp_path, "--quantization", quantization)
    command = [*OCTAVO, "serve", str(tmp_path), "--quantization", quantization, "-tp", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as server:
        _, lines = server.communicate(timeout=60)
    assert (server.returncode, lines) == (2, alone.replace("\n", " (rank 1)\n"))
    assert name in lines
    with pytest.raises(ProcessLookupError):  # as nothing is left of its group
        os.killpg(server.pid, 0)


def test_torchrun_with_another_number_of_processes(tiny_model: Callable[[str], Path]) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
    line = complaint("serve", tiny_model("llama-ranks"), **environment)
    assert "torchrun has started 2 processes" in line and "tensor_parallel_size is 1" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 3}, "must be 1, 2, 4 or 8, not 3"),
        ({"tensor_parallel_size": 0}, "must be 1, 2, 4 or 8, not 0"),
        ({"tensor_parallel_size": 4}, "must be 1 or 2 for this model, not 4"),
        ({"tensor_parallel_size": 2, "backend": "torch"}, "must be 1 with the torch backend"),
    ],
)
def test_sizes_that_cannot_work(tiny_llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size {message}"):
        LLM(str(tiny_llama), **settings)


def is_ready(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=60).status_code == 200
    return False


def test_torchrun_starts_one_server(tiny_model: Callable[[str], Path]) -> None:
    """Its other processes end at once, and Ctrl-C ends them all."""
    port = free_port()
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "octavo.entrypoints.openai.api_server"]
    flags = ["--model", str(tiny_model("llama-ranks")), "--tensor-parallel-size", "2", "--port", str(port)]
    with subprocess.Popen(
        [sys.executable, *command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as torchrun:
        try:
            wait_until(lambda: is_ready(port), 120)  # PyTorch alone takes long on a busy machine
            [server] = children(torchrun.pid, b"api_server")
            [engine] = children(server, b"engine_main")
            [rank] = ranks_of(engine)
            torchrun.send_signal(signal.SIGINT)
            wait_until(lambda: all(map(has_ended, (server, engine, rank))))
            torchrun.wait(30)
        finally:
            torchrun.terminate()  # it ends what it has started, after a failure of this test too


def test_a_rank_takes_no_more_memory_than_its_part(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A model with the widths of a 70B Llama, divided by 8, and a tenth of its layers: at most 10 % more."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=16032, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=1, head_dim=128, tie_word_embeddings=False, torch_dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    few = private_memory(tiny_model("llama-ranks"), 4)
    for size in (2, 4):
        part = sum(tensor.nbytes for tensor in open_checkpoint(tmp_path).tensors.values()) / size
        peak, loaded = private_memory(tmp_path, size)
        assert loaded.weight_bytes < 1.05 * part
        assert peak - few[0] < 1.1 * part


def private_memory(model: Path, size: int) -> tuple[int, Loaded]:
    """The most memory of its own that rank 1 has had while it loaded, in bytes; the files' pages do not count."""
    settings = {
        "page_size": 32, "max_batch_tokens": 512, "max_batch_size": 256, "max_model_len": 512, "threads": 1,
        "dtype": "auto", "quantization": "none", "device": "auto", "kv_cache_dtype": "bf16",
    }  # fmt: skip
    files = [share_memory(name) for name in ("steps", "calibration", "kv")]
    process = RankProcess(1, "octavo.backends.cpu.rank_main", files)
    try:
        process.send(Load(str(model), None, False, 1, size, sorted(os.sched_getaffinity(0)), settings))
        with ThreadPoolExecutor(1) as pool:
            waiting, peak = pool.submit(process.next), 0
            threading.Thread(target=lambda: all(iter(process.take_in, False)), daemon=True).start()
            while not waiting.done():
                status = Path(f"/proc/{process._popen.pid}/status").read_text()
                fields = dict(line.split(":", 1) for line in status.splitlines())
                peak = max(peak, sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024)
                time.sleep(0.002)
        loaded = waiting.result()
        assert isinstance(loaded, Loaded)
        return peak, loaded
    finally:
        process.end()
        for file in files:
            os.close(file)
