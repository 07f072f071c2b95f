"""A checkpoint on disk: its configuration and its tensors, whatever the format of the files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import UnsupportedModel

from .tensor import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """`config` has the keys of a Hugging Face config.json; `tensors`, mapped, have Hugging Face names."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def open_checkpoint(path: Path) -> Checkpoint:
    """Map the weights in the directory or .gguf file `path` without reading them.

    Raises ModelNotFound (nothing there to read), DamagedWeights, or UnsupportedModel.
    """
    from .gguf import open_gguf
    from .safetensors import open_safetensors, read_config

    if path.suffix == ".gguf":
        return Checkpoint(path, *open_gguf(path))
    config = read_config(path)
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise UnsupportedModel(
            f"{path} is quantised ({method}); supported are float weights, or a quantised .gguf file"
        )
    return Checkpoint(path, config, open_safetensors(path))
