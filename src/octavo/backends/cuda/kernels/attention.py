"""Attention over the paged pool, in an order of sums that depends on nothing but a row's own sequence.

A row at position p attends to positions i, max(0, p - window + 1) <= i <= p, of its sequence:

    out = sum over i of 2^(q . K[i]) V[i]  /  sum over i of 2^(q . K[i])        q is scaled by log2(e) / sqrt(head_dim)

Positions are cut at fixed places: in blocks (see block_size), and in parts of PART. The sums of a part start from zero
and take its blocks in order, with a running maximum (online softmax: Milakov and Gimelshein, 2018). Then the parts are
merged in order, by the same function, `_merge`, whether one program computes all parts of a tile and merges each when
it is complete, or programs compute a part each and the last one merges them all: a row has the same bits either way.
A block that a row does not see multiplies its sums by 1 and adds 0. Weights are summed by a product with ones, because
the order of tl.sum depends on the tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_plan import PART, TILE_FIELDS, Tiling, block_size
from .numbers import dot, steps, to_bfloat16, widened
from .rope_and_cache import KvPool, StepRows, head_scales, head_values

_PART = tl.constexpr(PART)
_FIELDS = tl.constexpr(TILE_FIELDS)
_LOWEST = tl.constexpr(-1e30)  # the maximum of no scores: finite, so that differences are numbers
_ONES = tl.constexpr(16)  # columns of the product that sums weights: the fewest that tl.dot takes
_NO_WINDOW = 1 << 30


@triton.jit
def _attend_part(
    q,
    position,
    first,
    last,
    window,
    begin,
    end,
    table,
    pool,
    scales,
    layer,
    kv_head,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the sums of q [ROWS, DIMS] over positions begin ... end - 1, where begin is a multiple of BLOCK.

    Returns: the sums of 2^(score - maximum) V [ROWS, DIMS] and of 2^(score - maximum) [ROWS], and the maximum [ROWS].
    """
    ROWS: tl.constexpr = q.shape[0]
    DIMS: tl.constexpr = q.shape[1]
    values = tl.zeros([ROWS, DIMS], tl.float32)
    weights = tl.zeros([ROWS, _ONES], tl.float32)
    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    column = tl.arange(0, DIMS)[None, :]
    ones = to_bfloat16(tl.full([BLOCK, _ONES], 1.0, tl.float32))
    for start in steps(begin, end, BLOCK):
        seen = start + tl.arange(0, BLOCK)
        there = seen <= last
        if PAGE_SIZE % BLOCK == 0:
            page = tl.load(table + start // PAGE_SIZE)
            slot = start % PAGE_SIZE + tl.arange(0, BLOCK)
        else:
            position_in_table = seen.to(tl.uint32)  # unsigned, so that dividing by a power of two is a shift
            page = tl.load(table + position_in_table // PAGE_SIZE, mask=there, other=0)
            slot = (position_in_table % PAGE_SIZE).to(tl.int32)
        keys = head_values(pool, page, layer, 0, kv_head, LAYERS, KV_HEADS, PAGE_SIZE, DIM, INT8) + slot * DIM
        at = keys[:, None] + column
        mask = there[:, None] if DIM == DIMS else there[:, None] & (column < DIM)
        k = tl.load(at, mask=mask, other=0.0)
        scores = dot(q, tl.trans(widened(k)), tl.zeros([ROWS, BLOCK], tl.float32))
        if INT8:
            k_scales = head_scales(scales, page, layer, 0, kv_head, LAYERS, KV_HEADS, PAGE_SIZE, DIM)
            scores *= tl.load(k_scales + slot, mask=there, other=0.0)[None, :]
        if (start + BLOCK - 1 > first) | (start <= last - window):
            distance = position[:, None] - seen[None, :]
            scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
        peak = tl.maximum(maximum, tl.max(scores, 1))
        shares = tl.exp2(scores - peak[:, None])
        back = tl.exp2(maximum - peak)[:, None]
        weights = dot(to_bfloat16(shares), ones, weights * back)
        v = tl.load(at + KV_HEADS * PAGE_SIZE * DIM, mask=mask, other=0.0)
        if INT8:
            v_scales = head_scales(scales, page, layer, 1, kv_head, LAYERS, KV_HEADS, PAGE_SIZE, DIM)
            shares *= tl.load(v_scales + slot, mask=there, other=0.0)[None, :]
        values = dot(to_bfloat16(shares), widened(v), values * back)
        maximum = peak
    return values, tl.max(weights, 1), maximum


@triton.jit
def _merge(values, weights, maximum, more_values, more_weights, more_maximum):
    """Return the sums over two runs of positions, from those of each, relative to its own maximum."""
    peak = tl.maximum(maximum, more_maximum)
    back, more_back = tl.exp2(maximum - peak), tl.exp2(more_maximum - peak)
    values = values * back[:, None] + more_values * more_back[:, None]
    return values, weights * back + more_weights * more_back, peak


@triton.jit
def _merge_parts(
    part_values,
    part_weights,
    slot,
    tokens,
    first_part,
    end_part,
    head,
    there,
    row_there,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Return the sums of a tile's rows over parts that programs have stored, merged in order.

    The first part of a row [ROWS] is at `slot`, each other one `tokens` after the one before.
    """
    ROWS: tl.constexpr = slot.shape[0]
    column = tl.arange(0, DIMS)[None, :]
    values = tl.zeros([ROWS, DIMS], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    for part in steps(first_part, end_part, 1, loop_unroll_factor=2 if ROWS <= 16 else 1):
        at = (slot + part * tokens).to(tl.int64) * HEADS + head
        # Past the L1 cache, which may hold what another layer left at these addresses.
        more_values = tl.load(part_values + at[:, None] * DIM + column, mask=there, other=0.0, cache_modifier=".cg")
        more_weights = tl.load(part_weights + at * 2, mask=row_there, other=0.0, cache_modifier=".cg")
        more_maximum = tl.load(part_weights + at * 2 + 1, mask=row_there, other=0.0, cache_modifier=".cg")
        values, weights, maximum = _merge(values, weights, maximum, more_values, more_weights, more_maximum)
    return values, weights


@triton.jit
def _store_out(out, values, weights, there):
    """Store values [ROWS, DIMS] / weights [ROWS]."""
    values *= tl.div_rn(1.0, weights)[:, None]
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out, to_bfloat16(values), mask=there)
    else:
        tl.store(out, values, mask=there)


@triton.jit(do_not_specialize=["table_stride", "layer", "window"])
def attention_kernel(
    queries,
    pool,
    scales,
    page_tables,
    table_stride,
    tiles,
    tile_count,
    part_values,
    part_weights,
    arrivals,
    out,
    layer,
    window,
    HEADS: tl.constexpr,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    INT8: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute tiles of attention of queries [N, HEADS, DIM]. Programs take tiles in turn, for each kv head.

    A tile (see attention_plan.TILE_FIELDS) of all parts of its rows' context writes out [N, HEADS, DIM]. One that is a
    part writes its sums, relative to a maximum, to part_values [slots, HEADS, DIM], and the sum of weights and the
    maximum to part_weights [slots, HEADS, 2]; the last one to arrive merges them. DIMS is the power of two that holds
    DIM.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    token = tl.arange(0, ROWS) // group
    column = tl.arange(0, DIMS)[None, :]
    for index in steps(tl.program_id(0), tl.load(tile_count) * KV_HEADS, tl.num_programs(0)):
        tile, kv_head = tiles + index // KV_HEADS * _FIELDS, index % KV_HEADS
        row, tokens, sequence = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        part, slot, first = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
        last = first + tokens - 1
        head = kv_head * group + tl.arange(0, ROWS) % group
        there = (token < tokens)[:, None] & (column < DIM)
        heads = ((row.to(tl.int64) + token) * HEADS + head)[:, None] * DIM + column
        q = tl.load(queries + heads, mask=there, other=0.0)
        begin = tl.maximum(first - window + 1, 0) // BLOCK * BLOCK
        first_part, end_part = begin // _PART, last // _PART + 1
        if part >= 0:
            first_part, end_part = tl.maximum(part, first_part), tl.minimum(part + 1, end_part)
        values = tl.zeros([ROWS, DIMS], tl.float32)
        weights = tl.zeros([ROWS], tl.float32)
        maximum = tl.full([ROWS], _LOWEST, tl.float32)
        for p in steps(first_part, end_part):
            more_values, more_weights, more_maximum = _attend_part(
                q,
                first + token,
                first,
                last,
                window,
                tl.maximum(begin, p * _PART),
                tl.minimum(last + 1, p * _PART + _PART),
                page_tables + sequence.to(tl.int64) * table_stride,
                pool,
                scales,
                layer,
                kv_head,
                LAYERS,
                KV_HEADS,
                PAGE_SIZE,
                DIM,
                INT8,
                BLOCK,
            )
            values, weights, maximum = _merge(values, weights, maximum, more_values, more_weights, more_maximum)
        if part < 0:
            _store_out(out + heads, values, weights, there)
        else:
            of_part = (slot + token).to(tl.int64) * HEADS + head
            tl.store(part_values + of_part[:, None] * DIM + column, values, mask=there)
            tl.store(part_weights + of_part * 2, weights, mask=token < tokens)
            tl.store(part_weights + of_part * 2 + 1, maximum, mask=token < tokens)
            slot -= part * tokens
            arrival = arrivals + slot * KV_HEADS + kv_head
            tl.debug_barrier()  # the stores of all threads come before the arrival
            if tl.atomic_add(arrival, 1, sem="acq_rel") == last // _PART:
                tl.store(arrival, 0)  # for the next layer
                all_values, all_weights = _merge_parts(
                    part_values,
                    part_weights,
                    slot + token,
                    tokens,
                    begin // _PART,
                    last // _PART + 1,
                    head,
                    there,
                    token < tokens,
                    HEADS,
                    DIM,
                    DIMS,
                )
                _store_out(out + heads, all_values, all_weights, there)


@dataclass(frozen=True)
class Tiles:
    """Tiles of one size, on the device.

    Attributes:
        tiles: int32 [capacity, TILE_FIELDS], of which the first count[0] are computed.
        count: int32 [1].
        programs: number of programs that share the work: for a CUDA graph, any fixed number.
        tiling: the size of the tiles, and how to compile for it.
    """

    tiles: Tensor
    count: Tensor
    programs: int
    tiling: Tiling


@dataclass(frozen=True)
class Parts:
    """Where sums of parts wait to be merged, on the device.

    Attributes:
        values: float32 [slots, heads, head_dim].
        weights: float32 [slots, heads, 2], sums of weights, and maxima.
        arrivals: int32 [slots, kv_heads], how many parts of a tile are there, by the slot of its first part and row. It
            is 0 between two layers: the program that stores the last part merges them all.
    """

    values: Tensor
    weights: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, slots: int, heads: int, kv_heads: int, head_dim: int, device: Any) -> "Parts":
        """Allocate memory for sums of `slots` rows over a part. Raises torch.OutOfMemoryError."""
        values = torch.empty((slots, heads, head_dim), dtype=torch.float32, device=device)
        weights = torch.empty((slots, heads, 2), dtype=torch.float32, device=device)
        return cls(values, weights, torch.zeros((slots, kv_heads), dtype=torch.int32, device=device))


def attention(
    queries: Tensor, pool: KvPool, rows: StepRows, work: list[Tiles], parts: Parts, layer: int, window: int, out: Tensor
) -> None:
    """Write the attention of all rows. A row that is in no tile is left as it is.

    Args:
        queries: bf16 [N, heads, head_dim], as rope_and_cache leaves them.
        work: tiles of a Plan, by size.
        parts: for at least the slots that the Plan may use.
        window: the number of latest positions to attend to, 0 for all.
        out: bf16 [N, heads * head_dim]; or float32, for tests that compare more bits.
    """
    window, heads = window or _NO_WINDOW, queries.shape[1]
    for tiles in work:
        attention_kernel[(tiles.programs,)](
            queries,
            pool.values,
            pool.scales,
            rows.page_tables,
            rows.page_tables.stride(0),
            tiles.tiles,
            tiles.count,
            parts.values,
            parts.weights,
            parts.arrivals,
            out,
            layer,
            window,
            **pool.constants,
            **attention_constants(heads, pool.head_dim, tiles.tiling),
            num_warps=tiles.tiling.warps,
            num_stages=tiles.tiling.stages,
            enable_fp_fusion=False,
        )


def attention_constants(heads: int, head_dim: int, tiling: Tiling) -> dict[str, int]:
    """Return the constants of attention_kernel besides those of the pool."""
    dims = triton.next_power_of_2(head_dim)
    return {"HEADS": heads, "DIMS": dims, "BLOCK": block_size(head_dim), "ROWS": tiling.rows}
