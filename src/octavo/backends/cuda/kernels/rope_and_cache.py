"""Rotary embedding of queries and keys, and the paged pool of keys and values that they are written to."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import to_bfloat16

HEADS_PER_PROGRAM = 4  # the same for any number of rows: a norm's sum over a head keeps its order
_LOG2E = 1.4426950408889634
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and subtracted, it rounds to the nearest integer


@dataclass(frozen=True)
class KvPool:
    """Keys and values of all pages. A page is one run of bytes, so copying it is one copy of a row of `memory`.

    A page holds values [layers, 2, kv_heads, page_size, head_dim], keys before values, in bf16 or int8; if int8,
    scales [layers, 2, kv_heads, page_size] follow in float32: max|x| / 127 of the head_dim numbers of a position.

    Attributes:
        memory: uint8 [pages, page_bytes].
    """

    memory: Tensor
    layers: int
    kv_heads: int
    page_size: int
    head_dim: int
    int8: bool

    @staticmethod
    def page_bytes(layers: int, kv_heads: int, page_size: int, head_dim: int, int8: bool) -> int:
        """Return the bytes of a page, all layers together."""
        positions = layers * 2 * kv_heads * page_size
        return positions * (head_dim + 4 if int8 else 2 * head_dim)

    @classmethod
    def allocate(
        cls, pages: int, layers: int, kv_heads: int, page_size: int, head_dim: int, int8: bool, device: Any
    ) -> "KvPool":
        """Allocate the pool. Its content is undefined: attention ignores what was not written.

        Raises:
            torch.OutOfMemoryError
        """
        size = cls.page_bytes(layers, kv_heads, page_size, head_dim, int8)
        memory = torch.empty((pages, size), dtype=torch.uint8, device=device)
        return cls(memory, layers, kv_heads, page_size, head_dim, int8)

    @property
    def values(self) -> Tensor:
        """The pool's memory as numbers: bf16 or int8 [pages, numbers of a page, scales included]."""
        return self.memory.view(torch.int8 if self.int8 else torch.bfloat16)

    @property
    def scales(self) -> Tensor:
        """The pool's memory as float32, in which a page's scales are the last ones."""
        return self.memory.view(torch.float32)

    @property
    def constants(self) -> dict[str, int | bool]:
        """What kernels need to know when they are compiled, as arguments."""
        return {
            "LAYERS": self.layers,
            "KV_HEADS": self.kv_heads,
            "PAGE_SIZE": self.page_size,
            "DIM": self.head_dim,
            "INT8": self.int8,
        }


@dataclass(frozen=True)
class StepRows:
    """Where the N rows of a step are, on the device (see StepBatch).

    Attributes:
        positions: int32 [N]; -1 marks a padded row, of which nothing is computed or written.
        sequences: int32 [N], the index of each row's sequence.
        page_tables: int32 [S, P].
    """

    positions: Tensor
    sequences: Tensor
    page_tables: Tensor


