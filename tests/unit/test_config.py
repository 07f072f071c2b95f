"""Settings: one conversion for flags, files, variables and keywords; vLLM's names; where values come from."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import EngineConfig
from octavo.config import resolve_flags
from octavo.errors import ConfigError
from octavo.server.config import ServerConfig
from octavo.settings import Resolved, environment_source, format_value, resolve, settings_of
from octavo.vllm_settings import VLLM

BOTH = (EngineConfig, ServerConfig)


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("OCTAVO_")]:
        monkeypatch.delenv(name)


def from_file(tmp_path: Path, yaml: str) -> Resolved:
    (tmp_path / "octavo.yaml").write_text(yaml)
    return resolve_flags(BOTH, {}, tmp_path / "octavo.yaml")


# One conversion

VALUES: list[tuple[str, Any, Any]] = [
    ("max_batch_size", "64", 64),
    ("max_batch_size", " 64 ", 64),
    ("max_batch_size", 64.0, 64),
    ("max_batch_size", np.int64(64), 64),
    ("max_model_len", "32k", 32_000),
    ("max_model_len", "32K", 32_768),
    ("max_model_len", "none", None),
    ("request_timeout", "2.5", 2.5),
    ("request_timeout", 3, 3.0),
    ("request_timeout", "", None),
    ("enable_prefix_caching", "no", False),
    ("enable_prefix_caching", "off", False),
    ("enable_prefix_caching", 0, False),
    ("enable_prefix_caching", "TRUE", True),
    ("enable_prefix_caching", np.bool_(False), False),
    ("kv_cache_memory", "4GiB", 4 * 2**30),
    ("kv_cache_memory", "1.5G", 1_500_000_000),
    ("kv_cache_memory", 1000, 1000),
    ("kv_cache_memory", "none", None),
    ("kv_disk", Path("/tmp/pages"), "/tmp/pages"),
    ("kv_disk", "none", None),
    ("quantization", "none", "none"),
    ("served_model_name", "2024", "2024"),
    ("tenant_weights", "premium=4,trial=0.5", {"premium": 4.0, "trial": 0.5}),
    ("tenant_weights", '{"premium": 4}', {"premium": 4.0}),
    ("tenant_weights", {"premium": 4, "trial": "0.5"}, {"premium": 4.0, "trial": 0.5}),
    ("tenant_weights", {"premium": np.float32(2)}, {"premium": 2.0}),
    ("tenant_weights", "", {}),
]
WRONG: list[tuple[str, Any, str]] = [
    ("served_model_name", 2024, "text, not 2024"),
    ("kv_disk", True, "text, not true"),
    ("request_timeout", True, "a positive number of seconds, not true"),
    ("request_timeout", "soon", "a positive number of seconds, not 'soon'"),
    ("request_timeout", float("nan"), "a positive number of seconds"),
    ("request_timeout", "inf", "a positive number of seconds"),
    ("enable_prefix_caching", "maybe", "true or false, not 'maybe'"),
    ("enable_prefix_caching", 2, "true or false, not 2"),
    ("enable_prefix_caching", [], "true or false"),
    ("max_batch_size", True, "an integer of at least 1, not true"),
    ("max_batch_size", 1.5, "an integer of at least 1, not 1.5"),
    ("max_batch_size", "1_0", "an integer of at least 1"),
    ("max_batch_size", 0, "at least 1, not 0"),
    ("max_batch_size", [4], "an integer of at least 1"),
    ("max_batch_size", {"a": 4}, "an integer of at least 1"),
    ("max_batch_tokens", 10**12, "from 1 to 1048576"),
    ("kv_cache_memory", "lots", "a size such as 4GiB or 500MB, not 'lots'"),
    ("kv_cache_memory", 0, "a size such as"),
    ("kv_cache_memory", True, "a size such as"),
    ("kv_cache_memory", "9" * 400, "a size such as"),
    ("kv_cache_memory", "99999999TiB", "a size such as"),
    ("max_queue", 10**30, "an integer of at least 0"),
    ("max_queue", "9" * 5000, "an integer of at least 0"),
    ("tenant_weights", "premium", "pairs such as premium=4,trial=0.5"),
    ("tenant_weights", {"premium": 0}, "pairs such as premium=4,trial=0.5"),
    ("tenant_weights", {"premium": float("inf")}, "pairs such as premium=4,trial=0.5"),
    ("tenant_weights", "premium=1e-320", "pairs such as premium=4,trial=0.5"),
    ("tenant_weights", {"premium": "x"}, "pairs such as premium=4,trial=0.5"),
    ("tenant_weights", {1: 4}, "pairs such as premium=4,trial=0.5"),
    ("tenant_weights", "[1", "pairs such as premium=4,trial=0.5"),
    ("tenant_weights", ["premium"], "pairs such as premium=4,trial=0.5"),
    ("model", "", "the name of a model"),
    ("kv_cache_page_size", 16, "a multiple of 32"),
    ("scheduling_policy", "best", "fcfs, priority"),
    ("kv_disk", "a\0b", "text in UTF-8 without NUL"),
    ("served_model_name", "\udcff", "text in UTF-8 without NUL"),
    ("model", Path("\udcff"), "text in UTF-8 without NUL"),
    ("tenant_weights", {"\udcff": 1}, "pairs such as premium=4,trial=0.5"),
    ("port", "x", "an integer from 0 to 65535"),
    ("port", 99999, "from 0 to 65535"),
]


@pytest.mark.parametrize("name, given, value", VALUES)
def test_a_value_is_the_same_setting_from_every_source(name: str, given: Any, value: Any) -> None:
    assert getattr(EngineConfig(**{name: given}), name) == value
    assert type(getattr(EngineConfig(**{name: given}), name)) is type(value)
    assert getattr(EngineConfig.from_keywords(**{name: given}), name) == value
    if isinstance(given, str):
        assert getattr(resolve_flags(BOTH, {name: given}, None).build(EngineConfig), name) == value
        source = environment_source({f"OCTAVO_{name.upper()}": given})
        assert getattr(resolve(BOTH, VLLM, [source]).build(EngineConfig), name) == value


@pytest.mark.parametrize("name, given, what", WRONG)
def test_a_wrong_value_is_one_line_from_every_source(name: str, given: Any, what: str) -> None:
    def build(**values: Any) -> None:
        resolved = resolve_flags(BOTH, values, None)
        resolved.build(EngineConfig), resolved.build(ServerConfig)

    calls = [build] if name == "port" else [build, EngineConfig, EngineConfig.from_keywords]
    for call in calls:
        with pytest.raises(ConfigError) as refused:
            call(**{name: given})
        message = str(refused.value)
        assert message.startswith(f"{name} must be {what}") and "\n" not in message and len(message) < 300


def test_a_file(tmp_path: Path) -> None:
    resolved = from_file(
        tmp_path,
        "tenant_weights: {premium: 4, trial: 0.5}\nmax-batch-size: 8\nkv_cache_memory: 4GiB\nport: 9000\n"
        "enable_prefix_caching: no\nkv_disk: null\nrequest_timeout: 1.5\n",
    )
    engine, server = resolved.build(EngineConfig), resolved.build(ServerConfig)
    assert engine.tenant_weights == {"premium": 4.0, "trial": 0.5}
    assert (engine.max_batch_size, engine.kv_cache_memory, engine.kv_disk) == (8, 4 * 2**30, None)
    assert (engine.enable_prefix_caching, engine.request_timeout, server.port) == (False, 1.5, 9000)


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("served_model_name: 2024", "served_model_name must be text, not 2024"),
        ("kv_disk: true", "kv_disk must be text, not true"),
        ("request_timeout: true", "request_timeout must be a positive number of seconds, not true"),
        ("max_batch_size:", "max_batch_size must be an integer of at least 1, not none"),
        ("max_batch_size: 2024-01-01", "max_batch_size must be an integer of at least 1"),
        ("tenant_weights: {premium: {a: 1}}", "tenant_weights must be pairs such as"),
        ("max-modle-len: 3", "unknown setting 'max-modle-len': did you mean max_model_len?"),
        ("xyzzy: 3", "unknown setting 'xyzzy': octavo config lists all settings"),
        ("- a\n- b", "must hold `name: value` lines"),
        ("1: 2", "must hold `name: value` lines"),
        ("a: [", "cannot read"),
        ("max_batch_size: 4\nmax-batch-size: 5", "max_batch_size in {file} is set twice"),
        ("threads: 4\nthreads: 5", "threads is set twice"),
        ("tenant_weights: {a: 1, a: 2}", "a is set twice"),
        ("max_batch_size: " + "0" * 10**6, "it has more than 65536 bytes"),
        ("a: " + "[" * 5000, "cannot read"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_the_file(yaml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        from_file(tmp_path, yaml)
    assert message.replace("{file}", str(tmp_path / "octavo.yaml")) in str(refused.value)
    assert "octavo.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_a_value_can_be_printed_and_read_again() -> None:
    config = EngineConfig(
        kv_cache_memory="1.5G", tenant_weights="a=0.5,b=2", enable_prefix_caching=False, max_batch_size=7
    )
    texts = {name: format_value(EngineConfig, name, getattr(config, name)) for name in settings_of(EngineConfig)}
    assert texts["kv_cache_memory"] == "1500000000" and texts["kv_disk_size"] == "20GiB"
    assert resolve_flags(BOTH, texts, None).build(EngineConfig) == config


def test_any_dataclass_of_settings_can_be_read() -> None:
    @dataclass(frozen=True)
    class Other:
        names: list[str] = field(default_factory=list)
        pair: tuple[int, ...] = ()
        depth: int = field(default=1, metadata={"help": "…"})

    flags = {"names": "a, b", "pair": "1,2", "depth": "3"}
    assert resolve_flags((Other,), flags, None).build(Other) == Other(["a", "b"], (1, 2), 3)
    with pytest.raises(ConfigError, match="names must be a list such as a,b, not 5"):
        resolve_flags((Other,), {"names": 5}, None)


# Sources


def test_rank_and_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_MAX_QUEUE", "1")
    monkeypatch.setenv("OCTAVO_THREADS", "1")
    monkeypatch.setenv("OCTAVO_PORT", "1")
    (tmp_path / "a.yaml").write_text("max_queue: 2\nthreads: 2\n")
    resolved = resolve_flags(BOTH, {"max_queue": "3", "max_num_seqs": "5", "device": None}, tmp_path / "a.yaml")
    assert resolved.values == {"max_queue": 3, "threads": 2, "port": 1, "max_batch_size": 5}
    assert resolved.origins == {
        "max_queue": "flag --max-queue",
        "threads": f"file threads in {tmp_path / 'a.yaml'}",
        "port": "environment OCTAVO_PORT",
        "max_batch_size": "flag --max-num-seqs (vLLM)",
    }
    assert EngineConfig.from_keywords(max_queue=None, threads=4).max_queue == 1  # None: not given
    assert resolve_flags(BOTH, {"threads": "none"}, tmp_path / "a.yaml").build(EngineConfig).threads is None


@pytest.mark.parametrize(
    "variable, warning",
    [
        ("OCTAVO_MAX_BATCHSIZE", "OCTAVO_MAX_BATCHSIZE is not a setting; did you mean OCTAVO_MAX_BATCH_SIZE?"),
        ("OCTAVO_PROT", "OCTAVO_PROT is not a setting; did you mean OCTAVO_PORT?"),
        ("OCTAVO_XYZZY", "OCTAVO_XYZZY is not a setting; octavo config lists all settings"),
        ("OCTAVO_ISA", None),
        ("OCTAVO_PORT", None),
    ],
)
def test_a_variable_that_is_no_setting_is_warned_of(variable: str, warning: str | None) -> None:
    resolved = resolve(BOTH, VLLM, [environment_source({variable: "4", "OTHER_MAX_BATCHSIZE": "4"})])
    assert resolved.warnings == ([warning] if warning else [])


def test_python_warns_of_likely_mistakes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_MAX_BATCHSIZE", "4")
    monkeypatch.setenv("OCTAVO_DRAIN_TIMEOUT", "4")  # a setting of the server
    with pytest.warns(UserWarning, match="OCTAVO_MAX_BATCH_SIZE") as seen:
        EngineConfig.from_keywords()
    assert len(seen) == 1


def test_the_engine_process_gets_what_it_can_decode() -> None:
    import msgspec

    config = EngineConfig(tenant_weights="a=2", kv_disk=Path("/tmp"), threads=np.int32(1), kv_disk_size="1GiB")
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(dataclasses.asdict(config)))
    assert EngineConfig(**sent) == config


# vLLM's names

PASTED: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # given, settings, what the warning says
    ({"max_num_seqs": "64"}, {"max_batch_size": 64}, "--max-num-seqs 64 is max_batch_size"),
    ({"max_num_batched_tokens": "8192"}, {"max_batch_tokens": 8192}, "max_batch_tokens"),
    ({"block_size": "16"}, {"kv_cache_page_size": 32}, "is kv_cache_page_size 32, as a page holds a multiple of 32"),
    ({"block_size": "128"}, {"kv_cache_page_size": 128}, "--block-size 128 is kv_cache_page_size"),
    ({"max_model_len": "auto"}, {"max_model_len": None}, ""),
    ({"max_model_len": "-1"}, {"max_model_len": None}, ""),
    ({"dtype": "half"}, {"dtype": "auto"}, "computed in bfloat16"),
    ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}, ""),
    ({"kv_cache_dtype": "auto"}, {"kv_cache_dtype": "auto"}, ""),
    ({"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int8"}, "is kv_cache_dtype int8"),
    ({"quantization": "awq_marlin"}, {"quantization": "auto"}, "the file's own integers"),
    ({"quantization": "bitsandbytes"}, {"quantization": "4bit"}, "4bit"),
    ({"enable_prefix_caching": False}, {"enable_prefix_caching": False}, ""),
    (
        {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 4}'},
        {"speculative_tokens": 4},
        "speculative_tokens 4",
    ),
    ({"speculative_config": '{"method": "eagle3", "model": "x"}'}, {"speculative_tokens": 0}, "ignored"),
    ({"gpu_memory_utilization": "0.9"}, {}, "ignored: --gpu-memory-utilization 0.9 (kv_cache_memory"),
    ({"gpu_memory_utilization": "0.8", "device": "cuda"}, {"gpu_memory_utilization": 0.8}, ""),
    ({"enforce_eager": True}, {}, "ignored: --enforce-eager (there are no CUDA graphs)"),
    ({"enforce_eager": False}, {}, ""),
    ({"swap_space": "4"}, {}, "kv_host_memory"),
    ({"enable_chunked_prefill": True}, {}, ""),
    ({"enable_chunked_prefill": False}, {}, "ignored: --no-enable-chunked-prefill"),
    ({"trust_remote_code": True}, {}, "never run"),
    ({"tool_call_parser": "hermes", "enable_auto_tool_choice": True}, {"tool_call_parser": "hermes"}, "always"),
    ({"reasoning_parser": "qwen3"}, {"reasoning_parser": "qwen3"}, ""),
    ({"seed": "0"}, {}, "ignored: --seed 0"),
    ({"generation_config": "vllm"}, {"generation_config": "none"}, ""),
    ({"kv_cache_memory_bytes": "4GiB"}, {"kv_cache_memory": 4 * 2**30}, "is kv_cache_memory"),
    ({"priority_ageing": "5"}, {"priority_aging": 5.0}, ""),
]


@pytest.mark.parametrize("given, settings, warning", PASTED)
def test_a_flag_of_vllm(given: dict[str, Any], settings: dict[str, Any], warning: str) -> None:
    resolved = resolve_flags(BOTH, given, None)
    config = resolved.build(EngineConfig)
    for name, value in settings.items():
        assert getattr(config, name) == value
    assert len(resolved.warnings) == bool(warning)
    assert warning in "".join(resolved.warnings)


@pytest.mark.parametrize(
    "name, value",
    [
        ("chat_template", "x.jinja"),
        ("hf_overrides", "{}"),
        ("enable_lora", True),
    ],
)
def test_what_must_not_be_ignored_is_refused(name: str, value: Any) -> None:
    for call in (lambda: resolve_flags(BOTH, {name: value}, None), lambda: EngineConfig.from_keywords(**{name: value})):
        with pytest.raises(ConfigError, match=f"^{name} is not supported: [^\n]+$") as refused:
            call()
        assert "secret" not in str(refused.value)


def test_vllm_s_names_are_keys_and_keywords_too(tmp_path: Path) -> None:
    resolved = from_file(tmp_path, "max-num-seqs: 8\nenforce-eager: true\nspeculative_config: {method: ngram}\n")
    assert resolved.build(EngineConfig).max_batch_size == 8
    assert len(resolved.warnings) == 1 and "CUDA graphs" in resolved.warnings[0]
    with pytest.warns(UserWarning, match="CUDA graphs"):
        assert EngineConfig.from_keywords(max_num_seqs=8, enforce_eager=True).max_batch_size == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EngineConfig.from_keywords(enforce_eager=False, gpu_memory_utilization=None).max_batch_size == 256


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_num_seqs": "4", "max_batch_size": "5"}, "the same setting"),
        ({"max_num_seqs": "many"}, "max_batch_size must be an integer .* 'many' .given as --max-num-seqs"),
        ({"block_size": "x"}, "block_size must be an integer"),
        ({"speculative_config": "{"}, "speculative_config must be JSON"),
        ({"speculative_config": "[]"}, "speculative_config must be JSON"),
        ({"speculative_config": '{"method": "ngram", "num_speculative_tokens": "x"}'}, "speculative_tokens must be"),
        ({"quantization": "fp6"}, "quantization must be auto, none, 8bit or 4bit"),
    ],
)
def test_a_mistake_in_a_flag_of_vllm(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        resolve_flags(BOTH, given, None)
    assert "\n" not in str(refused.value)


def test_no_name_of_vllm_hides_a_setting() -> None:
    for name in settings_of(EngineConfig) | settings_of(ServerConfig):
        assert name not in VLLM or VLLM[name].read("1") is None, name
