"""A Hugging Face directory: config.json, and one safetensors file or several with an index."""

import json
import mmap
from pathlib import Path
from typing import Any

from octavo.errors import DamagedWeights, ModelNotFound, UnsupportedModel

from .tensor import Tensor, mapped_tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises ModelNotFound or DamagedWeights."""
    return _read_json(folder / "config.json")


def open_safetensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, by name. Raises ModelNotFound, UnsupportedModel or DamagedWeights."""
    if not (folder / INDEX).exists():
        return _open_file(folder / _only_file(folder))
    names = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise DamagedWeights(f"{folder / INDEX} has no usable weight_map; download it again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise DamagedWeights(f"{folder / INDEX} names {file!r}, which is outside the directory")
        tensors.update(_open_file(folder / file))
    if missing := sorted(names.keys() - tensors.keys()):
        raise DamagedWeights(f"{folder}: no file has the tensor {missing[0]!r} of {INDEX}; download it again")
    return tensors


def read_metadata(folder: Path) -> dict[str, str]:
    """What the one safetensors file of `folder`, which open_safetensors has read, says beside its tensors."""
    from safetensors import safe_open

    with safe_open(folder / _only_file(folder), framework="numpy") as file:
        return dict(file.metadata() or {})


def _only_file(folder: Path) -> str:
    if (folder / SINGLE).exists():
        return SINGLE
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelNotFound(f"{folder} has {len(files)} safetensors files but no {INDEX}; download it again")
    if any(folder.glob("*.bin")):
        raise UnsupportedModel(f"{folder} has weights as pickle (.bin) only; supported are safetensors and GGUF")
    raise ModelNotFound(f"{folder} has no {SINGLE} or {INDEX}; download it again")


def _open_file(path: Path) -> dict[str, Tensor]:
    """Map one file. The library vouches for its header (sizes, overlaps, length); its numpy side knows no bfloat16 and
    copies, so the offsets are read from the header here and the bytes mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFound(f"{path} is missing; download the model again") from None
    except (SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DamagedWeights(f"{path} is damaged or incomplete ({reason}); download it again") from None
    header.pop("__metadata__", None)
    return {name: _tensor(mapped, start, name, info) for name, info in header.items() if 0 not in info["shape"]}


def _tensor(mapped: mmap.mmap, start: int, name: str, info: dict[str, Any]) -> Tensor:
    begin, end = info["data_offsets"]
    return mapped_tensor(mapped, start + begin, start + end, name, tuple(info["shape"]), info["dtype"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelNotFound(
            f"{path} is missing; a model is a directory with it and safetensors, or a .gguf file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedWeights(f"cannot read {path} ({error}); download it again") from None
    if not isinstance(content, dict):
        raise DamagedWeights(f"{path} is no JSON object; download it again")
    return content
