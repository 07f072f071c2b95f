"""The attention of the cuda backend without a GPU: its kernels in Triton's interpreter, and how a step is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.backends.cuda.kernels.attention_plan import PART, Tiling, plan
from triton_interpreter import INTERPRETED, run_interpreted

if not INTERPRETED:

    def test_kernels_in_the_interpreter():
        run_interpreted(__file__)

    @settings(max_examples=60, deadline=None)
    @given(
        pieces=st.lists(st.tuples(st.integers(0, 4 * PART), st.integers(0, 70)), min_size=1, max_size=12),
        group=st.sampled_from([1, 3, 4, 16]),
        slots=st.integers(0, 100),
        enough=st.integers(0, 8),
    )
    def test_each_part_of_each_row_is_in_one_tile(pieces, group, slots, enough):
        query_start = np.cumsum([0, *(rows for _, rows in pieces)], dtype=np.int32)
        positions = np.concatenate([np.arange(first, first + rows) for first, rows in pieces]).astype(np.int32)
        cut = plan(query_start, positions, group, 16, 64, slots, enough)
        covered, taken, bases = set(), set(), {}
        for tiles, queries in ((cut.small, 16), (cut.large, 64)):
            for first, rows, sequence, part, slot, position in tiles.tolist():
                assert 0 < rows * group <= queries
                assert position == positions[first]
                assert query_start[sequence] <= first and first + rows <= query_start[sequence + 1]
                for row in range(first, first + rows):
                    in_parts = part >= 0
                    for p in [part] if in_parts else range(positions[row] // PART + 1):
                        assert (row, p) not in covered
                        covered.add((row, p))
                    if in_parts:
                        at = slot + row - first
                        assert 0 <= at < slots and at not in taken
                        taken.add(at)
                        assert bases.setdefault(first, slot - part * rows) == slot - part * rows
        assert {(r, p) for r, position in enumerate(positions) for p in range(position // PART + 1)} <= covered

else:
    torch = pytest.importorskip("torch")
    triton = pytest.importorskip("triton")

    import triton.language as tl
    from gpu_parts.attention_case import Case, halves
    from torch.nn import functional

    from octavo.backends.cuda.kernels.embed import embed
    from octavo.backends.cuda.kernels.numbers import to_bfloat16
    from octavo.backends.cuda.kernels.rope_and_cache import KvPool, StepRows, rope_and_cache, rotary_table

    SIZES = (Tiling(16, 4, 2), Tiling(64, 4, 2))
    OTHER_SIZES = (Tiling(64, 4, 2), Tiling(128, 4, 2))

    def bits(x: torch.Tensor) -> torch.Tensor:
        return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "page_size", "int8", "window"),
        [
            (4, 2, 64, 32, False, 0),
            (3, 1, 80, 16, True, 0),
            (1, 1, 96, 64, False, 100),
            (1, 1, 256, 96, False, 0),
            (6, 1, 128, 64, True, 100),
        ],
    )
    def test_attention_is_that_of_plain_pytorch(heads, kv_heads, head_dim, page_size, int8, window):
        case = Case.random([70, 530, 33, 1], heads, kv_heads, head_dim)
        pool, tables = case.pool(page_size, int8)
        pieces = [(0, 37, 33), (1, 529, 1), (2, 30, 3), (3, 0, 1)]
        for piece, out in zip(pieces, case.run(pieces, pool, tables, SIZES, window=window), strict=True):
            expected = case.reference(piece, pool, tables, window)
            assert (out.double() - expected).norm() < 6e-3 * expected.norm(), piece

    @pytest.mark.parametrize(("int8", "window"), [(False, 0), (True, 100)])
    def test_a_rows_bits_depend_on_its_sequence_only(int8, window):
        case = Case.random([560, 70, 540], 2, 1, 64)
        pool, tables = case.pool(32, int8)
        first = 504
        whole = case.run([(0, first, 56)], pool, tables, SIZES, window=window, slots=0)[0]

        def same(got: torch.Tensor, at: int) -> bool:
            return torch.equal(bits(got), bits(whole[at - first : at - first + len(got)]))

        for position in (504, 511, 512, 559):  # alone, in parts and not; the third one begins a part
            for slots in (0, 100):
                assert same(case.run([(0, position, 1)], pool, tables, SIZES, window=window, slots=slots)[0], position)
        mixed = [(1, 69, 1), (0, 509, 17), (2, 500, 40)]
        for sizes in (SIZES, OTHER_SIZES):
            assert same(case.run(mixed, pool, tables, sizes, window=window, programs=3)[1], 509)
        for page_size, seed in ((32, 1), (128, 0)):
            moved = case.pool(page_size, int8, seed=seed)
            assert same(case.run([(0, 510, 8)], *moved, SIZES, window=window)[0], 510)

    @triton.jit
    def rounded_kernel(x, out, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(out + at, to_bfloat16(tl.load(x + at)))

    def test_bfloat16_is_rounded_as_by_pytorch():
        x = torch.randn(64, generator=torch.Generator().manual_seed(0))
        x[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
        out = torch.empty(64, dtype=torch.bfloat16)
        rounded_kernel[(1,)](x, out, 64)
        torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)

    def test_many_parts_are_merged_in_the_same_order_by_one_program_and_by_several():
        case = Case.random([3 * PART + 10], 1, 1, 64)
        pool, tables = case.pool(64, False)
        row = [(0, 3 * PART + 9, 1)]
        whole, parts = (case.run(row, pool, tables, SIZES, slots=slots)[0] for slots in (0, 4))
        assert torch.equal(bits(whole), bits(parts))

    @pytest.mark.parametrize(("head_dim", "int8", "norm"), [(64, False, True), (80, True, False), (80, False, True)])
    def test_rope_and_cache(head_dim, int8, norm):
        heads, kv_heads, page_size, layer, eps = 6, 2, 16, 1, 1e-5
        generator = torch.Generator().manual_seed(0)
        positions = torch.tensor([15, 16, 3, -1, 40], dtype=torch.int32)
        tables = torch.tensor([[5, 1, 9], [2, 9, 3]], dtype=torch.int32)
        sequences = torch.tensor([0, 0, 1, 0, 1], dtype=torch.int32)
        qkv = torch.randn(5, (heads + 2 * kv_heads) * head_dim, generator=generator)
        weights = [1 + 0.1 * torch.randn(head_dim, generator=generator) if norm else None for _ in range(2)]
        frequencies = (10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
        table = torch.from_numpy(rotary_table(frequencies, 64))
        pool = KvPool.allocate(10, 2, kv_heads, page_size, head_dim, int8, "cpu")
        pool.memory.fill_(0x55)
        before = pool.memory.clone()
        queries = torch.full((5, heads, head_dim), 7.0, dtype=torch.bfloat16)
        rope_and_cache(qkv, *weights, eps, table, StepRows(positions, sequences, tables), pool, layer, queries)

        x = qkv.view(5, -1, head_dim)
        q, k, v = x.split([heads, kv_heads, kv_heads], dim=1)
        if norm:
            q, k = (functional.rms_norm(h, (head_dim,), w, eps) for h, w in zip((q, k), weights, strict=True))
        angles = positions[:, None, None] * torch.from_numpy(frequencies)

        def rotate(h: torch.Tensor) -> torch.Tensor:
            a, b = h.chunk(2, dim=-1)
            return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

        q, k = rotate(q) * (head_dim**-0.5 / np.log(2)), rotate(k)
        real = [0, 1, 2, 4]
        torch.testing.assert_close(queries[real].float(), q[real].bfloat16().float(), rtol=1e-2, atol=1e-6)
        assert (queries[3] == 7).all()
        for row in real:
            page, slot = int(tables[sequences[row], positions[row] // page_size]), int(positions[row]) % page_size
            stored, scales = halves(pool, page, layer)
            for kind, expected in enumerate((k[row], v[row])):
                got = stored[kind, :, slot].float()
                if scales is None:
                    torch.testing.assert_close(got, expected.bfloat16().float(), rtol=1e-2, atol=1e-6)
                else:
                    torch.testing.assert_close(scales[kind, :, slot], expected.abs().amax(-1) / 127, rtol=1e-5, atol=0)
                    error = (got * scales[kind, :, slot, None] - expected).abs()
                    assert (error <= 0.501 * scales[kind, :, slot, None]).all()
                    assert (got.abs().amax(-1) == 127).all()
        written = (pool.memory != before).any(dim=1).nonzero().flatten().tolist()
        assert written == [1, 2, 3, 5]  # the padded row's page is as it was

    def test_rope_of_a_row_alone_has_the_same_bits_and_bfloat16_input_is_accepted():
        generator = torch.Generator().manual_seed(0)
        table = torch.from_numpy(rotary_table((10000.0 ** -(np.arange(0, 64, 2) / 64)).astype(np.float32), 64))
        qkv = torch.randn(3, 8 * 64, generator=generator).bfloat16()
        norm = torch.rand(64, generator=generator).bfloat16()
        outs, pools = [], []
        for rows in ([0, 1, 2], [1]):
            pool = KvPool.allocate(2, 1, 2, 32, 64, False, "cpu")
            pool.memory.zero_()
            positions = torch.tensor([4, 9, 31], dtype=torch.int32)[rows]
            where = StepRows(positions, torch.zeros(3, dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32))
            queries = torch.zeros(len(rows), 4, 64, dtype=torch.bfloat16)
            rope_and_cache(qkv[rows].contiguous(), norm, norm, 1e-6, table, where, pool, 0, queries)
            outs.append(queries)
            pools.append(halves(pool, 1, 0)[0][:, :, 9])
        assert torch.equal(bits(outs[0][1]), bits(outs[1][0]))
        assert torch.equal(bits(pools[0]), bits(pools[1])) and pools[0].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
    def test_embed(dtype):
        weight = (20 * torch.randn(11, 1056, generator=torch.Generator().manual_seed(0))).to(dtype)
        scales = torch.rand(11) if dtype == torch.int8 else None
        kept = torch.tensor([-1, 10], dtype=torch.int32)  # an earlier step has failed to sample the first
        out = torch.empty(4, 1056)
        embed(torch.tensor([3, -2, 3, -1], dtype=torch.int32), kept, weight, out, scales)
        tokens = torch.tensor([3, 10, 3, 0])
        expected = weight[tokens].float()
        assert torch.equal(out, expected if scales is None else expected * scales[tokens, None])
