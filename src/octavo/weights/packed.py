"""The checkpoint that `octavo quantize` writes and every command reads.

It is a directory with a config.json, whose quantization_config has quant_method "octavo", and one model.safetensors.
Quantized matrices are stored as uint8 rows of blocks in a format of BLOCK_FORMATS, which the file's metadata gives by
tensor. Other tensors are ordinary floats.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, shortened
from octavo.formats.blocks import BLOCK_FORMATS
from octavo.formats.files import ModelPath
from octavo.machine import available_cores

from .safetensors import SINGLE, read_metadata
from .tensor import Tensor, require_finite

METHOD = "octavo"  # the quant_method in config.json

_BLOCK = 32
_MOST = 65504  # the largest magnitude that is quantized, since scales and minima are in half precision
_CHUNK = 1 << 20  # values that a thread quantizes at a time

# quantize(values, format, importance) -> blocks. values: float32 [n, k]. format: Q8_0 or Q4_1. importance: float32 [k],
# the weight of squared errors in each column, or None: all 1. blocks: uint8 [n, bytes per row].
Quantize = Callable[[np.ndarray, str, np.ndarray | None], np.ndarray]


def open_packed(folder: ModelPath, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set the formats of a directory's uint8 tensors from the file's metadata. Raises DamagedWeights."""
    formats = read_metadata(folder)
    result = {}
    for name, tensor in tensors.items():
        if tensor.format == "U8":
            format = BLOCK_FORMATS.get(formats.get(name, ""))
            if format is None or len(tensor.shape) != 2 or tensor.shape[1] % format.nbytes:
                raise DamagedWeights(
                    f"{folder}: tensor {shortened(repr(name))} has no format that fits it; quantize the model again"
                )
            shape = (tensor.shape[0], tensor.shape[1] // format.nbytes * format.values)
            tensor = replace(tensor, format=format.name, shape=shape)
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
    """Write config.json and model.safetensors into `folder`. Vectors are written as float32.

    Args:
        folder: An existing directory.
        config: The model's config.json.
        tensors: The weights by name.
        bits: For each matrix by name, 8 (Q8_0) or 4 (Q4_1). A matrix is copied unchanged if it is already quantized to
            at most this many bits, or if its number of columns is not a multiple of 32.
        quantize: The quantizer, such as octavo.backends.cpu.quantize.
        importances: For some tensors by name, the weights of squared errors in each column (see Quantize).
        progress: Called as progress(bytes written, total bytes).

    Raises:
        DamagedWeights: A tensor has a value that is NaN or infinite.
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
    """A tensor, and the format in which it is written."""

    tensor: Tensor
    format: str

    @property
    def quantized(self) -> bool:
        return self.format[0] in "QW"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape in the file, in which a quantized matrix consists of rows of bytes."""
        if not self.quantized:
            return self.tensor.shape
        format = BLOCK_FORMATS[self.format]
        return (self.tensor.shape[0], self.tensor.shape[1] // format.values * format.nbytes)

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
    """Return the header of a safetensors file. The library can only write tensors that are all in memory."""
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
    """Yield the bytes of `entry`, some rows at a time."""
    tensor = replace(entry.tensor, source=entry.tensor.data)  # computed only once
    if entry.format == "F32":
        yield require_finite(tensor.name, tensor.float32())
    elif entry.format == tensor.format:
        tensor.check_finite()
        yield np.ascontiguousarray(tensor.data if tensor.row_order is None else tensor.data[tensor.row_order])
    else:
        rows = max(1, _CHUNK // tensor.shape[1])

        def encode(start: int) -> np.ndarray:
            values = require_finite(tensor.name, tensor.float32(start, start + rows), _MOST)
            return quantize(values, entry.format, importance)

        yield from pool.map(encode, range(0, tensor.shape[0], rows))
    tensor.release()
