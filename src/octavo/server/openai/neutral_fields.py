"""Fields of other servers' APIs that Octavo does not implement, and their neutral values, which have no effect.

Clients such as SillyTavern, guidellm, sglang-router and vllm-router add such fields to every body. A neutral value is
accepted. Any other value is refused with the field's name, since ignoring it would change the answer. A field that is
not listed is accepted if it is null, false, zero or empty.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from octavo.server.errors import ApiError, unknown_field

ANY: Final = object()  # for fields that never change the tokens

ALIASES = {
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stopping_strings": "stop",
    "rep_pen": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
}
"""Other servers' names for fields that Octavo has."""

NEUTRAL: dict[str, Any] = {
    # OpenAI: storage, billing and hints about speed
    **dict.fromkeys(("metadata", "store", "service_tier", "prediction"), ANY),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "moderation"), ANY),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "tools", "web_search_options"), ()),
    # vLLM
    "spaces_between_special_tokens": (True,),
    "include_reasoning": (True, False),  # completions have no reasoning
    "early_stopping": (False,),
    "response_role": ("assistant",),
    **dict.fromkeys(("request_id", "guided_decoding_backend", "mm_processor_kwargs"), ANY),
    "truncation_side": ("left", "right"),  # only with truncate_prompt_tokens
    **dict.fromkeys(("documents", "logits_processors"), ()),
    **dict.fromkeys(("chat_template", "kv_transfer_params", "vllm_xargs"), ()),
    # SGLang
    "no_stop_trim": (False,),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    "logprob_start_len": (-1,),
    **dict.fromkeys(("rid", "data_parallel_rank", "routed_dp_rank"), ANY),  # which engine computes them
    **dict.fromkeys(("return_hidden_states", "return_logprob", "return_text_in_logprobs"), (False,)),
    **dict.fromkeys(("regex", "ebnf", "json_schema", "stop_regex", "lora_path", "session_params"), ()),
    **dict.fromkeys(("custom_logit_processor", "custom_params", "bootstrap_host", "bootstrap_room"), ()),
    # llama.cpp
    "repeat_last_n": (-1,),
    "cache_prompt": ANY,
    "id_slot": (-1,),
    "min_keep": (0, 1),
    "tfs_z": (1.0,),
    "typ_p": (1.0,),
    "n_keep": (0, -1),
    "reasoning_format": ("none", "auto"),  # reasoning is never separated from the answer
    "timings_per_token": ANY,
    "backend_sampling": ANY,
    "grammar": (),
    # text-generation-webui and others, as SillyTavern sends them; settings of samplers that are off may have any value
    "do_sample": (True,),
    "num_beams": (1,),
    "tfs": (1.0,),
    "typical": (1.0,),
    "typical_p": (1.0, 0.0),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "add_bos_token": (True,),
    "ban_eos_token": (False,),
    "dynamic_temperature": (False,),
    "temperature_last": (False,),
    **dict.fromkeys(("top_a", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("mirostat", "mirostat_mode", "min_length", "smoothing_factor", "dry_multiplier"), (0,)),
    **dict.fromkeys(("xtc_probability", "nsigma", "top_n_sigma", "repetition_penalty_range", "rep_pen_range"), (0,)),
    **dict.fromkeys(("mirostat_tau", "mirostat_eta", "smoothing_curve", "dry_base", "dry_allowed_length"), ANY),
    **dict.fromkeys(("dry_sequence_breakers", "dry_penalty_last_n", "xtc_threshold", "negative_prompt"), ANY),
    **dict.fromkeys(("dynatemp_low", "dynatemp_high", "dynatemp_exponent", "truncation_length"), ANY),
    **dict.fromkeys(("sampler_priority", "sampler_order", "samplers", "repetition_penalty_slope", "legacy_api"), ANY),
    **dict.fromkeys(("dynatemp_range",), (0,)),
    **dict.fromkeys(("banned_strings", "custom_token_bans", "grammar_string", "logit_bias_exp"), ()),
}
COMPLETION_NEUTRAL = {**NEUTRAL, "continue_final_message": (False,), "add_special_tokens": (True,)}
CHAT_NEUTRAL = {**NEUTRAL, "add_special_tokens": (False,), "echo": (False,)}
MESSAGE_NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("refusal", "annotations", "cache_control"), ANY),
    **dict.fromkeys(("audio", "function_call"), ()),
}
STREAM_NEUTRAL: Mapping[str, Any] = {"include_obfuscation": ANY}


def without_neutral(
    given: dict[str, Any], known: Collection[str], neutral: Mapping[str, Any], path: str = ""
) -> dict[str, Any]:
    """Return the fields of `given` that are `known`.

    Args:
        neutral: field -> its neutral values besides null and empty ones.
        path: the location of `given` in the body, for error messages, such as messages[0].

    Raises ApiError 400 for a field that is neither known nor neutral.
    """
    foreign = given.keys() - known
    if not foreign:
        return given
    for name in sorted(foreign):
        value = given[name]
        if value is None:
            continue
        where = f"{path}.{name}" if path else name
        if name not in neutral:
            if value:
                raise unknown_field(where, name, known)
        elif neutral[name] is not ANY and not _is_neutral(value, neutral[name]):
            message = f"{where} is not supported by this server"
            if neutral[name]:
                message += f": leave it out or set it to {' or '.join(map(repr, neutral[name]))}"
            raise ApiError(400, message, where, "unsupported_field")
    return {name: value for name, value in given.items() if name in known}


def resolve_aliases(given: dict[str, Any]) -> dict[str, Any]:
    """Replace other servers' names of fields by Octavo's. Raises ApiError 400 if two names have different values."""
    if given.keys().isdisjoint(ALIASES):
        return given
    resolved = {name: value for name, value in given.items() if name not in ALIASES}
    for alias in given.keys() & ALIASES.keys():
        name, value = ALIASES[alias], given[alias]
        if value is None or (name == "stop" and not value):
            continue
        if resolved.get(name) is not None and resolved[name] != value:
            raise ApiError(400, f"{alias} and {name} are the same field but have different values", alias)
        resolved[name] = value
    return resolved


def _is_neutral(value: Any, accepted: Collection[Any]) -> bool:
    """Return whether `value` is accepted, or empty. False and zero count as empty only where nothing is accepted."""
    return value in accepted or (not value and (not accepted or isinstance(value, (str, list, dict))))
