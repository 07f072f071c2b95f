"""A checkpoint on disk: its configuration and its tensors, in the same form for every file format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import UnsupportedModel, shortened
from octavo.formats.files import MANIFEST, ModelPath

from .tensor import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, mapped.

    Attributes:
        path: The directory or .gguf file.
        config: The keys and values of a Hugging Face config.json.
        tensors: The weights, by their Hugging Face names.
        stored: The tensors in the files. They differ from `tensors` if weights are computed from several stored
            tensors (AWQ and GPTQ).
    """

    path: ModelPath
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    stored: dict[str, Tensor]

    @property
    def known_fingerprint(self) -> str | None:
        """Return the fingerprint that was computed when the model was encrypted; None if it is not encrypted."""
        return None if isinstance(self.path, Path) else self.path.model.manifest.fingerprint

    def verify(self) -> None:
        """Wait until the files whose tensors were read are known to be complete. Raises DamagedWeights."""
        if not isinstance(self.path, Path):
            self.path.model.verify()


def open_checkpoint(path: ModelPath) -> Checkpoint:
    """Map the weights in the directory or .gguf file `path`, without reading them.

    Raises:
        ModelNotFound: A file is missing or cannot be read.
        DamagedWeights: A file is truncated, or inconsistent in itself or with another file.
        UnsupportedModel: The weights are in a format that Octavo does not read.
    """
    from .gguf import open_gguf
    from .safetensors import open_safetensors, read_config

    if path.suffix == ".gguf":
        config, tensors = open_gguf(path)
        return Checkpoint(path, config, tensors, tensors)
    if isinstance(path, Path) and (path / MANIFEST).exists():
        raise UnsupportedModel(f"{path} is encrypted; this needs the model that it was made from")
    config, stored = read_config(path), _with_prefix(open_safetensors(path))
    return Checkpoint(path, config, _weights(path, config.get("quantization_config"), stored), stored)


def _with_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their usual names. Without a head (Qwen3-Embedding), they lack a prefix."""
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in tensors.items()}


def _weights(path: ModelPath, settings: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's weights, given the tensors of its files and the quantization_config."""
    from .awq_gptq import open_quantized
    from .packed import METHOD, open_packed

    if not settings:
        return tensors
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if isinstance(settings, dict) and method in ("awq", "gptq"):
        return open_quantized(settings, tensors)
    if isinstance(settings, dict) and method == METHOD:
        return open_packed(path, tensors)
    raise UnsupportedModel(
        f"{path} is quantized by {shortened(repr(method))}; supported are AWQ and GPTQ, .gguf files, "
        "and what octavo quantize writes"
    )
