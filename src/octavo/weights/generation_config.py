"""The sampling parameters that a model recommends, from its generation_config.json or the metadata of a .gguf file."""

from typing import Any

from octavo.errors import DamagedWeights, shortened
from octavo.formats.files import ModelPath
from octavo.formats.gguf import read_header

from .safetensors import read_json

_FILE = "generation_config.json"
_MAX_BYTES = 1 << 20

# Field of SamplingParams: the key in generation_config.json, the key in a .gguf file, the least and the largest value.
_FIELDS: dict[str, tuple[str, str, float, float]] = {
    "temperature": ("temperature", "general.sampling.temp", 0.0, 100.0),
    "top_p": ("top_p", "general.sampling.top_p", 0.0, 1.0),
    "top_k": ("top_k", "general.sampling.top_k", -1, 2**31 - 1),
    "min_p": ("min_p", "general.sampling.min_p", 0.0, 1.0),
    "repetition_penalty": ("repetition_penalty", "general.sampling.penalty_repeat", 1e-6, 100.0),
    "max_tokens": ("max_new_tokens", "", 1, 2**31 - 1),
}
_INTEGERS = ("top_k", "max_tokens")


def generation_defaults(path: ModelPath) -> dict[str, float | int]:
    """Return the sampling parameters that the model at `path` recommends, as vLLM's `generation_config="auto"` does.

    Args:
        path: A directory, whose generation_config.json is read if it has one, or a .gguf file, whose
            "general.sampling" keys are read.

    Returns:
        Some of temperature, top_p, top_k, min_p, repetition_penalty and max_tokens (max_new_tokens in the file), by the
        names of SamplingParams. Null values and all other keys of the file are ignored.

    Raises:
        DamagedWeights: A value is out of range or of the wrong type, or the file is not JSON.
        ModelNotFound: The file cannot be read.
    """
    in_gguf = path.suffix == ".gguf"
    values: dict[str, Any] = {}
    if in_gguf:
        values = read_header(path).metadata
    elif (path / _FILE).exists():
        values = read_json(path / _FILE, _MAX_BYTES)
    source = path if in_gguf else path / _FILE
    defaults: dict[str, float | int] = {}
    for field, (json_key, gguf_key, least, most) in _FIELDS.items():
        key = gguf_key if in_gguf else json_key
        if (value := values.get(key)) is None:
            continue
        kinds = int if field in _INTEGERS else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            right = f"an integer from {least} to {most:,}" if kinds is int else f"a number from {least:g} to {most:g}"
            raise DamagedWeights(f"{source} has {key} = {shortened(repr(value))}; it must be {right}")
        defaults[field] = value
    if defaults.get("top_p") == 0:  # the smallest set of tokens: the most likely one
        del defaults["top_p"]
        defaults["top_k"] = 1
    return defaults
