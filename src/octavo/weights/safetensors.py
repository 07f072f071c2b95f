"""A Hugging Face directory: config.json, and one safetensors file or several with an index."""

import json
from pathlib import Path
from typing import Any

from octavo.errors import DamagedWeights, ModelNotFound, UnsupportedModel, shortened
from octavo.formats.files import MappedFile, ModelPath, map_file, read_file

from .tensor import Tensor, mapped_tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Limits on what is parsed. Real configurations have some kB; the index of a model of 671 billion parameters has 9 MB,
# and the header of a file with 100,000 tensors 12 MB.
_MAX_CONFIG, _MAX_INDEX, _MAX_HEADER = 4 << 20, 32 << 20, 32 << 20


def read_config(folder: ModelPath) -> dict[str, Any]:
    """Return config.json of `folder`. Raises ModelNotFound or DamagedWeights."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelNotFound(
            f"{path} is missing; a model is a .gguf file, or a directory with config.json and safetensors"
        )
    return read_json(path, _MAX_CONFIG)


def open_safetensors(folder: ModelPath) -> dict[str, Tensor]:
    """Map every tensor of the checkpoint in `folder`.

    Returns:
        The tensors by name. If several files have a tensor of the same name, the index decides.

    Raises:
        ModelNotFound: There is no safetensors file, or a file in the index is missing.
        UnsupportedModel: The weights exist only in another format.
        DamagedWeights: A file is truncated, or inconsistent in itself or with the index.
    """
    if not (folder / INDEX).exists():
        return _open_file(folder / _only_file(folder))
    file_of = read_json(folder / INDEX, _MAX_INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise DamagedWeights(f"{folder / INDEX} has no usable weight_map; download it again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        if Path(file).name != file:
            raise DamagedWeights(f"{folder / INDEX} names {shortened(repr(file))}, which is outside the directory")
        for name, tensor in _open_file(folder / file).items():
            if name not in file_of and name in tensors:
                raise DamagedWeights(f"{folder}: two files have a tensor {shortened(repr(name))}; download it again")
            if file_of.get(name, file) == file:
                tensors[name] = tensor
    if missing := sorted(file_of.keys() - tensors.keys()):
        raise DamagedWeights(
            f"{folder}: {file_of[missing[0]]} does not have the tensor {shortened(repr(missing[0]))} that {INDEX} "
            "lists; download it again"
        )
    return tensors


def read_metadata(folder: ModelPath) -> dict[str, str]:
    """Return the metadata of the only safetensors file in `folder`, which open_safetensors has opened before."""
    from safetensors import safe_open

    mapped = map_file(folder / _only_file(folder))
    with safe_open(mapped.path, framework="numpy") as file:
        return dict(file.metadata() or {})


def read_json(path: ModelPath, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes. Raises ModelNotFound or DamagedWeights."""
    try:
        content = json.loads(read_file(path, limit))
    except RecursionError:
        raise DamagedWeights(f"{path} is nested too deeply; download it again") from None
    except ValueError as error:
        if isinstance(error, DamagedWeights):
            raise
        raise DamagedWeights(f"{path} is not JSON ({shortened(error)}); download it again") from None
    if not isinstance(content, dict):
        raise DamagedWeights(f"{path} does not hold a JSON object; download it again")
    return content


def _only_file(folder: ModelPath) -> str:
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


def _open_file(path: ModelPath) -> dict[str, Tensor]:
    """Map one file. Tensors without elements are left out.

    The safetensors library checks the header (sizes, overlaps, the file's length). Its numpy interface copies tensors
    and has no bfloat16, so the bytes are mapped here.
    """
    from safetensors import SafetensorError, safe_open

    mapped = map_file(path)
    length = int.from_bytes(mapped.data[:8], "little")
    if length > _MAX_HEADER:
        raise DamagedWeights(f"{path} is damaged: its header claims {length} bytes; download it again")
    try:
        with safe_open(mapped.path, framework="numpy"):
            pass
        start = 8 + length
        header = json.loads(mapped.data[8:start], object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        return {name: _tensor(mapped, start, name, info) for name, info in header.items() if 0 not in info["shape"]}
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        reason = shortened(error)
        raise DamagedWeights(f"{path} is damaged or incomplete ({reason}); download it again") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("two tensors have the same name")
    return result


def _tensor(mapped: MappedFile, start: int, name: str, info: dict[str, Any]) -> Tensor:
    begin, end = info["data_offsets"]
    return mapped_tensor(mapped, start + begin, start + end, name, tuple(info["shape"]), info["dtype"])
