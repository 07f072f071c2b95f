"""The tiles of linear layers on a GPU: do they agree to the bit, and which is fastest? Writes the table of tiles.

    python -m gpu_parts.linear_tiles [check] [time] [tune] [--seconds 200] [--families swapped,plain,hmma]

(with benchmarks/ and src/ in PYTHONPATH). `check` computes the same rows with every tile and compares all bits. `time`
measures the tiles that configurations.choose picks. `tune` measures the candidates and prints tuned.json.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from octavo.backends.cuda.kernels import four_bit_linear
from octavo.backends.cuda.kernels.configurations import (
    Family,
    Kind,
    Tile,
    candidates,
    choose,
    estimate,
    write_tuned,
)
from octavo.backends.cuda.kernels.four_bits import FourBits
from octavo.backends.cuda.kernels.gated import gated
from octavo.backends.cuda.kernels.integer_linear import integer_gated, integer_linear
from octavo.backends.cuda.kernels.linear import linear
from octavo.backends.cuda.kernels.rotation import Int8Rows, quantize_rows
from octavo.backends.cuda.ops import spans_of
from octavo.model.spec import DecoderSpec

from . import shapes
from .timing import device_seconds

FAMILIES: tuple[Family, ...] = ("swapped", "plain", "hmma")
ROWS = (16, 32, 64, 128, 256, 512, 2048)
_L2_BYTES = 50 << 20
_TRIED = 10  # candidates of a layer and number of rows that are measured


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight [outputs, inputs]; `spans` as in kernels/linear.py."""

    name: str
    kind: Kind
    outputs: int
    inputs: int
    spans: int = 1

    @property
    def integer(self) -> bool:
        return self.kind.startswith("int8")

    @property
    def four_bits(self) -> bool:
        return self.kind.startswith("4 bits")

    @property
    def weight_bytes(self) -> int:
        return int((1 if self.integer else 0.625 if self.four_bits else 2) * self.outputs * self.inputs)


def layers_of(spec: DecoderSpec) -> tuple[Layer, ...]:
    """Return the linear layers of a model: one of each kind."""
    hidden, spans = spec.hidden_size, spans_of(spec)
    return (
        Layer("qkv", "linear", spec.qkv_size, hidden),
        Layer("out", "linear", hidden, spec.q_size, spans["out"]),
        Layer("gate_up", "gated", 2 * spec.intermediate_size, hidden),
        Layer("down", "linear", hidden, spec.intermediate_size, spans["down"]),
        Layer("head", "linear", spec.vocab_size, hidden),
    )


LLAMA_8B, QWEN3_06B = layers_of(shapes.LLAMA_8B), layers_of(shapes.QWEN3_06B)
INT8 = tuple(
    replace(layer, name=f"{layer.name} int8", kind="int8 gated" if layer.kind == "gated" else "int8")
    for layer in LLAMA_8B
)
FOUR_BITS = tuple(
    replace(layer, name=f"{layer.name} 4bit", kind="4 bits gated" if layer.kind == "gated" else "4 bits")
    for layer in LLAMA_8B
)
Operand = Tensor | Int8Rows | FourBits


