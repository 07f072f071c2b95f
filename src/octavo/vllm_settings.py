"""vLLM's spellings of settings, so that its command lines, configuration files and keywords work unchanged.

A setting of vLLM's that Octavo lacks is ignored, with a note, if ignoring it is harmless. It is refused if ignoring it
would change answers, or would leave a server less protected than its owner believes.
"""

import json
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .settings import Alias, Reading, convert

PAGE_TOKENS = 32  # the number of tokens in a page is a multiple of this


def _is_off(value: Any) -> bool:
    return value is None or value is False or str(value).strip().lower() in ("false", "none", "null", "")


def _same(setting: str, quietly: bool = False) -> Alias:
    return Alias(lambda value: Reading({setting: value}, "" if quietly else f"is {setting}"))


def _ignored(why: str, is_flag: bool = False) -> Alias:
    def read(value: Any) -> Reading:
        return Reading() if is_flag and _is_off(value) else Reading(note=f"({why})", ignored=True)

    return Alias(read, is_flag)


def _refused(name: str, why: str, is_flag: bool = False) -> Alias:
    def read(value: Any) -> Reading:
        if _is_off(value):
            return Reading()
        raise ConfigError(f"{name} is not supported: {why}")

    return Alias(read, is_flag)


def _values(setting: str, meanings: Mapping[str, tuple[str, str]]) -> Alias:
    """Return the alias of a setting with the same name: vLLM's value -> (Octavo's value, a note)."""

    def read(value: Any) -> Reading | None:
        if not isinstance(value, str) or value.strip().lower() not in meanings:
            return None
        meant, note = meanings[value.strip().lower()]
        return Reading({setting: meant}, note)

    return Alias(read)


