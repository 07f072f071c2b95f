"""EngineConfig: every setting of the engine, defined once.

A field is a keyword of `LLM(...)`, a flag of `octavo serve` (dashes or underscores), a key of `--config file.yaml` and
an `OCTAVO_*` environment variable; flags win over the file, the file over the environment.
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .machine import available_cores

DTYPES = {"auto": "auto", "bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32", "fp32": "float32"}
KV_CACHE_DTYPES = {"auto": "bf16", "bf16": "bf16", "bfloat16": "bf16", "int8": "int8"}
QUANTIZATIONS = ("auto", "none", "8bit", "4bit")
POLICIES = ("fcfs", "priority", "fair", "deadline")
PREEMPTIONS = ("auto", "swap", "recompute")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Raises ConfigError, one line, for a value that cannot work."""

    model: str = _setting("smollm2", "A Hugging Face directory, a .gguf file, a hub name, or the alias smollm2.")
    revision: str | None = _setting(None, "Branch, tag or commit of a hub model.")
    served_model_name: str | None = _setting(None, "The model's name in the API; the value of `model` by default.")
    backend: str = _setting("auto", "cpu (native) or torch; auto is cpu.")
    device: str = _setting("auto", "Device of the torch backend: cpu or cuda.")
    dtype: str = _setting("auto", "Arithmetic: bfloat16, or float32 (torch backend only).")
    quantization: str = _setting(
        "none", "Weights in arithmetic: none (bf16), auto (the file's own integers, as a GGUF's), 8bit or 4bit."
    )
    max_model_len: int | None = _setting(
        None, "Tokens of prompt and output together; the model's own limit by default."
    )
    max_batch_size: int = _setting(256, "Sequences that run at the same time.")
    max_batch_tokens: int = _setting(512, "Tokens computed in one step: the size of a prefill chunk.")
    kv_cache_page_size: int = _setting(32, "Tokens in a page of the KV cache: a multiple of 32.")
    kv_cache_dtype: str = _setting(
        "bf16", "Keys and values in the cache: bf16, or int8 (half the memory; cpu backend)."
    )
    kv_cache_memory: str | int | None = _setting(
        None, "Memory for the KV cache, such as 4GiB; by default what a full batch needs, at most half of what is free."
    )
    kv_disk: str | None = _setting(None, "A folder that keeps KV pages below those in memory, over restarts too.")
    kv_disk_size: str | int = _setting("20GiB", "Disk that kv_disk may take; the least recently used pages go first.")
    kv_host_memory: str | int | None = _setting(
        None, "Host memory for KV pages below those of the device, such as 8GiB (torch backend)."
    )
    kv_state_quota: int = _setting(1_000_000, "Tokens that the KV states of one tenant may hold together.")
    kv_state_ttl: float = _setting(3600.0, "Seconds that a KV state is kept after its last use.")
    enable_prefix_caching: bool = _setting(True, "Keep pages of finished requests for prompts that begin the same.")
    speculative_tokens: int = _setting(
        0, "Guesses at the next tokens that a step tries, looked up in the text so far. The tokens stay the same."
    )
    scheduling_policy: str = _setting(
        "fcfs", "Who is served next: fcfs, priority, fair (between tenants), deadline, or package.module:ClassName."
    )
    priority_aging: float = _setting(
        10.0, "Seconds of waiting that make up for one step of priority, so that nobody waits for ever."
    )
    tenant_weights: str | None = _setting(
        None, "Shares of tenants under the policy fair, such as premium=4,trial=0.5; 1 by default."
    )
    preemption: str = _setting(
        "auto", "How a sequence that lost its pages comes back: swap (from kv_disk), recompute, or what is quicker."
    )
    max_queue: int = _setting(10_000, "Requests that may wait in the server; beyond them it answers 503.")
    request_timeout: float | None = _setting(
        None, "Seconds that a request which does not say may take; by default any number."
    )
    threads: int | None = _setting(None, "Compute threads, each pinned to a core; one per available core by default.")
    tensor_parallel_size: int = _setting(1, "Devices to spread the model over. Only 1 so far.")

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ConfigError(f"{name} must be {what}, not {getattr(self, name)!r}")

        def at_least(name: str, low: int) -> None:
            value = getattr(self, name)
            need(isinstance(value, int) and not isinstance(value, bool) and value >= low, name, f"at least {low}")

        def positive(name: str) -> None:
            value = getattr(self, name)
            need(isinstance(value, (int, float)) and 0 < value < math.inf, name, "a positive number of seconds")

        need(bool(self.model), "model", "the name of a model")
        need(self.backend in ("auto", "cpu", "torch"), "backend", "auto, cpu or torch")
        need(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None, "device", "auto, cpu or cuda")
        need(self.dtype in DTYPES, "dtype", "auto, bfloat16 or float32")
        if self.backend != "torch":
            need(DTYPES[self.dtype] != "float32", "dtype", "bfloat16 unless the backend is torch")
        need(self.quantization in QUANTIZATIONS, "quantization", "auto, none, 8bit or 4bit")
        if self.backend == "torch":
            need(self.quantization in ("auto", "none"), "quantization", "auto or none with the torch backend")
            need(self.kv_cache_dtype != "int8", "kv_cache_dtype", "bf16 with the torch backend")
        if self.max_model_len is not None:
            at_least("max_model_len", 2)
        at_least("max_batch_size", 1)
        at_least("max_batch_tokens", 1)
        at_least("kv_cache_page_size", 32)
        need(self.kv_cache_page_size % 32 == 0, "kv_cache_page_size", "a multiple of 32")
        need(self.kv_cache_dtype in KV_CACHE_DTYPES, "kv_cache_dtype", "bf16 or int8")
        at_least("speculative_tokens", 0)
        at_least("kv_state_quota", 0)
        positive("kv_state_ttl")
        policy = self.scheduling_policy
        ours = policy in POLICIES or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", policy) is not None
        need(ours, "scheduling_policy", "fcfs, priority, fair, deadline, or package.module:ClassName")
        positive("priority_aging")
        parse_weights(self.tenant_weights or "")
        need(self.preemption in PREEMPTIONS, "preemption", "auto, swap or recompute")
        at_least("max_queue", 0)
        if self.request_timeout is not None:
            positive("request_timeout")
        if self.threads is not None:
            at_least("threads", 1)
        need(self.tensor_parallel_size == 1, "tensor_parallel_size", "1: this version runs on one device")
        need(
            self.kv_host_memory is None or self.backend == "torch",
            "kv_host_memory",
            "unset unless the backend is torch",
        )
        tiers = self.kv_disk or self.kv_host_memory
        need(
            bool(self.enable_prefix_caching or not tiers), "enable_prefix_caching", "on with kv_disk or kv_host_memory"
        )
        for name in ("kv_cache_memory", "kv_disk_size", "kv_host_memory"):
            if (size := getattr(self, name)) is not None:
                parse_size(size, name)

    def replaced(self, name: str, text: str) -> "EngineConfig":
        """This one with the setting `name` as `text` has it. Raises ConfigError."""
        fields = {f.name: f for f in dataclasses.fields(self)}
        if name not in fields:
            raise ConfigError(f"unknown setting {name!r}; the settings are {', '.join(sorted(fields))}")
        return dataclasses.replace(self, **{name: _parse(name, text, fields[name])})

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model

    @property
    def num_threads(self) -> int:
        return self.threads or available_cores()

    @classmethod
    def from_keywords(cls, **keywords: Any) -> "EngineConfig":
        """As the constructor, with OCTAVO_* variables as defaults; an unknown keyword is a ConfigError."""
        fields = sorted(f.name for f in dataclasses.fields(cls))
        for name in keywords:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, 1)
                hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(fields)}"
                raise ConfigError(f"unknown setting {name!r}: {hint}")
        return cls.from_sources(keywords)

    @classmethod
    def from_sources(cls, flags: Mapping[str, Any], file: Path | None = None) -> "EngineConfig":
        """Merge `flags` (None: not given), a YAML file and OCTAVO_* variables. Raises ConfigError."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, f in fields.items():
            if (text := os.environ.get(f"OCTAVO_{name.upper()}")) is not None:
                values[name] = _parse(name, text, f)
        for key, value in _read_yaml(file).items():
            name = str(key).replace("-", "_")
            if name not in fields:
                raise ConfigError(f"{file}: unknown key {key!r}; the keys are {', '.join(sorted(fields))}")
            values[name] = _parse(name, value, fields[name])
        values.update({name: value for name, value in flags.items() if value is not None})
        return cls(**values)


def parse_size(value: str | int, name: str) -> int:
    """Bytes of 4GiB, 500MB, 1.5G or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{name} must be a size such as 4GiB or 500MB, not {value!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_weights(text: str) -> dict[str, float]:
    """Weights by tenant, of a text such as premium=4,trial=0.5. Raises ConfigError."""
    weights = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([^=]+?)\s*=\s*(\d+(?:\.\d+)?)\s*", part)
        if not match or float(match[2]) <= 0:
            raise ConfigError(f"tenant_weights must be such as premium=4,trial=0.5, not {text!r}")
        weights[match[1]] = float(match[2])
    return weights


def _parse(name: str, value: Any, f: "dataclasses.Field[Any]") -> Any:
    """`value`, from a file or the environment, as the type the field declares."""
    kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    if isinstance(value, str) and "bool" in kind:
        if value.lower() not in ("1", "0", "true", "false", "yes", "no"):
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        return value.lower() in ("1", "true", "yes")
    if isinstance(value, str) and kind in ("int", "int | None"):
        try:
            return int(value)
        except ValueError:
            raise ConfigError(f"{name} must be an integer, not {value!r}") from None
    if isinstance(value, str) and kind in ("float", "float | None"):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, not {value!r}") from None
    return value


def _read_yaml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{file} must hold `key: value` lines")
    return content or {}
