"""Random sequences for the attention kernels: the same queries, keys and values, in any batch, tiling and pages."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.backends.cuda.kernels.attention import Parts, Tiles, attention
from octavo.backends.cuda.kernels.attention_plan import Plan, Tiling, plan
from octavo.backends.cuda.kernels.rope_and_cache import KvPool, StepRows

Piece = tuple[int, int, int]  # rows of a step: sequence, first position, number of rows


@dataclass(frozen=True)
class Case:
    """Queries, keys and values of sequences of the given lengths.

    Attributes:
        queries: bf16 [length, heads, head_dim] of each sequence, scaled as rope_and_cache does.
        keys: float32 [length, kv_heads, head_dim] of each sequence, which the pool rounds; values likewise.
    """

    lengths: list[int]
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def random(cls, lengths: list[int], heads: int, kv_heads: int, head_dim: int, device: str = "cpu") -> "Case":
        """Return random sequences; a sequence depends on its index and on the sizes only."""

        def normal(stream: int, count: int) -> list[Tensor]:
            generators = [torch.Generator().manual_seed(1000 * stream + s) for s in range(len(lengths))]
            shapes = [(length, count, head_dim) for length in lengths]
            return [torch.randn(s, generator=g).to(device) for s, g in zip(shapes, generators, strict=True)]

        scale = 1.4427 * head_dim**-0.5
        queries = [(2 * q * scale).bfloat16() for q in normal(0, heads)]
        return cls(lengths, queries, normal(1, kv_heads), normal(2, kv_heads))

    def pool(self, page_size: int, int8: bool, layers: int = 2, seed: int = 0) -> tuple[KvPool, Tensor]:
        """Return a pool that holds all sequences in its last layer, on random pages, and the page tables.

        What the sequences do not fill is NaN.
        """
        _, kv_heads, head_dim = self.keys[0].shape
        device = self.keys[0].device
        counts = [-(-length // page_size) for length in self.lengths]
        pool = KvPool.allocate(sum(counts) + 1, layers, kv_heads, page_size, head_dim, int8, device)
        pool.memory.fill_(0xFF)
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
        tables = torch.full((len(counts), max(counts)), 2**30, dtype=torch.int32)
        for s, pages in enumerate(order.split(counts)):
            tables[s, : len(pages)] = pages
            for i, page in enumerate(pages.tolist()):
                span = slice(i * page_size, (i + 1) * page_size)
                write_page(pool, page, layers - 1, self.keys[s][span], self.values[s][span])
        return pool, tables.to(device)

    def run(
        self,
        pieces: list[Piece],
        pool: KvPool,
        tables: Tensor,
        sizes: tuple[Tiling, Tiling],
        *,
        slots: int = 1 << 12,
        enough: int = 1 << 30,
        window: int = 0,
        programs: int | None = None,
    ) -> list[Tensor]:
        """Return the attention of the rows of a step, before it is rounded: [rows, heads * head_dim] of each piece."""
        device, (_, heads, head_dim) = pool.memory.device, self.queries[0].shape
        lengths = [rows for _, _, rows in pieces]
        query_start = np.cumsum([0, *lengths], dtype=np.int32)
        positions = np.concatenate([np.arange(first, first + rows) for _, first, rows in pieces]).astype(np.int32)
        small, large = sizes
        cut = plan(query_start, positions, heads // pool.kv_heads, small.rows, large.rows, slots, enough)
        queries = torch.cat([self.queries[s][first : first + rows] for s, first, rows in pieces])
        of_pieces = tables[[s for s, _, _ in pieces]].contiguous()
        rows = StepRows(torch.from_numpy(positions).to(device), torch.empty(0, device=device), of_pieces)
        out = torch.full((len(queries), heads * head_dim), torch.nan, device=device)
        work, parts = on_device(cut, sizes, pool, heads, slots, programs)
        attention(queries, pool, rows, work, parts, pool.layers - 1, window, out)
        assert not parts.arrivals.any(), "the next layer begins to count at 0"
        return list(out.split(lengths))

    def reference(self, piece: Piece, pool: KvPool, tables: Tensor, window: int = 0) -> Tensor:
        """Return the attention of a piece in float64 of the numbers that the pool holds."""
        s, first, rows = piece
        pages = tables[s, : -(-(first + rows) // pool.page_size)].tolist()
        content = [read_page(pool, page, pool.layers - 1) for page in pages]
        keys, values = (torch.cat([page[i] for page in content], dim=1)[:, : first + rows] for i in (0, 1))
        group = self.queries[s].shape[1] // pool.kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = torch.einsum("qhd,hkd->hqk", self.queries[s][first : first + rows].double(), keys)
        distance = torch.arange(first, first + rows)[:, None] - torch.arange(first + rows)
        seen = (distance >= 0) & (distance < (window or 2**30))
        scores = scores.masked_fill(~seen.to(scores.device), -torch.inf) * np.log(2)
        return torch.einsum("hqk,hkd->qhd", scores.softmax(-1), values).flatten(1)


def on_device(
    cut: Plan, sizes: tuple[Tiling, Tiling], pool: KvPool, heads: int, slots: int, programs: int | None = None
) -> tuple[list[Tiles], Parts]:
    """Return a plan on the pool's device. By default there is a program for each tile and kv head."""
    device = pool.memory.device
    work = [
        Tiles(
            torch.from_numpy(tiles).to(device),
            torch.tensor([len(tiles)], dtype=torch.int32, device=device),
            programs or len(tiles) * pool.kv_heads,
            size,
        )
        for tiles, size in zip((cut.small, cut.large), sizes, strict=True)
        if len(tiles)
    ]
    return work, Parts.allocate(slots, heads, pool.kv_heads, pool.head_dim, device)


def halves(pool: KvPool, page: int, layer: int) -> tuple[Tensor, Tensor | None]:
    """Return views of a layer of a page: values [2, kv_heads, page_size, head_dim] and, if int8, scales likewise."""
    shape = (pool.layers, 2, pool.kv_heads, pool.page_size)
    count = int(np.prod(shape)) * pool.head_dim
    values = pool.values[page][:count].view(*shape, pool.head_dim)[layer]
    if not pool.int8:
        return values, None
    return values, pool.scales[page][count // 4 :].view(shape)[layer]


def write_page(pool: KvPool, page: int, layer: int, keys: Tensor, values: Tensor) -> None:
    """Write float32 [positions, kv_heads, head_dim] of keys and values to a page, as the pool rounds them."""
    stored, scales = halves(pool, page, layer)
    for kind, x in enumerate((keys, values)):
        numbers = x.transpose(0, 1)
        if scales is not None:
            largest = numbers.abs().amax(-1)
            scales[kind, :, : len(x)] = largest / 127
            numbers = (numbers * (127 / largest)[..., None]).round()
        stored[kind, :, : len(x)] = numbers.to(stored.dtype)


def read_page(pool: KvPool, page: int, layer: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of a page: float64 [kv_heads, page_size, head_dim]."""
    stored, scales = halves(pool, page, layer)
    numbers = stored.double() if scales is None else stored.double() * scales.double()[..., None]
    return numbers[0], numbers[1]
