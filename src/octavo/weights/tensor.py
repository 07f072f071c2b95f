"""A weight as it lies in its file: mapped, not read, until a backend packs it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint. `data` are its bytes in the mapped file: uint8 [rows, bytes per row].

    `format` is "F32", "F16", "BF16" or a GGML quantisation ("Q8_0", "Q4_K", ...). `row_order`, where it is set, says
    which stored row is row i (GGUF stores Llama's q and k with rotary pairs interleaved).
    """

    name: str
    shape: tuple[int, ...]  # (n,) or (rows, columns)
    format: str
    data: np.ndarray
    row_order: np.ndarray | None = None
    release: Callable[[], None] = lambda: None  # gives the mapped pages back to the system once packed

    def float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop (of a vector, elements), dequantised: float32 [stop - start, columns] or [stop - start]."""
        raise NotImplementedError  # helper M


@dataclass(frozen=True)
class Parameter:
    """A weight under its canonical name (see model/decoder.py): one tensor, or several stacked by rows."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(part.shape[0] for part in self.parts)
        return (rows, *self.parts[0].shape[1:])