def rotary_table(frequencies: np.ndarray, positions: int) -> np.ndarray:
    """Return cosines and sines of position * frequency: float32 [positions, 2, head_dim / 2]."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    exact = angles.astype(np.float64)  # so that the bits do not depend on the host's vector library
    return np.stack([np.cos(exact), np.sin(exact)], axis=1).astype(np.float32)


@triton.jit
def head_values(pool, page, layer, kind, head, LAYERS, KV_HEADS, PAGE_SIZE, DIM, INT8):
    """Return the pointer to numbers [PAGE_SIZE, DIM] of a head: keys (kind 0) or values (kind 1)."""
    per_page: tl.constexpr = LAYERS * 2 * KV_HEADS * PAGE_SIZE * (DIM + 4 if INT8 else DIM)
    return pool + page.to(tl.int64) * per_page + ((layer * 2 + kind) * KV_HEADS + head) * (PAGE_SIZE * DIM)


@triton.jit
def head_scales(scales, page, layer, kind, head, LAYERS, KV_HEADS, PAGE_SIZE, DIM):
    """Return the pointer to the scales [PAGE_SIZE] of a head of an int8 pool."""
    positions: tl.constexpr = LAYERS * 2 * KV_HEADS * PAGE_SIZE
    per_page: tl.constexpr = positions * (DIM + 4) // 4
    before: tl.constexpr = positions * DIM // 4
    return scales + page.to(tl.int64) * per_page + before + ((layer * 2 + kind) * KV_HEADS + head) * PAGE_SIZE


@triton.jit
def _load_halves(heads, first, count, DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Return dimensions 0 ... DIM / 2 - 1 and DIM / 2 ... DIM - 1 of heads, float32 [HEADS, HALF] each, 0 beyond."""
    head, i = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    there = (head < count)[:, None] & (i < DIM // 2)[None, :]
    at = heads + head[:, None] * DIM + i[None, :]
    a = tl.load(at, mask=there, other=0.0).to(tl.float32)
    b = tl.load(at + DIM // 2, mask=there, other=0.0).to(tl.float32)
    return a, b, there


@triton.jit
def _norm(a, b, weight, eps, DIM: tl.constexpr, HALF: tl.constexpr):
    """Return x / sqrt(mean(x^2) + eps) * weight of each head, as halves."""
    i = tl.arange(0, HALF)
    mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
    wa = tl.load(weight + i, mask=i < DIM // 2, other=0.0).to(tl.float32)[None, :]
    wb = tl.load(weight + DIM // 2 + i, mask=i < DIM // 2, other=0.0).to(tl.float32)[None, :]
    return a * scale * wa, b * scale * wb


@triton.jit
def _rotate(a, b, rotary, position, DIM: tl.constexpr, HALF: tl.constexpr):
    """Return (a cos - b sin, b cos + a sin)."""
    i = tl.arange(0, HALF)
    at = rotary + position.to(tl.int64) * DIM + i
    cosine = tl.load(at, mask=i < DIM // 2, other=0.0)[None, :]
    sine = tl.load(at + DIM // 2, mask=i < DIM // 2, other=0.0)[None, :]
    return a * cosine - b * sine, b * cosine + a * sine


@triton.jit
def _write(a, b, there, values, at, scales, INT8: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr):
    """Write heads, given as halves, to `values` + at [HEADS]; if int8, also max|x| / 127 to `scales` [HEADS]."""
    to = values + at[:, None] + tl.arange(0, HALF)[None, :]
    if INT8:
        largest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
        back = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)[:, None]
        tl.store(to, (a * back + _ROUND - _ROUND).to(tl.int8), mask=there)
        tl.store(to + DIM // 2, (b * back + _ROUND - _ROUND).to(tl.int8), mask=there)
        first = tl.max(there.to(tl.int32), 1) > 0
        tl.store(scales, tl.div_rn(largest, 127.0), mask=first)
    else:
        tl.store(to, to_bfloat16(a), mask=there)
        tl.store(to + DIM // 2, to_bfloat16(b), mask=there)


@triton.jit(do_not_specialize=["layer", "eps", "table_stride"])
def rope_and_cache_kernel(
    qkv,
    q_norm,
    k_norm,
    eps,
    rotary,
    positions,
    sequences,
    page_tables,
    table_stride,
    pool,
    scales,
    queries,
    layer,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    INT8: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    Q_SCALE: tl.constexpr,
):
    """Compute, for each row of qkv [N, HEADS + 2 KV_HEADS, DIM], q, k, v = its heads, normed if NORM:

    queries[row] = bf16(rope(q) * Q_SCALE),  keys[row's page and slot] = rope(k),  values[row's page and slot] = v,
    rope(h)[i] = h[i] cos_i - h[i + DIM / 2] sin_i,  rope(h)[i + DIM / 2] = h[i + DIM / 2] cos_i + h[i] sin_i.

    A program computes TILE heads of one row. HALF is the power of two that holds DIM / 2.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    if position < 0:
        return
    i = tl.arange(0, HALF)
    heads = qkv + row * ((HEADS + 2 * KV_HEADS) * DIM)
    q_tiles: tl.constexpr = (HEADS + TILE - 1) // TILE
    kv_tiles: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    if tile < q_tiles:
        first = tile * TILE
        a, b, there = _load_halves(heads, first, HEADS, DIM, TILE, HALF)
        if NORM:
            a, b = _norm(a, b, q_norm, eps, DIM, HALF)
        a, b = _rotate(a, b, rotary, position, DIM, HALF)
        to = queries + row * (HEADS * DIM) + (first + tl.arange(0, TILE))[:, None] * DIM + i[None, :]
        tl.store(to, to_bfloat16(a * Q_SCALE), mask=there)
        tl.store(to + DIM // 2, to_bfloat16(b * Q_SCALE), mask=there)
    else:
        kind, first = (tile - q_tiles) // kv_tiles, (tile - q_tiles) % kv_tiles * TILE
        a, b, there = _load_halves(heads + (HEADS + kind * KV_HEADS) * DIM, first, KV_HEADS, DIM, TILE, HALF)
        if kind == 0:
            if NORM:
                a, b = _norm(a, b, k_norm, eps, DIM, HALF)
            a, b = _rotate(a, b, rotary, position, DIM, HALF)
        head, slot = first + tl.arange(0, TILE), position % PAGE_SIZE
        page = tl.load(page_tables + tl.load(sequences + row).to(tl.int64) * table_stride + position // PAGE_SIZE)
        values = head_values(pool, page, layer, kind, 0, LAYERS, KV_HEADS, PAGE_SIZE, DIM, INT8)
        at = head * (PAGE_SIZE * DIM) + slot * DIM
        to_scales = head_scales(scales, page, layer, kind, 0, LAYERS, KV_HEADS, PAGE_SIZE, DIM)
        _write(a, b, there, values, at, to_scales + head * PAGE_SIZE + slot, INT8, DIM, HALF)


def rope_and_cache(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rotary: Tensor,
    rows: StepRows,
    pool: KvPool,
    layer: int,
    queries: Tensor,
) -> None:
    """Norm and rotate q and k; write k and v to the pool, and q to `queries`, scaled for attention (see the kernel).

    Args:
        qkv: float32 or bf16 [N, (heads + 2 kv_heads) head_dim], contiguous.
        q_norm: weight of the norm of each head of q, [head_dim], or None; k_norm likewise.
        rotary: rotary_table of the frequencies and all positions, float32 [positions, 2, head_dim / 2].
        queries: output, bf16 [N, heads, head_dim].
    """
    heads, tile = queries.shape[1], HEADS_PER_PROGRAM
    grid = (len(queries), triton.cdiv(heads, tile) + 2 * triton.cdiv(pool.kv_heads, tile))
    rope_and_cache_kernel[grid](
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        eps,
        rotary,
        rows.positions,
        rows.sequences,
        rows.page_tables,
        rows.page_tables.stride(0),
        pool.values,
        pool.scales,
        queries,
        layer,
        **pool.constants,
        **rope_constants(heads, pool.head_dim, q_norm is not None),
        num_warps=1,
        enable_fp_fusion=False,
    )


def rope_constants(heads: int, head_dim: int, norm: bool) -> dict[str, int | float | bool]:
    """Return the kernel's constants besides those of the pool."""
    half = triton.next_power_of_2(head_dim // 2)
    scale = _LOG2E / head_dim**0.5  # so that attention's weights are 2^(q . k)
    return {"HEADS": heads, "NORM": norm, "HALF": half, "TILE": HEADS_PER_PROGRAM, "Q_SCALE": scale}
