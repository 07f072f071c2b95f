"""A weight as it lies in its file: mapped, not read, until a backend packs it."""

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from octavo.formats.gguf import GGUF_FORMATS

# Blocks of 32 values along k as AWQ and GPTQ checkpoints become them: value = scale * q + min.
W4G32 = np.dtype([("scale", "<f4"), ("min", "<f4"), ("q", "u1", 16)])  # value i in the low half of byte i, i + 16 above
W8G32 = np.dtype([("scale", "<f4"), ("min", "<f4"), ("q", "i1", 32)])

# What backends can read: format -> values and bytes of a block. A checkpoint may hold tensors of other formats as long
# as no model needs them.
BLOCKS = {name: (values, size) for name, values, size in GGUF_FORMATS.values()}
BLOCKS |= {"W4G32": (32, W4G32.itemsize), "W8G32": (32, W8G32.itemsize)}
FORMATS = tuple(BLOCKS)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint. A vector is one row.

    `format` is one of FORMATS, or another name that a file gives. `source` is `data`, or makes it. `row_order`, where
    it is set, says which stored row (of a vector, element) is row i (GGUF stores Llama's q and k with rotary pairs
    interleaved).
    """

    name: str
    shape: tuple[int, ...]  # (n,) or (rows, columns)
    format: str
    source: np.ndarray | Callable[[], np.ndarray]
    row_order: np.ndarray | None = None
    release: Callable[[], None] = lambda: None  # gives the mapped pages back to the system once packed

    @property
    def data(self) -> np.ndarray:
        """Its bytes, uint8 [rows, bytes per row]: those of the mapped file, or converted from them at each call."""
        return self.source() if callable(self.source) else self.source

    @property
    def nbytes(self) -> int:
        """Bytes of `data`, without converting. The format must be one of FORMATS."""
        values, size = BLOCKS[self.format]
        return math.prod(self.shape) // values * size

    def float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop (of a vector, elements), dequantized: float32 [stop - start, columns] or [stop - start]."""
        rows = slice(start, stop) if self.row_order is None else self.row_order[start:stop]
        if len(self.shape) == 1:
            return _dequantize(self.data, self.format)[0, rows]
        return _dequantize(self.data[rows], self.format)


def bfloat16_tensor(name: str, values: np.ndarray) -> Tensor:
    """Finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return Tensor(name, values.shape, "BF16", halves.reshape(-1, values.shape[-1]).view(np.uint8))


@dataclass(frozen=True)
class Parameter:
    """A weight under its canonical name (see model/decoder.py): one tensor, or several stacked by rows."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(part.shape[0] for part in self.parts)
        return (rows, *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """As Tensor.nbytes, of all parts."""
        return sum(part.nbytes for part in self.parts)


def mapped_tensor(mapped: mmap.mmap, start: int, stop: int, name: str, shape: tuple[int, ...], format: str) -> Tensor:
    """The tensor whose bytes are start:stop of a mapped file."""
    data = np.frombuffer(mapped, np.uint8, stop - start, start)
    rows = shape[0] if len(shape) > 1 else 1
    return Tensor(name, shape, format, data.reshape(rows, -1), release=partial(_release, mapped, start, stop))


def _release(mapped: mmap.mmap, start: int, stop: int) -> None:
    start -= start % mmap.PAGESIZE  # a neighbor's bytes on the first and last page are just read again when needed
    mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _dequantize(rows: np.ndarray, format: str) -> np.ndarray:
    if format == "F32":
        return np.ascontiguousarray(rows).view(np.float32)
    if format == "F16":
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float32)
    if format == "BF16":
        return (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if format == "W4G32":
        blocks = np.ascontiguousarray(rows).view(W4G32)
        return _scaled(blocks, np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=-1))
    if format == "W8G32":
        blocks = np.ascontiguousarray(rows).view(W8G32)
        return _scaled(blocks, blocks["q"])
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values: np.ndarray = dequantize(rows, GGMLQuantizationType[format])
    return values


def _scaled(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    values: np.ndarray = blocks["scale"][..., None] * q + blocks["min"][..., None]
    return values.reshape(len(blocks), -1)
