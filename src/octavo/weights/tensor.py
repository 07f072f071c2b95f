"""A weight as it lies in its file: mapped, not read, until a backend packs it."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

# What backends can read. A checkpoint may hold tensors of other formats as long as no model needs them.
FORMATS = (
    *("F32", "F16", "BF16"),
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint. `data` are its bytes in the mapped file: uint8 [rows, bytes per row].

    A vector is one row. `format` is one of FORMATS, or another name that a file gives. `row_order`, where it is set,
    says which stored row (of a vector, element) is row i (GGUF stores Llama's q and k with rotary pairs interleaved).
    """

    name: str
    shape: tuple[int, ...]  # (n,) or (rows, columns)
    format: str
    data: np.ndarray
    row_order: np.ndarray | None = None
    release: Callable[[], None] = lambda: None  # gives the mapped pages back to the system once packed

    def float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop (of a vector, elements), dequantised: float32 [stop - start, columns] or [stop - start]."""
        rows = slice(start, stop) if self.row_order is None else self.row_order[start:stop]
        if len(self.shape) == 1:
            return _dequantise(self.data, self.format)[0, rows]
        return _dequantise(self.data[rows], self.format)


@dataclass(frozen=True)
class Parameter:
    """A weight under its canonical name (see model/decoder.py): one tensor, or several stacked by rows."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(part.shape[0] for part in self.parts)
        return (rows, *self.parts[0].shape[1:])


def mapped_tensor(mapped: mmap.mmap, start: int, stop: int, name: str, shape: tuple[int, ...], format: str) -> Tensor:
    """The tensor whose bytes are start:stop of a mapped file."""
    data = np.frombuffer(mapped, np.uint8, stop - start, start)
    rows = shape[0] if len(shape) > 1 else 1
    return Tensor(name, shape, format, data.reshape(rows, -1), release=partial(_release, mapped, start, stop))


def _release(mapped: mmap.mmap, start: int, stop: int) -> None:
    start -= start % mmap.PAGESIZE  # a neighbour's bytes on the first and last page are just read again when needed
    mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _dequantise(rows: np.ndarray, format: str) -> np.ndarray:
    if format == "F32":
        return np.ascontiguousarray(rows).view(np.float32)
    if format == "F16":
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float32)
    if format == "BF16":
        return (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values: np.ndarray = dequantize(rows, GGMLQuantizationType[format])
    return values
