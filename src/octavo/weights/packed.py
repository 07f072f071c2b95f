"""The checkpoint that `octavo quantize` writes: blocks as the kernels' formats have them, so that it maps straight in.

A directory with config.json, whose quantization_config says "octavo", and one model.safetensors. Quantized matrices are
uint8 rows of blocks; the file's metadata names the format of each. Other tensors are ordinary floats.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights
from octavo.machine import available_cores

from .safetensors import SINGLE, read_metadata
from .tensor import BLOCKS, Tensor

METHOD = "octavo"  # the quant_method in config.json

_BLOCK = 32
_CHUNK = 1 << 20  # values quantized at a time by each thread

# (float32 [n, k], Q8_0 or Q4_1, float32 [k] or None: how much the errors of each column count) -> uint8 [n, bytes]
Quantize = Callable[[np.ndarray, str, np.ndarray | None], np.ndarray]


def open_packed(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of the file in `folder`, its rows of bytes as the blocks they are. Raises DamagedWeights."""
    formats = read_metadata(folder)
    result = {}
    for name, tensor in tensors.items():
        if tensor.format == "U8":
            values, size = BLOCKS.get(formats.get(name, ""), (0, 0))
            if size == 0 or len(tensor.shape) != 2 or tensor.shape[1] % size:
                raise DamagedWeights(f"{folder}: tensor {name!r} has no format that fits it; quantize the model again")
            shape = (tensor.shape[0], tensor.shape[1] // size * values)
            tensor = replace(tensor, format=formats[name], shape=shape)
        result[name] = tensor
    return result


def write_packed(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    bits: Mapping[str, int],
    quantize: Quantize,
    importances: Mapping[str, np.ndarray],
    progress: Callable[[int, int], None],
) -> None:
    """Write config.json and model.safetensors into `folder`, each matrix in 8 or 4 `bits`, by name.

    What is quantized already and has no more bits than asked for stays as it is. importances: of the columns of tensors
    by name; those of others count alike. progress(done bytes, total bytes).
    """
    settings = {"quant_method": METHOD, "bits": min(bits.values())}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=2) + "\n")
    entries = [_entry(tensor, bits[tensor.name]) for tensor in tensors.values()]
    entries.sort(key=lambda entry: entry.format != "F32")  # rows of blocks have odd sizes and would misalign floats
    total = sum(entry.nbytes for entry in entries)
    done = 0
    with (folder / SINGLE).open("wb") as file, ThreadPoolExecutor(available_cores()) as pool:
        file.write(_header(entries))
        for entry in entries:
            for rows in _encoded(entry, quantize, importances.get(entry.tensor.name), pool):
                file.write(rows.data)
                done += rows.nbytes
                progress(done, total)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class _Entry:
    """A tensor, and the format it gets in the file."""

    tensor: Tensor
    format: str

    @property
    def quantized(self) -> bool:
        return self.format[0] in "QW"

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file has it."""
        if not self.quantized:
            return self.tensor.shape
        values, size = BLOCKS[self.format]
        return (self.tensor.shape[0], self.tensor.shape[1] // values * size)

    @property
    def nbytes(self) -> int:
        return replace(self.tensor, format=self.format).nbytes


def _entry(tensor: Tensor, bits: int) -> _Entry:
    if len(tensor.shape) == 1:
        return _Entry(tensor, "F32")
    kept = tensor.format[0] in "QW" and int(tensor.format[1]) <= bits
    if kept or tensor.shape[1] % _BLOCK:
        return _Entry(tensor, tensor.format)
    return _Entry(tensor, "Q8_0" if bits == 8 else "Q4_1")


def _header(entries: list[_Entry]) -> bytes:
    """Of a safetensors file with `entries` one after another; its library can only write what is all in memory."""
    header: dict[str, Any] = {"__metadata__": {e.tensor.name: e.format for e in entries if e.quantized}}
    offset = 0
    for entry in entries:
        span = [offset, offset := offset + entry.nbytes]
        dtype = "U8" if entry.quantized else entry.format
        header[entry.tensor.name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _encoded(
    entry: _Entry, quantize: Quantize, importance: np.ndarray | None, pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """The bytes of `entry`, some rows at a time."""
    tensor = replace(entry.tensor, source=entry.tensor.data)  # once, if it has to be converted
    if entry.format == "F32":
        yield tensor.float32()
    elif entry.format == tensor.format:
        yield np.ascontiguousarray(tensor.data if tensor.row_order is None else tensor.data[tensor.row_order])
    else:
        rows = max(1, _CHUNK // tensor.shape[1])

        def encode(start: int) -> np.ndarray:
            return quantize(tensor.float32(start, start + rows), entry.format, importance)

        yield from pool.map(encode, range(0, tensor.shape[0], rows))
    tensor.release()
