"""EngineConfig: every setting of the engine, defined once.

A field is a keyword of `LLM(...)`, a flag of `octavo serve` (with dashes or underscores), a key of `--config file.yaml`
and an environment variable `OCTAVO_...`. Flags and keywords win over the file, the file over the environment.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .address import EXAMPLE, Address, addresses
from .errors import ConfigError
from .extension import NAME
from .machine import available_cores
from .params import MAX_LOGPROBS
from .secret import SOURCES, Secrets, read_key, read_secret
from .settings import (
    Resolved,
    Rule,
    Settings,
    Size,
    Source,
    at_least,
    environment_source,
    file_source,
    flag_source,
    keyword_source,
    one_of,
    positive,
    resolve,
    setting,
    settings_of,
)
from .vllm_settings import PAGE_TOKENS, VLLM

DTYPES = {"auto": "auto", "bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32", "fp32": "float32"}
KV_CACHE_DTYPES = {"auto": "bf16", "bf16": "bf16", "bfloat16": "bf16", "int8": "int8"}
QUANTIZATIONS = ("auto", "none", "8bit", "4bit")
POLICIES = ("fcfs", "priority", "fair", "deadline")
MAX_REPLICAS = 256
ROLES = ("prefill", "decode", "both")
RANKS = (1, 2, 4, 8)  # numbers of processes over which a model can be divided
TOOL_PARSERS = (
    *("hermes", "qwen3_xml", "qwen3_coder", "llama3_json", "llama4_json", "llama4_pythonic", "pythonic", "mistral"),
    *("granite", "phi4_mini_json", "deepseek_v3", "deepseek_v31", "openai", "json"),
)
REASONING_PARSERS = ("qwen3", "deepseek_r1", "granite", "openai_gptoss")
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 0.75, 80 * 2**20  # for rendering a chat
_NAME = Rule("the name of a model", bool)
_DEVICE = Rule("auto, cpu or cuda", lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None)
_DTYPE = Rule("auto, bfloat16 or float32", DTYPES.__contains__)
_KV_CACHE_DTYPE = Rule("bf16 or int8", KV_CACHE_DTYPES.__contains__)
_BATCH_TOKENS = Rule("from 1 to 1048576", lambda value: 1 <= value <= 2**20)
_SHARE = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
_PAGE_SIZE = Rule(f"a multiple of {PAGE_TOKENS}", lambda value: value > 0 and value % PAGE_TOKENS == 0)
_POLICY = Rule(
    "fcfs, priority, fair, deadline, or package.module:ClassName",
    lambda value: value in POLICIES or re.fullmatch(NAME, value) is not None,
)
_HOST = Rule("a host name or number", lambda value: re.fullmatch(r"[\w.:%-]+", value) is not None)
_STORE = Rule(
    "a URL such as redis://[user:password@]host:6379 (also rediss:// and unix://), or package.module:ClassName",
    lambda value: re.fullmatch(rf"(redis|rediss|unix)://\S+|{NAME}", value) is not None,
)
_REPLICAS = Rule(f"from 1 to {MAX_REPLICAS}", lambda value: 1 <= value <= MAX_REPLICAS)
_WEIGHTS = Rule(
    "pairs such as premium=4,trial=0.5, with weights from 0.000001 to 1000000",
    lambda value: all(1e-6 <= weight <= 1e6 for weight in value.values()),
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """Settings of one engine. Sizes are in bytes, times in seconds.

    Raises:
        ConfigError: For an invalid value. The message is one line that names the setting and the valid values.
    """

    model: str = setting("smollm2", "A Hugging Face directory, a .gguf file, a hub name, or the alias smollm2.", _NAME)
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    model_identity: str | None = setting(
        None, f"age identity that opens an encrypted model: {SOURCES} (docs/secrets.md)."
    )
    served_model_name: str | None = setting(None, "The model's name in the API; by default the value of model.")
    backend: str = setting(
        "auto",
        "cpu (native kernels), cuda (Triton kernels) or torch (plain PyTorch, for comparisons); auto follows device.",
        one_of("auto", "cpu", "cuda", "torch"),
    )
    device: str = setting("auto", "cpu (auto); or an NVIDIA GPU: cuda, or cuda:1 for the second one.", _DEVICE)
    dtype: str = setting(
        "auto", "Data type of the computation: bfloat16 (auto), or float32 (torch backend only).", _DTYPE
    )
    quantization: str = setting(
        "none",
        "Format of the weights: bfloat16 (none), integers as the file stores them (auto), or quantized at load "
        "to 8 or 4 bits (8bit, 4bit).",
        one_of(*QUANTIZATIONS),
    )
    generation_config: str = setting(
        "auto",
        "Default sampling parameters: those that the model's files recommend (auto), or Octavo's own defaults (none).",
        one_of("auto", "none"),
    )
    chat_template_timeout: float = setting(
        TEMPLATE_SECONDS, "Seconds of processor time that the chat template may take.", positive("seconds")
    )
    chat_template_memory: Size = setting(
        TEMPLATE_MEMORY, "Memory that the chat template may take, beside eight times the size of the chat."
    )
    tool_call_parser: str = setting(
        "auto",
        f"Format of the model's tool calls: {', '.join(TOOL_PARSERS)}; auto finds it from the chat template.",
        one_of("auto", *TOOL_PARSERS),
    )
    reasoning_parser: str = setting(
        "auto",
        f"Format of the model's reasoning: {', '.join(REASONING_PARSERS)}; none leaves it in the text; auto finds it "
        "from the chat template.",
        one_of("auto", "none", *REASONING_PARSERS),
    )
    max_logprobs: int = setting(
        MAX_LOGPROBS,
        "Logprobs per token that a request may ask for; -1: of the whole vocabulary, in large and slow replies.",
        Rule("at least -1", lambda value: value >= -1),
    )
    max_model_len: int | None = setting(
        None, "Maximum tokens of prompt and output together; by default the model's own limit.", at_least(2)
    )
    max_batch_size: int = setting(256, "Maximum number of sequences that run at the same time.", at_least(1))
    max_batch_tokens: int = setting(
        512, "Maximum number of tokens computed in one step; longer prompts are split into chunks.", _BATCH_TOKENS
    )
    kv_cache_page_size: int = setting(32, "Tokens in a page of the KV cache: a multiple of 32.", _PAGE_SIZE)
    kv_cache_dtype: str = setting(
        "bf16", "Keys and values in the cache: bf16, or int8 for half the memory (not torch).", _KV_CACHE_DTYPE
    )
    kv_cache_memory: Size | None = setting(
        None,
        "Memory of the KV cache, such as 4GiB; by default enough for a full batch, up to half of the free memory, or "
        "up to what gpu_memory_utilization leaves of a GPU's.",
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "Share of a GPU's memory that weights, steps and KV cache take together, up to 1; not used on a CPU, where "
        "kv_cache_memory sets the KV cache.",
        _SHARE,
    )
    kv_disk: str | None = setting(None, "Folder for KV pages evicted from memory; they are kept across restarts.")
    kv_disk_size: Size = setting(
        20 * 2**30, "Disk space for kv_disk; when it is full, the least recently used pages are deleted."
    )
    kv_store: str | None = setting(
        None,
        "Redis or Valkey in which engines share KV pages, such as redis://host:6379, or package.module:ClassName "
        "(docs/kv_store.md).",
        _STORE,
    )
    kv_store_ttl: float = setting(
        86_400.0, "Seconds that kv_store keeps a page after its last use.", positive("seconds")
    )
    kv_key: str | None = setting(
        None,
        f"Key that encrypts kv_disk, kv_store and saved KV states, 64 hexadecimal digits: {SOURCES} (docs/secrets.md).",
    )
    kv_host_memory: Size | None = setting(
        None, "Host memory for KV pages evicted from the device, such as 8GiB (GPUs only)."
    )
    kv_state_quota: int = setting(1_000_000, "Maximum number of tokens in all KV states of one tenant.", at_least(0))
    kv_state_ttl: float = setting(3600.0, "Seconds that a KV state is kept after its last use.", positive("seconds"))
    enable_prefix_caching: bool = setting(True, "Reuse KV pages of earlier requests for prompts with the same prefix.")
    speculative_tokens: int = setting(
        0,
        "Draft tokens per sequence and step, copied from the sequence's own text; they never change the output.",
        at_least(0),
    )
    scheduling_policy: str = setting(
        "fcfs", "Order of requests: fcfs, priority, fair (to tenants), deadline, or package.module:ClassName.", _POLICY
    )
    priority_aging: float = setting(
        10.0,
        "Seconds of waiting that make up for one step of priority, so that every request is served in the end.",
        positive("seconds"),
    )
    tenant_weights: dict[str, float] = setting(
        {}, "Relative shares of tenants (policy fair), such as premium=4,trial=0.5; others have 1.", _WEIGHTS
    )
    preemption: str = setting(
        "auto",
        "How a preempted sequence gets its KV pages back: fetched from kv_disk or kv_host_memory (swap), recomputed "
        "(recompute), or the faster way (auto).",
        one_of("auto", "swap", "recompute"),
    )
    max_queue: int = setting(
        10_000, "Maximum number of waiting completions; requests beyond it are answered 503.", at_least(0)
    )
    max_new_tokens: int | None = setting(
        None, "Maximum tokens of a completion, whatever its max_tokens; unlimited by default.", at_least(1)
    )
    request_timeout: float | None = setting(
        None, "Timeout in seconds of requests that set none; unlimited by default.", positive("seconds")
    )
    threads: int | None = setting(
        None,
        "Compute threads, of each rank if there are several; by default one per available core, pinned to it.",
        at_least(1),
    )
    kv_events: str | None = setting(
        None, "ZeroMQ address, such as tcp://*:5557, on which cached pages are published as vLLM does, for routers."
    )
    kv_events_replay: str | None = setting(
        None, "ZeroMQ address at which subscribers request messages again that they have missed."
    )
    trace: str | None = setting(
        None, "File for the times of each step and the life of each request, which Perfetto and octavo trace open."
    )
    data_parallel_size: int = setting(
        1,
        "Replicas of the model, each in a process with its share of the cores; a request goes where it is done first.",
        _REPLICAS,
    )
    engines: list[str] | None = setting(
        None,
        "Use engines that others run (octavo engine), at these addresses, such as tcp://10.0.0.5:7000, separated by "
        "commas. A host name stands for all its addresses, as they change (docs/network.md).",
    )
    secret_file: str | None = setting(
        None,
        f"Secret that engines and frontends over the network share, and the nodes of a model, 64 hexadecimal digits: "
        f"{SOURCES}.",
    )
    role: str = setting(
        "both",
        "What octavo engine does in a fleet: prefill (prompts, which go on elsewhere after their first token), decode, "
        "or both (docs/fleet.md).",
        one_of(*ROLES),
    )
    tensor_parallel_size: int = setting(
        1,
        "Processes over which the model is divided: 1, 2, 4 or 8, each with its part of the weights; and with a GPU of "
        "its own, or its share of the cores.",
        Rule("1, 2, 4 or 8", RANKS.__contains__),
    )
    nnodes: int = setting(
        1,
        "Machines (nodes) over which these processes are divided; start the same command on each (docs/parallel.md).",
        Rule("1, 2, 4 or 8", RANKS.__contains__),
    )
    node_rank: int = setting(0, "Number of this machine among them; 0 serves, the others help it.", at_least(0))
    master_addr: str = setting("127.0.0.1", "Host name or number of machine 0, which the other ones can reach.", _HOST)
    master_port: int = setting(
        29501, "Port on which machine 0 waits for the others.", Rule("from 1 to 65535", lambda value: 0 < value < 65536)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.backend_name
        if kind == "cuda":
            self.need(self.nnodes == 1, "nnodes", "1 with the cuda backend")
        if kind == "torch":
            self.need(self.quantization in ("auto", "none"), "quantization", "auto or none with the torch backend")
            self.need(self.kv_cache_dtype != "int8", "kv_cache_dtype", "bf16 with the torch backend")
            self.need(self.tensor_parallel_size == 1, "tensor_parallel_size", "1 with the torch backend")
        else:
            self.need(DTYPES[self.dtype] != "float32", "dtype", "bfloat16 unless the backend is torch")
        if kind == "cpu":
            self.need(self.kv_host_memory is None, "kv_host_memory", "unset unless the backend is cuda or torch")
        if self.engines is not None:
            self.need(bool(self.engine_addresses), "engines", f"addresses such as {EXAMPLE}, or unset")
            self.need(self.data_parallel_size == 1, "data_parallel_size", "1 with engines: each address is one engine")
        if self.nnodes > 1:
            self.need(self.data_parallel_size == 1, "data_parallel_size", "1 with nnodes")
            self.need(self.engines is None, "engines", "unset with nnodes: give the engine this setting")
        self.need(self.tensor_parallel_size % self.nnodes == 0, "nnodes", "a divisor of tensor_parallel_size")
        self.need(self.node_rank < self.nnodes, "node_rank", f"from 0 to {self.nnodes - 1} with nnodes {self.nnodes}")
        tiers = (self.kv_disk, self.kv_host_memory, self.kv_store)
        self.need(
            self.enable_prefix_caching or tiers == (None, None, None),
            "enable_prefix_caching",
            "on with kv_disk, kv_host_memory or kv_store",
        )
        self.need(self.enable_prefix_caching or self.role == "both", "enable_prefix_caching", "on with a role")

    @property
    def backend_name(self) -> str:
        """Return the backend that runs the model: cpu, cuda or torch."""
        return _backend_name(self.backend, self.device)

    @property
    def model_name(self) -> str:
        """Return the model's name in the API."""
        return self.served_model_name or self.model

    @property
    def ranks_here(self) -> int:
        """Return the number of ranks on this machine."""
        return self.tensor_parallel_size // self.nnodes

    @property
    def num_threads(self) -> int:
        """Return the number of compute threads, of each rank if there are several."""
        return self.threads or max(1, available_cores() // self.ranks_here)

    def read_secrets(self) -> Secrets:
        """Return the secrets that the settings name. Raises ConfigError."""
        return Secrets(
            read_secret("model_identity", self.model_identity),
            read_key("kv_key", self.kv_key),
            read_key("secret_file", self.secret_file) if self.nnodes > 1 else None,
        )

    @property
    def engine_addresses(self) -> list[Address]:
        """Return the addresses in `engines`. Raises ConfigError."""
        return addresses(self.engines or ())

    def replaced(self, name: str, value: Any) -> "EngineConfig":
        """Return a copy with one setting changed. Raises ConfigError."""
        if name not in settings_of(EngineConfig):
            raise ConfigError(f"unknown setting {name!r}; the settings are {', '.join(settings_of(EngineConfig))}")
        return replace(self, **{name: value})

    def share(self, number: int, of: int) -> "EngineConfig":
        """Return the settings of one of several engines: each has its own folder and share of kv_disk."""
        if self.kv_disk is None:
            return self
        return replace(self, kv_disk=str(Path(self.kv_disk) / f"engine-{number}"), kv_disk_size=self.kv_disk_size // of)

    @property
    def template_limits(self) -> dict[str, Any]:
        """Return the limits of chat templates as arguments of Tokenizer.load."""
        return {"template_seconds": self.chat_template_timeout, "template_memory": self.chat_template_memory}

    @classmethod
    def from_keywords(cls, **keywords: Any) -> "EngineConfig":
        """Return the settings given by keyword arguments and OCTAVO_* variables, with vLLM's keywords as aliases.

        A keyword that is None counts as not given. Warns of ignored keywords. Raises ConfigError.
        """
        resolved = _resolve((cls,), [environment_source(), keyword_source(keywords)], hint=False)
        for warning in resolved.warnings:
            warnings.warn(warning, stacklevel=3)
        return resolved.build(cls)

    @classmethod
    def from_sources(cls, flags: Mapping[str, Any], file: Path | None = None) -> "EngineConfig":
        """Return the settings given by flags, a YAML file and OCTAVO_* variables. Raises ConfigError.

        A flag that is None counts as not given.
        """
        return resolve_flags((cls,), flags, file).build(cls)


def resolve_flags(classes: tuple[type, ...], flags: Mapping[str, Any], file: Path | None) -> Resolved:
    """Merge flags, a YAML file and OCTAVO_* variables for several classes of settings.

    A flag that is None counts as not given. Raises ConfigError.
    """
    files = [file_source(file)] if file else []
    return _resolve(classes, [environment_source(), *files, flag_source(flags)])


def _resolve(classes: tuple[type, ...], sources: list[Source], hint: bool = True) -> Resolved:
    """Merge sources of settings, and warn of one that has no effect on the device."""
    resolved = resolve(classes, VLLM, sources, hint)
    given, name = resolved.values, "gpu_memory_utilization"
    if name in given and _backend_name(given.get("backend", "auto"), given.get("device", "auto")) != "cuda":
        spelling = resolved.origins[name].partition(" ")[2]
        resolved.warnings.append(f"ignored: {spelling} {given[name]} (kv_cache_memory sets the KV cache of a CPU)")
    return resolved


def _backend_name(backend: str, device: str) -> str:
    """Return the backend that two settings choose: cpu, cuda or torch."""
    if backend != "auto":
        return backend
    return "cuda" if device.startswith("cuda") else "cpu"
