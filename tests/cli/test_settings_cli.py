"""Settings as a user gives them: octavo config, mistakes in files and variables, and command lines pasted from vLLM."""

import json
import subprocess
from pathlib import Path

import httpx
import pytest

from command_line import OCTAVO, Terminal, answer, complaint, octavo
from octavo import EngineConfig
from octavo.server.config import ServerConfig
from octavo.settings import settings_of
from server_process import ServerProcess

# What vLLM's recipes are made of.
RECIPE = (
    *("--trust-remote-code", "--enable-auto-tool-choice", "--enforce-eager", "--enable-chunked-prefill"),
    *("--enable-prefix-caching", "--no-enable-log-requests", "--async-scheduling"),
    *("--tensor-parallel-size", "1", "--tool-call-parser", "hermes", "--reasoning-parser=qwen3"),
    *("--max-model-len", "128", "--gpu-memory-utilization", "0.90", "--max-num-batched-tokens", "64"),
    *("--max-num-seqs", "4", "--kv-cache-dtype", "auto", "--block-size", "16", "--dtype", "half", "--seed", "0"),
    *("--swap-space", "4", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'),
)


def test_every_setting_its_value_and_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("tenant_weights: {premium: 4}\n")
    arguments = ("config", "some/model", "--config", file, "--no-enable-prefix-caching", "--port", "9000")
    lines = answer(*arguments, OCTAVO_MAX_QUEUE="5", COLUMNS="300").splitlines()
    table = {words[0]: words[1:] for line in lines if (words := line.split())}
    assert set(table) >= {*settings_of(EngineConfig), *settings_of(ServerConfig)}
    assert table["model"] == ["some/model", "flag", "--model"]
    assert table["tenant_weights"] == ["premium=4", "file", "tenant_weights", "in", str(file)]
    assert table["enable_prefix_caching"] == ["false", "flag", "--no-enable-prefix-caching"]
    assert table["max_queue"] == ["5", "environment", "OCTAVO_MAX_QUEUE"]
    assert table["port"] == ["9000", "flag", "--port"]
    assert table["kv_disk_size"] == ["20GiB", "default"]
    entries = json.loads(answer(*arguments, "--json", OCTAVO_MAX_QUEUE="5"))
    assert list(entries) == [*settings_of(EngineConfig), *settings_of(ServerConfig)]
    assert entries["tenant_weights"]["value"] == {"premium": 4.0}
    assert entries["max_queue"]["from"] == "environment OCTAVO_MAX_QUEUE"


def test_a_mistake_in_the_environment() -> None:
    assert "max_batch_size must be an integer of at least 1, not 'x'" in complaint("config", OCTAVO_MAX_BATCH_SIZE="x")
    done = octavo("config", OCTAVO_MAX_BATCHSIZE="4")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "OCTAVO_MAX_BATCHSIZE is not a setting; did you mean OCTAVO_MAX_BATCH_SIZE?" in done.stderr


@pytest.mark.parametrize(
    "redirection, code, said", [(">/dev/full", 2, "octavo: cannot write the output: "), (">&-", 0, "")]
)
def test_output_that_cannot_be_written(redirection: str, code: int, said: str) -> None:
    command = ["sh", "-c", f'"$@" {redirection}', "sh", *OCTAVO, "config"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_mistake_in_a_file_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kv_disk: true\n")
    assert "kv_disk must be text, not true" in complaint("serve", "--config", tmp_path / "a.yaml")


def test_a_flag_of_vllm_without_its_value() -> None:
    assert "--swap-space needs a value" in complaint("config", "--swap-space", "--port", "5")


def test_an_api_key_is_not_shown() -> None:
    for flags in (["--api-key", "se cret"], ["--api_key=secret,se cret"]):
        message = complaint("serve", *flags)
        assert "api_key must be printable ASCII" in message and "cret" not in message


def test_a_recipe_of_vllm_serves(tiny_llama: Path) -> None:
    with ServerProcess(tiny_llama, *RECIPE) as server:
        [stats] = httpx.get(f"{server.url}/stats").json()["models"]
        assert (stats["limits"]["max_batch_size"], stats["limits"]["page_size"]) == (4, 32)
        said = "\n".join(line for line in server.stderr().splitlines() if line.startswith("octavo:"))
    for text in (
        "--max-num-seqs 4 is max_batch_size",
        "kv_cache_page_size 32",
        "ignored: ",
        "--trust-remote-code",
        "--gpu-memory-utilization 0.9 (kv_cache_memory sets the KV cache of a CPU)",
    ):
        assert text in said


@pytest.mark.parametrize("name", ["\x1b]0;x\x07[/red]m", "\u202em"])
def test_a_model_s_name_does_not_control_the_terminal(tiny_llama: Path, name: str) -> None:
    terminal = Terminal("chat", str(tiny_llama), "--served-model-name", name, "--threads", "1")
    try:
        terminal.wait_for(r"lists the commands")
        assert b"\\x1b]0;x" in terminal.shown or b"\\u202em" in terminal.shown
    finally:
        terminal.close()


def test_an_error_message_does_not_control_the_terminal() -> None:
    assert "\\x1b[31m" in complaint("generate", "no/such\x1b[31m/model.gguf", "hi")