def _read_block_size(value: Any) -> Reading:
    try:
        tokens = convert(value, int)
    except (ValueError, TypeError):
        raise ConfigError(f"block_size must be an integer, not {value!r}") from None
    rounded = max(1, -(-tokens // PAGE_TOKENS)) * PAGE_TOKENS
    why = "" if rounded == tokens else f" {rounded}, as a page holds a multiple of {PAGE_TOKENS} tokens"
    return Reading({"kv_cache_page_size": rounded}, f"is kv_cache_page_size{why}")


def _read_max_model_len(value: Any) -> Reading | None:
    """Translate vLLM's auto and -1, which stand for the model's own limit."""
    return Reading({"max_model_len": None}) if str(value).strip().lower() in ("auto", "-1") else None


def _read_speculative_config(value: Any) -> Reading:
    try:
        config = json.loads(value) if isinstance(value, str) else value
        method, tokens = config.get("method"), config.get("num_speculative_tokens", 0)
    except (ValueError, AttributeError, RecursionError):
        example = '{"method": "ngram", "num_speculative_tokens": 4}'
        raise ConfigError(f"speculative_config must be JSON such as {example}, not {value!r}") from None
    if method in ("ngram", "ngram_gpu", "suffix"):
        return Reading({"speculative_tokens": tokens}, f"is speculative_tokens {tokens}")
    why = "draft tokens come from the sequence's own text only: see speculative_tokens; the output is the same"
    return Reading(note=f"({why})", ignored=True)


def _read_kv_events_config(value: Any) -> Reading:
    try:
        config = json.loads(value) if isinstance(value, str) else value
        enabled, kind = config.get("enable_kv_cache_events", False), config.get("publisher", "zmq")
        endpoint, replay = config.get("endpoint", "tcp://*:5557"), config.get("replay_endpoint")
    except (ValueError, AttributeError, RecursionError):
        example = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}'
        raise ConfigError(f"kv_events_config must be JSON such as {example}, not {value!r}") from None
    if not enabled or kind != "zmq":
        return Reading(note="(no events)", ignored=True)
    return Reading({"kv_events": endpoint, "kv_events_replay": replay}, f"is kv_events {endpoint}")


def _read_allowed_origins(value: Any) -> Reading:
    try:
        origins = json.loads(value) if isinstance(value, str) and value.strip().startswith("[") else value
    except ValueError:
        raise ConfigError(f'allowed_origins must be JSON such as ["https://example.org"], not {value!r}') from None
    origins = ",".join(map(str, origins)) if isinstance(origins, list) else origins
    return Reading({"cors_origins": origins}, "is cors_origins")


def _read_no_access_log(value: Any) -> Reading:
    return Reading() if _is_off(value) else Reading({"access_log": "none"}, "is access_log none")


_OWN_INTEGERS = ("auto", "is quantization auto: the file's own integers")
_EIGHT_BITS_KV = ("int8", "is kv_cache_dtype int8: 8 bits, with scales")
_HALF = ("auto", "is computed in bfloat16")
_LOCAL = "the engine runs on one device in one process"
_LOGGING = "see access_log"
_OTHER_ANSWERS = "it would change answers"

_VALUES: dict[str, Alias] = {
    "max_num_seqs": _same("max_batch_size"),
    "max_num_batched_tokens": _same("max_batch_tokens"),
    "kv_cache_memory_bytes": _same("kv_cache_memory"),
    "block_size": Alias(_read_block_size),
    "priority_ageing": _same("priority_aging", quietly=True),  # Octavo's own older spelling
    "max_model_len": Alias(_read_max_model_len),
    "dtype": _values("dtype", {"half": _HALF, "float16": _HALF, "fp16": _HALF, "float": ("float32", "")}),
    "generation_config": _values("generation_config", {"vllm": ("none", "")}),
    "kv_cache_dtype": _values(
        "kv_cache_dtype", dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"), _EIGHT_BITS_KV)
    ),
    "quantization": _values(
        "quantization",
        dict.fromkeys(("awq", "gptq", "awq_marlin", "gptq_marlin", "auto-gptq", "auto_gptq", "gguf"), _OWN_INTEGERS)
        | dict.fromkeys(("compressed-tensors", "auto-round"), _OWN_INTEGERS)
        | {
            "bitsandbytes": ("4bit", "is quantization 4bit"),
            "fp8": ("8bit", "is quantization 8bit, of integers"),
            "int8": ("8bit", ""),
            "int4": ("4bit", ""),
        },
    ),
    "kv_events_config": Alias(_read_kv_events_config),
    "speculative_config": Alias(_read_speculative_config),
    "allowed_origins": Alias(_read_allowed_origins),
    "num_gpu_blocks_override": _ignored("kv_cache_memory sets the size of the KV cache"),
    "swap_space": _ignored("see kv_disk and kv_host_memory"),
    "cpu_offload_gb": _ignored("weights are not offloaded"),
    "kv_offloading_size": _ignored("see kv_disk and kv_host_memory"),
    "kv_offloading_backend": _ignored("see kv_disk and kv_host_memory"),
    "seed": _ignored("give each request its own seed; without one, a new seed is drawn and reported"),
    "load_format": _ignored("found from the model's files"),
    "download_dir": _ignored("HF_HOME is the folder of downloads"),
    "tokenizer_mode": _ignored("there is one tokenizer"),
    "distributed_executor_backend": _ignored(_LOCAL),
    "pipeline_parallel_size": _ignored(_LOCAL),
    "api_server_count": _ignored(_LOCAL),
    "limit_mm_per_prompt": _ignored("text only"),
    "mm_processor_kwargs": _ignored("text only"),
    "mm_processor_cache_gb": _ignored("text only"),
    "compilation_config": _ignored("nothing is compiled at run time"),
    "optimization_level": _ignored("nothing is compiled at run time"),
    "attention_backend": _ignored("there is one"),
    "max_seq_len_to_capture": _ignored("there are no CUDA graphs"),
    "max_num_partial_prefills": _ignored("max_batch_tokens bounds a step"),
    "max_long_partial_prefills": _ignored("max_batch_tokens bounds a step"),
    "long_prefill_token_threshold": _ignored("max_batch_tokens bounds a step"),
    "prefix_caching_hash_algo": _ignored("there is one"),
    "otlp_traces_endpoint": _same("otlp_endpoint"),
    "collect_detailed_traces": _ignored("trace has the times of steps"),
    "uvicorn_log_level": _ignored(_LOGGING),
    "max_log_len": _ignored(_LOGGING),
    "task": _ignored("models generate text"),
    "runner": _ignored("models generate text"),
    "model_impl": _ignored("there is one"),
    "middleware": _refused("middleware", "without it, authentication might be missing; put it into a proxy"),
    "hf_token": _refused("hf_token", "set the environment variable HF_TOKEN"),
    "chat_template": _refused(
        "chat_template", _OTHER_ANSWERS + "; put it into the model's folder as chat_template.jinja"
    ),
    "tokenizer": _refused("tokenizer", _OTHER_ANSWERS + "; a model's folder holds its tokenizer"),
    "tokenizer_revision": _refused("tokenizer_revision", _OTHER_ANSWERS),
    "hf_overrides": _refused("hf_overrides", _OTHER_ANSWERS + "; edit the model's config.json"),
    "hf_config_path": _refused("hf_config_path", _OTHER_ANSWERS),
    "rope_scaling": _refused("rope_scaling", _OTHER_ANSWERS + "; edit the model's config.json"),
    "rope_theta": _refused("rope_theta", _OTHER_ANSWERS + "; edit the model's config.json"),
    "override_generation_config": _refused("override_generation_config", _OTHER_ANSWERS + "; set them in requests"),
    "lora_modules": _refused("lora_modules", _OTHER_ANSWERS),
    "logits_processors": _refused("logits_processors", _OTHER_ANSWERS),
    "response_role": _ignored("answers have the role assistant"),
}

_FLAGS: dict[str, Alias] = {
    "enforce_eager": _ignored("there are no CUDA graphs", is_flag=True),
    "trust_remote_code": _ignored("code that comes with a model is never run", is_flag=True),
    "enable_chunked_prefill": Alias(
        lambda value: (
            Reading(note="(prompts are always cut into chunks)", ignored=True) if _is_off(value) else Reading()
        ),
        is_flag=True,
    ),
    "enable_auto_tool_choice": _ignored("always", is_flag=True),
    "async_scheduling": _ignored("always", is_flag=True),
    "enable_expert_parallel": _ignored(_LOCAL, is_flag=True),
    "disable_custom_all_reduce": _ignored(_LOCAL, is_flag=True),
    "disable_frontend_multiprocessing": _ignored("the engine of a server is always a process of its own", is_flag=True),
    "disable_log_stats": _ignored(_LOGGING, is_flag=True),
    "disable_log_requests": _ignored(_LOGGING, is_flag=True),
    "enable_log_requests": _ignored(_LOGGING, is_flag=True),
    "disable_uvicorn_access_log": Alias(_read_no_access_log, is_flag=True),
    "disable_fastapi_docs": _ignored("there are none", is_flag=True),
    "enable_ssl_refresh": _ignored("certificates are read again after a change", is_flag=True),
    "enable_server_load_tracking": _ignored("see /stats", is_flag=True),
    "enable_request_id_headers": _ignored("always", is_flag=True),
    "enable_prompt_tokens_details": _ignored("always", is_flag=True),
    "enable_lora": _refused("enable_lora", _OTHER_ANSWERS, is_flag=True),
    "disable_sliding_window": _refused("disable_sliding_window", _OTHER_ANSWERS, is_flag=True),
    "allow_credentials": _refused("allow_credentials", "pages may not send cookies to this server", is_flag=True),
}

VLLM: Mapping[str, Alias] = _VALUES | _FLAGS
"""Aliases by vLLM's name. If Octavo has a setting of the same name, the alias translates vLLM's values of it."""