def output(layer: Layer, rows: int) -> Tensor:
    """Return memory for a layer's result: float32, bfloat16 for gate and up."""
    if layer.kind.endswith("gated"):
        return torch.empty(rows, layer.outputs // 2, dtype=torch.bfloat16, device="cuda")
    return torch.zeros(rows, layer.outputs, device="cuda")


def compute(layer: Layer, x: Operand, weight: Operand, out: Tensor, tile: Tile | None) -> None:
    """Compute a layer as a step does: with a residual where it has spans."""
    if isinstance(x, Int8Rows) and isinstance(weight, Int8Rows):
        if layer.kind == "int8 gated":
            integer_gated(x, weight, out, "silu", tile=tile)
        else:
            integer_linear(x, weight, out, residual=out if layer.spans > 1 else None, tile=tile)
    elif isinstance(x, Tensor) and isinstance(weight, FourBits):
        residual = out if layer.spans > 1 else None
        if layer.kind == "4 bits gated":
            four_bit_linear.gated(x, weight, out, "silu", tile=tile)
        else:
            four_bit_linear.linear(x, weight, out, residual=residual, spans=layer.spans, tile=tile)
    elif layer.kind == "gated":
        gated(x, weight, out, "silu", tile=tile)
    else:
        linear(x, weight, out, residual=out if layer.spans > 1 else None, spans=layer.spans, tile=tile)


def operand(layer: Layer, rows: int, scale: float = 1.0, of_weight: bool = False) -> Operand:
    """Return random rows in the form that the layer multiplies."""
    if layer.four_bits and of_weight:
        return shapes.random_four_bits(rows, layer.inputs, scale)
    values = (torch.randn(rows, layer.inputs, device="cuda") * scale).to(torch.bfloat16)
    return quantize_rows(values, layer.spans, of_weight=of_weight) if layer.integer else values


def first(x: Operand, rows: int) -> Operand:
    assert not isinstance(x, FourBits)
    return Int8Rows(x.values[:rows], x.scales[:rows]) if isinstance(x, Int8Rows) else x[:rows]


def as_float64(x: Operand) -> Tensor:
    if isinstance(x, FourBits):
        return four_bit_linear.unpack(x).double()
    if isinstance(x, Int8Rows):
        return x.values.double() * x.scales.double().repeat_interleave(x.values.shape[1] // x.spans, dim=1)
    return x.double()


def tiles_of(layer: Layer, families: Iterable[Family] = FAMILIES) -> list[Tile]:
    """Return every tile that any number of rows may use."""
    found: list[Tile] = []
    for family in families:
        for rows in ROWS:
            chosen = [choose(layer.kind, layer.outputs, layer.inputs, layer.spans, rows, family)]
            found += [
                t for t in chosen + candidates(layer.kind, layer.inputs, layer.spans, rows, family) if t not in found
            ]
    return found


def compile_all(calls: Iterable[Callable[[], object]]) -> None:
    """Run the calls once, in threads, since Triton releases the GIL while it compiles."""

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            print(f"  {type(error).__name__}: {str(error)[:200]}", flush=True)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(attempt, calls))
    torch.cuda.synchronize()


def disagreements(layer: Layer, families: Iterable[Family] = FAMILIES) -> list[str]:
    """Compute 1, 5, 67 and 300 rows with every tile. Returns the tiles whose bits differ from the first one's.

    The shorter batches are the first rows of the longest one, which the first tile computes. Weights of 4 bits are
    compared with what their values in bfloat16 give.
    """
    torch.manual_seed(0)
    x, weight = operand(layer, 300), operand(layer, layer.outputs, layer.inputs**-0.5, of_weight=True)
    tiles = tiles_of(layer, families)
    compile_all(partial(compute, layer, x, weight, output(layer, 300), tile) for tile in tiles)
    wanted = output(layer, 300)
    if isinstance(weight, FourBits):
        plain = replace(layer, kind="gated" if layer.kind.endswith("gated") else "linear")
        compute(plain, x, four_bit_linear.unpack(weight), wanted, None)
    else:
        compute(layer, x, weight, wanted, tiles[0])
    found = []
    for tile in tiles:
        for rows in (1, 5, 67, 300):
            out = output(layer, rows)
            try:
                compute(layer, first(x, rows), weight, out, tile)
                torch.cuda.synchronize()
            except Exception as error:
                found.append(f"{layer.name} {rows} rows {tile}: {type(error).__name__} {str(error)[:200]}")
                break
            if not torch.equal(out, wanted[:rows]):
                different = (out != wanted[:rows]).sum().item()
                worst = (out.float() - wanted[:rows].float()).abs().max().item()
                found.append(f"{layer.name} {rows} rows {tile}: {different} of {out.numel()} differ, by up to {worst}")
    return found


def relative_error(layer: Layer, rows: int = 33) -> float:
    """Return the largest error against float64, relative to the largest value."""
    torch.manual_seed(1)
    x, weight = operand(layer, rows), operand(layer, layer.outputs, layer.inputs**-0.5, of_weight=True)
    out = output(layer, rows)
    compute(layer, x, weight, out, None)
    exact = as_float64(x) @ as_float64(weight).T
    if layer.kind.endswith("gated"):
        gate, up = exact.chunk(2, dim=1)
        exact = torch.nn.functional.silu(gate) * up
    return float((out.double() - exact).abs().max() / exact.abs().max())


def seconds(layer: Layer, rows: int, tile: Tile | None, weights: list[Operand]) -> float:
    """Return the time of a layer on the device. Give weights that together exceed the L2 cache."""
    x = operand(layer, rows)
    out = output(layer, rows)
    calls = [partial(compute, layer, x, weight, out, tile) for weight in weights]
    return device_seconds(calls * max(1, 8 // len(calls)), repeats=3)


def weights_of(layer: Layer) -> list[Operand]:
    """Return copies of a layer's weight that the L2 cache cannot hold."""
    copies = max(2, min(32, 4 * _L2_BYTES // layer.weight_bytes))
    return [operand(layer, layer.outputs, layer.inputs**-0.5, of_weight=True) for _ in range(copies)]


def figures(layer: Layer, rows: int, took: float) -> str:
    tera = 2 * rows * layer.outputs * layer.inputs / took / 1e12
    return f"{took * 1e6:8.1f} us  {layer.weight_bytes / took / 1e12:5.2f} TB/s of weights  {tera:6.1f} TFLOP/s"


def tune(
    layers: Iterable[Layer], end: float, family: Family = "swapped"
) -> dict[tuple[Kind, int, int, int, int], Tile]:
    """Measure the candidates of each layer and number of rows until `end` (time.monotonic). Returns the fastest."""
    best: dict[tuple[Kind, int, int, int, int], Tile] = {}
    for rows in (16, 64, 256, 2048, 32, 128, 512, 1024, 4096):
        for layer in layers:
            key = (layer.kind, layer.outputs, layer.inputs, layer.spans, rows)
            if key in best or time.monotonic() > end or (layer.name.startswith("head") and rows > 256):
                continue
            weights, times = weights_of(layer), {}
            tiles = candidates(layer.kind, layer.inputs, layer.spans, rows, family)
            tiles = sorted(tiles, key=lambda t: estimate(t, layer.outputs, layer.inputs, layer.spans, rows))[:_TRIED]
            x, out = operand(layer, rows), output(layer, rows)
            compile_all(partial(compute, layer, x, weights[0], out, tile) for tile in tiles)
            for tile in tiles:
                try:
                    times[tile] = seconds(layer, rows, tile, weights)
                except Exception as error:
                    print(f"  {tile}: {type(error).__name__} {str(error)[:150]}", flush=True)
            if times:
                best[key] = min(times, key=lambda t: times[t])
                print(f"{layer.name:8} {rows:5} rows {figures(layer, rows, times[best[key]])}  {best[key]}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["check", "time"], help="check, time or tune")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--families", default=",".join(FAMILIES))
    options = parser.parse_args()
    families, end = options.families.split(","), time.monotonic() + options.seconds
    layers = LLAMA_8B + QWEN3_06B + INT8 + FOUR_BITS
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if "check" in options.what:
        for layer in (*LLAMA_8B[:4], *QWEN3_06B[:4], *INT8[:4], *FOUR_BITS[:4]):
            found = disagreements(layer, families)
            tiles, error = len(tiles_of(layer, families)), relative_error(layer)
            print(
                f"{layer.name} {layer.outputs}x{layer.inputs}: {tiles} tiles, error {error:.1e}, {len(found)} disagree"
            )
            print("\n".join(f"  {line}" for line in found[:12]), flush=True)
    if "time" in options.what:
        for layer in layers:
            weights = weights_of(layer)
            for rows in (1, 64, 256, 2048):
                for family in families:
                    tile = choose(layer.kind, layer.outputs, layer.inputs, layer.spans, rows, family)
                    if time.monotonic() < end and not (layer.name.startswith("head") and rows > 256):
                        took = seconds(layer, rows, tile, weights)
                        print(f"{layer.name:8} {rows:5} rows {family:8} {figures(layer, rows, took)}", flush=True)
    if "tune" in options.what:
        print(write_tuned(tune(layers, end)), flush=True)


if __name__ == "__main__":
    main()
