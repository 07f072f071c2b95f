"""Matrices of 4-bit integers on the cuda backend, in Triton's interpreter: the bits of their bfloat16 values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triton_interpreter import INTERPRETED, run_interpreted

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    gguf = pytest.importorskip("gguf")

    from octavo.backends.cuda.backend import load as load_cuda
    from octavo.backends.cuda.kernels import four_bit_linear, gated, linear
    from octavo.backends.cuda.kernels.configurations import Tile
    from octavo.backends.cuda.kernels.four_bits import FourBits, pack
    from octavo.backends.cuda.stored_integers import read_four_bits
    from octavo.backends.cuda.weight_bytes import bytes_of_weights, four_bit_bytes, has_four_bits
    from octavo.backends.cuda.weights import load_weights, nbytes
    from octavo.errors import DamagedWeights, UnsupportedModel
    from octavo.model import describe_model
    from octavo.weights import open_checkpoint
    from octavo.weights.tensor import W4G32, Parameter
    from octavo.weights.tensor import Tensor as StoredTensor
    from packed_layers import Format, save_quantized
    from random_model import PLAIN, TOKENS, load, random_parameters
    from step_batches import run_chunks
    from tiny_gguf import write_gguf

    CPU = torch.device("cpu")
    SMALL = Tile(16, 64, 4, 3)

    @pytest.fixture(autouse=True)
    def seeded() -> None:
        torch.manual_seed(0)

    def random_bits(rows: int, columns: int, group: int = 32, half: bool = True, mixed: bool = False) -> FourBits:
        """A matrix, whose groups have scales and minima of half or single precision."""
        q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        scales, minima = torch.rand(2, rows, columns // group) * torch.tensor([0.1, -1.0])[:, None, None]
        if half:
            scales, minima = scales.half().float(), minima.half().float()
        each = group // 32
        return pack(q, scales.repeat_interleave(each, 1), minima.repeat_interleave(each, 1), mixed)

    def meaning(bits: FourBits) -> torch.Tensor:
        """The values of a matrix whose bytes are in order."""
        q = torch.stack([bits.values & 15, bits.values >> 4], dim=-1).flatten(1)
        kind = torch.float16 if bits.pairs.dtype == torch.int32 else torch.float32
        pairs = bits.pairs.T.contiguous().view(kind).float().view(len(q), -1, 2).repeat_interleave(bits.group, dim=1)
        return (pairs[..., 0] * q + pairs[..., 1]).bfloat16()

    def stored(values: np.ndarray, format: str) -> StoredTensor:
        """Values in a format of GGUF files, or in that of AWQ and GPTQ layers."""
        if format == "W4G32":
            groups = values.reshape(len(values), -1, 32)
            low, high = groups.min(axis=-1), groups.max(axis=-1)
            blocks = np.empty(low.shape, W4G32)
            blocks["scale"] = ((high - low) / 15).astype(np.float16)
            blocks["min"] = low
            scaled = (groups - low[..., None]) / blocks["scale"][..., None]
            q = np.clip(np.rint(scaled), 0, 15).astype(np.uint8)
            blocks["q"] = q[..., :16] | q[..., 16:] << 4
            data = blocks.view(np.uint8)
        elif format == "Q4_K":  # which the gguf package can read, but not make
            data = np.random.default_rng(0).integers(0, 256, (len(values), values.shape[1] // 256 * 144), np.uint8)
            data.reshape(-1, 144)[:, :4] = np.array([0.01, 0.2], np.float16).view(np.uint8)
        else:
            data = gguf.quantize(values, gguf.GGMLQuantizationType[format])
        return StoredTensor("w", values.shape, format, np.ascontiguousarray(data))

    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q4_K", "W4G32"])
    def test_what_a_file_stores_is_what_is_multiplied(format: str, mixed: bool) -> None:
        """Two parts, one of them in another order of rows, against the library's values rounded to bfloat16."""
        values = np.random.default_rng(1).standard_normal((40, 512), np.float32)
        first = replace(stored(values[:24], format), row_order=np.random.default_rng(2).permutation(24))
        parameter = Parameter((first, stored(values[24:], format)))
        assert has_four_bits(parameter)
        bits = read_four_bits(parameter, CPU, mixed)
        wanted = torch.from_numpy(np.concatenate([part.float32() for part in parameter.parts])).bfloat16()
        torch.testing.assert_close(four_bit_linear.unpack(bits), wanted, rtol=0, atol=0)
        assert mixed or torch.equal(meaning(bits), wanted)
        assert bits.nbytes <= four_bit_bytes(parameter)
        assert bits.pairs.dtype == (torch.int32 if format in ("Q4_0", "Q4_1") else torch.int64)

    def test_larger_groups_share_their_scales() -> None:
        for group, half in ((32, False), (64, True), (128, False)):
            bits = random_bits(8, 256, group, half)
            assert bits.group == group and bits.nbytes == 8 * 256 // 2 + 8 * 256 // group * (4 if half else 8)

    def test_damaged_scales_are_found() -> None:
        tensor = stored(np.ones((4, 64), np.float32), "Q4_1")
        for place, value in ((0, np.nan), (2, np.inf)):
            data = tensor.data.copy()
            data[1, place : place + 2] = np.array([value], np.float16).view(np.uint8)
            with pytest.raises(DamagedWeights, match="'w'"):
                read_four_bits(Parameter((replace(tensor, source=data),)), CPU, False)

    TILES = {"swapped": SMALL, "plain": replace(SMALL, swapped=False), "taller": replace(SMALL, rows=32, outputs=128)}

    @pytest.mark.parametrize("spans, group, half", [(1, 32, True), (2, 64, False), (4, 128, True), (8, 32, True)])
    def test_linear_has_the_bits_of_bfloat16_weights(spans: int, group: int, half: bool) -> None:
        rows, outputs, inputs = 18, 72, max(128, 64 * spans)
        x, bias, residual = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs), torch.randn(rows, outputs)
        bits = random_bits(outputs, inputs, group, half, mixed=spans > 2)
        weight = four_bit_linear.unpack(bits)
        wanted = residual.clone()
        linear.linear(x, weight, wanted, bias=bias, residual=wanted, spans=spans, tile=SMALL)
        exact = x.double() @ weight.double().T + bias.double() + residual.double()
        torch.testing.assert_close(wanted.double(), exact, rtol=1e-5, atol=1e-4)
        for name, tile in TILES.items():
            for groups in {1, spans}:
                out = residual.clone()
                four_bit_linear.linear(x, bits, out, bias, out, spans, replace(tile, groups=groups))
                assert torch.equal(out, wanted), (name, groups)
        alone = residual[5:6].clone()
        four_bit_linear.linear(x[5:6].contiguous(), bits, alone, bias, alone, spans)
        assert torch.equal(alone, wanted[5:6])

    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    def test_gated_has_the_bits_of_bfloat16_weights(activation: Any) -> None:
        x, bias, bits = torch.randn(19, 192).bfloat16(), torch.randn(80), random_bits(80, 192, 64)
        wanted, out = torch.empty(2, 19, 40, dtype=torch.bfloat16)
        gated.gated(x, four_bit_linear.unpack(bits), wanted, activation, bias)
        for tile in TILES.values():
            four_bit_linear.gated(x, bits, out.fill_(7), activation, bias, tile)
            assert torch.equal(out, wanted)

    def test_many_rows_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
        x, bits = torch.randn(20, 128).bfloat16(), random_bits(32, 128)
        few, many, gated_few, gated_many = (torch.empty(20, 32) for _ in range(4))
        halves = gated_few[:, :16].bfloat16(), gated_many[:, :16].bfloat16()
        four_bit_linear.linear(x, bits, few, spans=2)
        four_bit_linear.gated(x, bits, halves[0], "silu")
        monkeypatch.setattr(four_bit_linear, "MOST_ROWS", 19)
        assert four_bit_linear.partial_sums(x, bits, 2) is None
        four_bit_linear.linear(x, bits, many, spans=2)
        four_bit_linear.gated(x, bits, halves[1], "silu")
        assert torch.equal(few, many) and torch.equal(*halves)

    @pytest.mark.parametrize("kind", ["awq", "gptq", "Q4_0"])
    def test_files_of_each_kind(kind: str, tiny_model: Any, tmp_path: Path) -> None:
        """Every weight has the values that `none` would read; those of AWQ and GPTQ in groups of 64."""
        source, folder = tiny_model("llama-256"), tmp_path / "packed"
        if kind == "Q4_0":
            write_gguf(source, folder := tmp_path / "model.gguf", kind)
        else:
            save_quantized(source, Format(kind, 4, 64), folder, tmp_path / "plain")
        checkpoint = open_checkpoint(folder)
        _, parameters = describe_model(checkpoint.config, checkpoint.tensors)
        packed, plain = (load_weights(parameters, CPU, lambda *_: None, each, {}) for each in ("auto", "none"))
        kept = {name: weight for name, weight in packed.items() if isinstance(weight, FourBits)}
        assert {name.rpartition(".")[2] for name in kept} >= {"qkv", "gate_up", "out"}
        for name, weight in packed.items():
            wanted = plain[name.removesuffix(".integers")]
            found = meaning(weight) if isinstance(weight, FourBits) else weight
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert all(weight.group == (32 if kind == "Q4_0" else 64) for weight in kept.values())
        assert sum(map(nbytes, packed.values())) <= bytes_of_weights(parameters, "auto")
        assert sum(map(nbytes, plain.values())) == bytes_of_weights(parameters, "none")

    SPEC = replace(PLAIN, num_layers=1, windows=(0,), num_heads=4, num_kv_heads=2, intermediate_size=128)

    def model(quantization: str, tied: bool = True) -> Any:
        """A model in 4 bits, but for `down` and an embedding apart from the head."""
        spec, parameters = replace(SPEC, tied_embeddings=tied), random_parameters(replace(SPEC, tied_embeddings=tied))
        for name, parameter in parameters.items():
            if len(parameter.shape) == 2 and name != "layers.0.down" and (tied or name != "embed"):
                parameters[name] = Parameter((stored(parameter.parts[0].float32(), "Q4_1"),))
        settings = {"device": "auto", "page_size": 8, "quantization": quantization, "parameters": parameters}
        return load(spec, load_cuda, **settings)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_model_has_the_tokens_of_its_values_in_bfloat16(tied: bool) -> None:
        """Alone, in chunks and beside others."""
        packed, plain = model("4bit", tied), model("none", tied)
        whole = run_chunks(packed, TOKENS[:5], 5, [3])
        np.testing.assert_array_equal(whole, run_chunks(plain, TOKENS[:5], 5, [3]))
        np.testing.assert_array_equal(whole, run_chunks(packed, TOKENS[:5], 3, [2]))
        assert packed.footprint.weight_bytes < plain.footprint.weight_bytes
        assert " 4bit " in packed.arithmetic and " bf16 " in plain.arithmetic

    def test_a_file_without_4_bits_is_refused_in_words() -> None:
        with pytest.raises(UnsupportedModel, match=r"this model has none: use quantization 8bit, or .* --bits 4"):
            load(SPEC, load_cuda, device="auto", quantization="4bit")
