"""Weights as they are stored in their files: mapped, and not read until a backend packs them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from octavo.errors import DamagedWeights, shortened
from octavo.formats.blocks import BLOCK_FORMATS
from octavo.formats.files import MappedFile, PlainFile

# The blocks that AWQ and GPTQ layers are converted to: 32 values along k, value = scale * q + min.
W4G32 = np.dtype([("scale", "<f4"), ("min", "<f4"), ("q", "u1", 16)])  # byte i: value i (low half), i + 16 (high half)
W8G32 = np.dtype([("scale", "<f4"), ("min", "<f4"), ("q", "i1", 32)])

_CHECKED = 1 << 22  # values dequantized at a time to check them


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        name: Its Hugging Face name.
        shape: (rows, columns), or (n,) for a vector, which is stored as one row.
        format: A name in BLOCK_FORMATS, or the file's name of a format that no backend can read.
        source: The tensor's `data`, or a function that computes it.
        first_column: Values that each row of `data` has before those of the tensor, in the same block.
        row_order: Row i (element i of a vector) is stored as row row_order[i]; None: as row i. GGUF files store the
            q and k projections of Llama with the elements of each rotary pair side by side.
        release: Releases the mapped memory; the tensor is read from the file again if needed.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    source: np.ndarray | Callable[[], np.ndarray]
    row_order: np.ndarray | None = None
    release: Callable[[], None] = lambda: None
    first_column: int = 0

    @property
    def data(self) -> np.ndarray:
        """Return the stored bytes, uint8 [rows, bytes per row]: a view of the mapped file, or computed at each call."""
        return self.source() if callable(self.source) else self.source

    @property
    def nbytes(self) -> int:
        """Return the size of `data` in bytes without computing it. The format must be one of BLOCK_FORMATS."""
        format = BLOCK_FORMATS[self.format]
        return math.prod(self.shape) * format.nbytes // format.values

    def float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Dequantize rows (of a vector: elements) start:stop.

        Returns:
            float32 [stop - start, columns], or [stop - start] of a vector.
        """
        rows = slice(start, stop) if self.row_order is None else self.row_order[start:stop]
        if len(self.shape) == 1:
            return _dequantize(self.data, self.format)[0, rows]
        values = _dequantize(self.data[rows], self.format)
        return values[:, self.first_column : self.first_column + self.shape[1]]

    def take_rows(self, start: int, stop: int) -> "Tensor":
        """Return rows (of a vector: elements) start:stop as a tensor. Nothing is read."""
        shape = (stop - start, *self.shape[1:])
        if len(self.shape) == 1:
            order = np.arange(self.shape[0]) if self.row_order is None else self.row_order
            return replace(self, shape=shape, row_order=order[start:stop])
        if self.row_order is None:
            return replace(self, shape=shape, source=self._part(np.s_[start:stop]))
        order = self.row_order[start:stop]
        first, end = int(order.min()), int(order.max()) + 1
        return replace(self, shape=shape, source=self._part(np.s_[first:end]), row_order=order - first)

    def take_columns(self, start: int, stop: int) -> "Tensor":
        """Return columns start:stop as a tensor, in whole blocks of its format. Nothing is read."""
        format = BLOCK_FORMATS[self.format]
        first, last = (self.first_column + column for column in (start, stop))
        blocks = np.s_[:, first // format.values * format.nbytes : -(-last // format.values) * format.nbytes]
        return replace(
            self,
            shape=(self.shape[0], stop - start),
            source=self._part(blocks),
            first_column=first % format.values,
        )

    def _part(self, index: Any) -> np.ndarray | Callable[[], np.ndarray]:
        """Return the part `index` of `data`, or a function that computes it."""
        source = self.source
        return (lambda: source()[index]) if callable(source) else source[index]

    def check_finite(self) -> None:
        """Read all values. Raises DamagedWeights if one is NaN or infinite."""
        tensor = replace(self, source=self.data, row_order=None)  # computed once; in the order of the file
        rows = max(1, _CHECKED // max(1, self.shape[-1])) if len(self.shape) > 1 else self.shape[0]
        for start in range(0, self.shape[0], rows):
            require_finite(self.name, tensor.float32(start, start + rows))


def require_finite(name: str, values: np.ndarray, limit: float = float(np.finfo(np.float32).max)) -> np.ndarray:
    """Check `values` of the tensor `name`, and return them.

    Raises DamagedWeights if one is NaN, infinite or larger in magnitude than `limit`.
    """
    if not np.abs(values).max(initial=0.0) <= limit:
        raise not_finite(name)
    return values


def not_finite(name: str) -> DamagedWeights:
    """Return the error for a tensor that holds NaN or infinity."""
    return DamagedWeights(
        f"tensor {shortened(repr(name))} has a value that is NaN, infinite or too large to compute with; "
        "download the model again"
    )


def bfloat16_tensor(name: str, values: np.ndarray) -> Tensor:
    """Return finite float32 values as a tensor of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return Tensor(name, values.shape, "BF16", halves.reshape(-1, values.shape[-1]).view(np.uint8))


@dataclass(frozen=True)
class Parameter:
    """A weight under its canonical name (see model/decoder.py): one tensor, or several stacked by rows."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (rows of all parts, columns), or (n,) for a vector."""
        rows = sum(part.shape[0] for part in self.parts)
        return (rows, *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Return the sum of Tensor.nbytes over all parts."""
        return sum(part.nbytes for part in self.parts)

    def take_rows(self, *ranges: range) -> "Parameter":
        """Return ranges of the stacked rows, one after the other. Nothing is read."""
        taken = []
        for rows in ranges:
            first = 0  # row of the part
            for part in self.parts:
                start, stop = max(rows.start - first, 0), min(rows.stop - first, part.shape[0])
                if start < stop:
                    taken.append(part.take_rows(start, stop))
                first += part.shape[0]
        return Parameter(tuple(taken))

    def take_columns(self, columns: range) -> "Parameter":
        """Return some columns. Nothing is read."""
        return Parameter(tuple(part.take_columns(columns.start, columns.stop) for part in self.parts))


def mapped_tensor(mapped: MappedFile, start: int, stop: int, name: str, shape: tuple[int, ...], format: str) -> Tensor:
    """Return the tensor that is stored in bytes start:stop of a mapped file.

    Raises ValueError if the bytes cannot be divided into as many rows as `shape` has.
    """
    rows = shape[0] if len(shape) > 1 else 1
    data = np.frombuffer(mapped.data, np.uint8, stop - start, start).reshape(rows, -1)
    data.flags.writeable = False

    def wait() -> np.ndarray:
        mapped.wait(start, stop)
        return data

    source = data if isinstance(mapped, PlainFile) else wait
    return Tensor(name, shape, format, source, release=partial(mapped.release, start, stop))


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

    with np.errstate(all="ignore"):  # damaged scales may be NaN or infinite: require_finite reports them
        values: np.ndarray = dequantize(rows, GGMLQuantizationType[format])
    return values


def _scaled(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        values: np.ndarray = blocks["scale"][..., None] * q + blocks["min"][..., None]
    return values.reshape(len(blocks), -1)
