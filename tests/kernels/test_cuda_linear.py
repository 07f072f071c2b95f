"""The linear layers and norms of the cuda backend, in Triton's interpreter, against float64 products."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from triton_interpreter import INTERPRETED, run_interpreted

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")

    from torch import Tensor
    from torch.nn import functional

    from octavo.backends.cuda.kernels import configurations
    from octavo.backends.cuda.kernels.configurations import Tile, choose
    from octavo.backends.cuda.kernels.gated import gated
    from octavo.backends.cuda.kernels.integer_linear import integer_gated, integer_linear
    from octavo.backends.cuda.kernels.integer_linear import partial_sums as integer_partial_sums
    from octavo.backends.cuda.kernels.linear import linear, merge, partial_sums
    from octavo.backends.cuda.kernels.norm import add_norm, add_norm_int8, norm, norm_int8
    from octavo.backends.cuda.kernels.rotation import Int8Rows, quantize_rows

    SMALL = Tile(16, 64, 4, 3)
    TILES = {
        "swapped": SMALL,
        "plain": replace(SMALL, swapped=False),
        "taller": replace(SMALL, rows=32, outputs=128),
        "in one loop": replace(SMALL, one_loop=True),
        "in one loop, plain": replace(SMALL, one_loop=True, swapped=False),
        "in memory": replace(SMALL, rows=32, waits_in_memory=True, programs=2),
        "in memory, plain": replace(SMALL, rows=32, waits_in_memory=True, programs=3, swapped=False),
        "two groups": replace(SMALL, groups=2),
        "a group each": replace(SMALL, groups=0),
    }

    @pytest.fixture(autouse=True)
    def seeded() -> None:
        torch.manual_seed(0)

    def tile_for(name: str, spans: int) -> Tile:
        tile = TILES[name]
        if (tile.waits_in_memory and spans == 1) or (tile.groups == 2 and spans == 1):
            return SMALL
        return replace(tile, groups=spans) if tile.groups == 0 else tile

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(torch.bfloat16)

    def tree(parts: list[Tensor]) -> Tensor:
        """Add in pairs, then pairs of pairs."""
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    # rows, outputs, inputs, spans: ragged blocks of rows, outputs and k, and every number of spans
    SHAPES = [(21, 80, 192, 1), (3, 64, 80, 1), (18, 72, 128, 2), (5, 64, 192, 4), (17, 64, 384, 8), (35, 80, 512, 8)]

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_linear(shape: tuple[int, int, int, int]) -> None:
        """All tiles: close to the exact sum, equal to each other, and spans are added in the tree's order."""
        rows, outputs, inputs, spans = shape
        x, weight, bias, residual = (
            random(rows, inputs),
            random(outputs, inputs),
            random(outputs),
            torch.randn(rows, outputs),
        )
        length = inputs // spans
        parts = []
        for s in range(spans):
            part = torch.empty(rows, outputs)
            columns = slice(s * length, (s + 1) * length)
            linear(x[:, columns].contiguous(), weight[:, columns].contiguous(), part, tile=SMALL)
            parts.append(part)
        wanted = tree(parts) + bias.float() + residual
        exact = x.double() @ weight.double().T + bias.double() + residual.double()
        torch.testing.assert_close(wanted.double(), exact, rtol=1e-5, atol=1e-4)
        for name in TILES:
            out = residual.clone()
            linear(x, weight, out, bias=bias, residual=out, spans=spans, tile=tile_for(name, spans))
            assert torch.equal(out, wanted), name

    @pytest.mark.parametrize("name", ["swapped", "plain", "in one loop", "in memory", "two groups"])
    def test_a_row_alone_has_the_same_bits(name: str) -> None:
        x, weight, tile = random(20, 512), random(64, 512), TILES[name]
        together = torch.empty(20, 64)
        linear(x, weight, together, spans=8, tile=tile)
        for row in (0, 7, 19):
            alone = torch.empty(1, 64)
            linear(x[row : row + 1].clone(), weight, alone, spans=8, tile=tile)
            assert torch.equal(alone[0], together[row])

    def test_bfloat16_output_is_rounded_to_nearest() -> None:
        x, weight = random(5, 64), random(64, 64)
        wide, narrow = torch.empty(5, 64), torch.empty(5, 64, dtype=torch.bfloat16)
        linear(x, weight, wide)
        linear(x, weight, narrow)
        assert torch.equal(narrow, wide.to(torch.bfloat16))

    def test_only_the_first_rows_are_computed() -> None:
        x, weight, out = random(20, 64), random(64, 64), torch.full((20, 64), 7.0)
        linear(x, weight, out, rows=3, tile=SMALL)
        linear(x, weight, out, rows=0)
        assert (out[3:] == 7).all()
        torch.testing.assert_close(out[:3], x[:3].float() @ weight.float().T, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("swapped, bias", list(product((True, False), (True, False))))
    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    def test_gated(activation: str, swapped: bool, bias: bool) -> None:
        x, weight = random(19, 96), random(2 * 40, 96) * 0.2
        vector = random(80) if bias else None
        out = torch.empty(19, 40, dtype=torch.bfloat16)
        gated(x, weight, out, activation, bias=vector, tile=replace(SMALL, swapped=swapped))
        sums = x.double() @ weight.double().T + (0 if vector is None else vector.double())
        gate, up = sums.chunk(2, dim=1)
        active = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
        torch.testing.assert_close(out.double(), active * up, rtol=2**-8, atol=1e-5)

    def test_gated_row_alone_has_the_same_bits() -> None:
        x, weight = random(18, 64), random(64, 64)
        together = torch.empty(18, 32, dtype=torch.bfloat16)
        gated(x, weight, together, "silu", tile=SMALL)
        for tile in (SMALL, replace(SMALL, swapped=False), replace(SMALL, rows=32, outputs=128)):
            alone = torch.empty(1, 32, dtype=torch.bfloat16)
            gated(x[17:].clone(), weight, alone, "silu", tile=tile)
            assert torch.equal(alone[0], together[17])

    @pytest.mark.parametrize("width", [64, 96, 576])
    def test_norm(width: int) -> None:
        x, weight = 3 * torch.randn(7, width), random(width)
        out = torch.empty(7, width, dtype=torch.bfloat16)
        norm(x, weight, 1e-5, out)
        exact = functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=0)
        some = torch.empty(2, width, dtype=torch.bfloat16)
        norm(x, weight, 1e-5, some, row_of=torch.tensor([5, 2], dtype=torch.int32))
        assert torch.equal(some, out[[5, 2]])

    @pytest.mark.parametrize("groups", [2, 4, 8])
    def test_add_norm_is_merge_and_norm(groups: int) -> None:
        x, weight, bias, scale = random(5, 256), random(96, 256), random(96), random(96)
        residual = torch.randn(5, 96)
        partials = partial_sums(x, weight, 8, tile=replace(SMALL, groups=groups))
        assert partials is not None and len(partials) == groups
        merged, added = residual.clone(), residual.clone()
        merge(partials, merged, bias, merged)
        wanted, out = (torch.empty(5, 96, dtype=torch.bfloat16) for _ in range(2))
        norm(merged, scale, 1e-6, wanted)
        add_norm(partials, added, scale, 1e-6, out, bias=bias)
        assert torch.equal(added, merged) and torch.equal(out, wanted)
        assert partial_sums(x, weight, 8, tile=SMALL) is None

    def rotated(row: np.ndarray) -> np.ndarray:
        """Return H row as csrc/kernels/rotation.h computes it, all roundings included."""
        y = row.astype(np.float32)
        for step in (1, 2, 4, 8, 16, 32):
            y = butterflies(y, step, 1.0)
        y *= np.float32(0.125)
        most = 1 << (len(y).bit_length() - 1)
        for part in [slice(0, most)] + [slice(len(y) - most, None)] * (most < len(y)):
            step = 64
            while step < most:
                y[part] = butterflies(y[part], step, 0.70710678118654752)
                step *= 2
        return y

    def butterflies(y: np.ndarray, step: int, factor: float) -> np.ndarray:
        a, b = np.moveaxis(y.reshape(-1, 2, step), 1, 0)
        return (np.stack([a + b, a - b], axis=1) * np.float32(factor)).ravel()

    @pytest.mark.parametrize("width, spans", [(64, 1), (192, 1), (448, 1), (1024, 1), (384, 2), (512, 8)])
    @pytest.mark.parametrize("of_weight", [False, True])
    def test_integers_are_those_of_the_cpu(width: int, spans: int, of_weight: bool) -> None:
        x = torch.cat([random(3, width), torch.zeros(1, width, dtype=torch.bfloat16)])
        x[1] *= 1000
        made = quantize_rows(x, spans, of_weight=of_weight)
        assert made.values.shape == x.shape and made.scales.shape == (4, spans) and made.spans == spans
        of_spans = (x.float().numpy(), made.values.numpy(), made.scales.numpy())
        for span, q, scale in zip(*(each.reshape(4 * spans, -1) for each in of_spans), strict=True):
            y = rotated(span)
            largest = np.abs(y).max()
            assert scale == largest / np.float32(127)
            if of_weight:
                back = np.float32(1) / scale if scale else np.float32(0)
                wanted = np.floor(np.clip((y + np.float32(128) * scale) * back + np.float32(0.5), 0, 255)) - 128
            else:
                wanted = np.rint(y * (np.float32(127) / largest if largest else np.float32(0)))
            assert np.array_equal(q, wanted)

    def integers(rows: int, inputs: int, spans: int) -> Int8Rows:
        values = torch.randint(-128, 128, (rows, inputs)).to(torch.int8)
        return Int8Rows(values, torch.rand(rows, spans) * 0.02)

    def columns(rows: Int8Rows, part: int, parts: int) -> Int8Rows:
        """Return one of `parts` runs of a row's spans."""
        return Int8Rows(*(each.chunk(parts, dim=1)[part].contiguous() for each in (rows.values, rows.scales)))

    @pytest.mark.parametrize("rows, outputs, inputs", [(21, 80, 512), (1, 64, 192)])
    def test_integer_linear(rows: int, outputs: int, inputs: int) -> None:
        """Every tile and division of k: the exact sum of products, scaled as on the CPU."""
        x, weight = integers(rows, inputs, 1), integers(outputs, inputs, 1)
        bias, residual = torch.randn(outputs), torch.randn(rows, outputs)
        sums = x.values.long() @ weight.values.long().T
        wanted = sums.float() * (weight.scales[:, 0] * x.scales) + bias + residual
        for tile in (SMALL, replace(SMALL, swapped=False), replace(SMALL, rows=32, outputs=128, groups=4)):
            out = residual.clone()
            integer_linear(x, weight, out, bias=bias, residual=out, tile=tile)
            assert torch.equal(out, wanted)

    # blocks of 128 k, and spans that end within a block
    @pytest.mark.parametrize("rows, outputs, inputs, spans", [(35, 80, 2048, 8), (3, 64, 512, 8), (17, 72, 384, 2)])
    def test_integer_linear_of_spans(rows: int, outputs: int, inputs: int, spans: int) -> None:
        """Every tile: each span's exact sum, scaled as on the CPU, and the spans added in the tree's order."""
        x, weight = integers(rows, inputs, spans), integers(outputs, inputs, spans)
        bias, residual = torch.randn(outputs), torch.randn(rows, outputs)
        parts = []
        for s in range(spans):
            p, q = (columns(each, s, spans) for each in (x, weight))
            exact = p.values.numpy().astype(np.int64) @ q.values.numpy().astype(np.int64).T
            parts.append(torch.from_numpy(exact.astype(np.float32) * (q.scales.numpy()[:, 0] * p.scales.numpy())))
        wanted = tree(parts) + bias + residual
        for name in TILES:
            out, tile = residual.clone(), tile_for(name, spans)
            integer_linear(x, weight, out, bias=bias, residual=out, tile=tile)
            assert torch.equal(out, wanted), name
            partials = integer_partial_sums(x, weight, tile)
            assert tile.groups == (1 if partials is None else len(partials))

    def test_ranks_with_some_of_the_columns_add_to_the_same_bits() -> None:
        """Each quantizes its columns by itself, as if there were no others, and sums its spans."""
        x, weight = random(2, 512), random(8, 512)

        def result_of(x: Tensor, weight: Tensor, spans: int, tile: Tile | None = None) -> Tensor:
            out = torch.empty(2, 8)
            rows, weight_rows = (quantize_rows(each.contiguous(), spans, each is weight) for each in (x, weight))
            integer_linear(rows, weight_rows, out, tile=tile)
            return out

        wanted = result_of(x, weight, 8, SMALL)
        for ranks in (2, 4, 8):
            parts = zip(x.chunk(ranks, dim=1), weight.chunk(ranks, dim=1), strict=True)
            assert torch.equal(tree([result_of(*part, 8 // ranks) for part in parts]), wanted), ranks

    def test_integer_gated_is_that_of_its_sums() -> None:
        x, weight, bias = (
            quantize_rows(random(19, 128)),
            quantize_rows(random(80, 128) * 0.1, of_weight=True),
            random(80),
        )
        sums = torch.empty(19, 80)
        integer_linear(x, weight, sums, bias=bias, tile=SMALL)
        gate, up = sums.chunk(2, dim=1)
        outs = [torch.empty(19, 40, dtype=torch.bfloat16) for _ in range(2)]
        for out, swapped in zip(outs, (True, False), strict=True):
            integer_gated(x, weight, out, "silu", bias=bias, tile=replace(SMALL, swapped=swapped))
        torch.testing.assert_close(outs[0].float(), functional.silu(gate) * up, rtol=2**-8, atol=1e-5)
        assert torch.equal(outs[0], outs[1])

    @pytest.mark.parametrize("width", [192, 512])
    def test_norm_int8_is_norm_in_float32_and_quantize(width: int) -> None:
        x, weight = 3 * torch.randn(4, width), random(width)
        normed = functional.rms_norm(x.double(), (width,), weight.double(), 1e-5).float()
        wanted, made = quantize_rows(normed), norm_int8(x, weight, 1e-5)
        torch.testing.assert_close(made.scales, wanted.scales, rtol=1e-6, atol=0)
        assert (made.values.int() - wanted.values.int()).abs().max() <= 1
        assert (made.values != wanted.values).float().mean() < 0.01
        some = norm_int8(x, weight, 1e-5, row_of=torch.tensor([2], dtype=torch.int32))
        assert torch.equal(some.values[0], made.values[2]) and some.scales[0] == made.scales[2]

    @pytest.mark.parametrize("groups", [2, 8])
    def test_add_norm_int8_is_merge_and_norm_int8(groups: int) -> None:
        x, weight = integers(5, 512, 8), integers(192, 512, 8)
        residual, scale, bias = torch.randn(5, 192), random(192), random(192)
        partials = integer_partial_sums(x, weight, tile=replace(SMALL, groups=groups))
        merged, added = residual.clone(), residual.clone()
        merge(partials, merged, bias, merged)
        wanted, made = norm_int8(merged, scale, 1e-6), add_norm_int8(partials, added, scale, 1e-6, bias=bias)
        assert torch.equal(added, merged)
        assert torch.equal(made.values, wanted.values) and torch.equal(made.scales, wanted.scales)

    @pytest.mark.parametrize("spans", [1, 2])
    def test_int8_rows_need_whole_blocks(spans: int) -> None:
        with pytest.raises(ValueError, match="multiple of 64, not 96"):
            quantize_rows(random(1, 96 * spans), spans)

    LAYERS = [("linear", 6144, 4096, 1), ("gated", 28672, 4096, 1), ("linear", 4096, 14336, 8), ("linear", 576, 576, 1)]
    LAYERS += [("int8", 4096, 14336, 8), ("int8", 6144, 4096, 1)]

    @pytest.mark.parametrize("family", ["swapped", "plain", "hmma"])
    @pytest.mark.parametrize("kind, outputs, inputs, spans", LAYERS)
    def test_every_number_of_rows_has_a_tile(kind: str, outputs: int, inputs: int, spans: int, family: str) -> None:
        for rows in (1, 2, 16, 17, 64, 100, 256, 5000):
            tile = choose(kind, outputs, inputs, spans, rows, family)
            assert (inputs if kind == "int8" and spans == 1 else spans) % tile.groups == 0
            assert tile.sums_per_thread(spans) <= 128
            assert family == "swapped" or tile.rows >= 64 or family == "hmma"

    def test_tuned_tiles_are_read_back(tmp_path, monkeypatch) -> None:
        table = {("linear", 64, 128, 8, 32): replace(SMALL, groups=4, stages=7)}
        (tmp_path / "tuned.json").write_text(configurations.write_tuned(table))
        monkeypatch.setattr(configurations, "files", lambda _: tmp_path)
        configurations._tuned.cache_clear()
        configurations._chosen.cache_clear()
        try:
            assert choose("linear", 64, 128, 8, 20) == replace(SMALL, groups=4, stages=7)
            assert choose("linear", 64, 128, 8, 64) != choose("linear", 64, 128, 8, 20)
        finally:
            configurations._tuned.cache_clear()
            configurations._chosen.cache_clear()
