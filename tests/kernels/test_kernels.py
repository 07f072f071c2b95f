"""The native linears, on every instruction set of this machine: against numpy, and bit for bit whatever the batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from step_batches import step_batch  # noqa: E402

ISAS = native.available_isas()
VOCAB = 96
EPS = 0.1  # large enough to matter


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of each float32, ties to even, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that bfloat16 holds exactly."""
    return to_bf16(np.random.default_rng([seed, *shape]).standard_normal(shape))


def stored(weight: np.ndarray) -> list[tuple[np.ndarray, str, None]]:
    """The parts that Program.pack takes."""
    return [(weight.view(np.uint8), "F32", None)]


@dataclass(frozen=True)
class Layers:
    """embed, norm, and what `describe` adds."""

    embed: np.ndarray  # [VOCAB, columns]
    program: "native.Program"

    def run(self, tokens: list[int]) -> np.ndarray:
        batch = step_batch([(tokens, 0, [0, 1, 2, 3, 4])])
        result: np.ndarray = self.program.logits(batch)
        return result

    @property
    def normed(self) -> np.ndarray:
        """What the linear multiplies: float64 [VOCAB, columns]."""
        mean = (self.embed.astype(np.float64) ** 2).mean(axis=1, keepdims=True)
        return to_bf16((self.embed / np.sqrt(mean + EPS)).astype(np.float32)).astype(np.float64)


def build(
    isa: str, columns: int, describe: Callable[["native.Program", int], tuple[int, dict[int, np.ndarray]]],
    threads: int = 2,
) -> Layers:  # fmt: skip
    """`describe(program, x)` appends ops to x, the normed embedding; it returns the result and weights to pack."""
    program = native.Program(
        isa=isa, processors=[[core] for core in range(threads)], vocab=VOCAB, heads=1, kv_heads=1,
        head_dim=16, layers=1, norm_eps=EPS, page_size=32, max_rows=160, max_sampled=160, frequencies=[1.0] * 8,
    )  # fmt: skip
    embed = random(VOCAB, columns, seed=1)
    table = program.weight(VOCAB, columns)
    x = program.norm(program.embed(table), program.vector(np.ones(columns, np.float32)))
    result, weights = describe(program, x)
    program.finish(program.sampled_rows(result))
    for handle, weight in {table: embed, **weights}.items():
        program.pack(handle, stored(weight), *weight.shape)
    program.allocate_kv(5)
    return Layers(embed, program)


def linear(isa: str, columns: int, width: int) -> tuple[Layers, np.ndarray, np.ndarray]:
    weight, bias = random(width, columns, seed=2), random(width, seed=3)

    def describe(program: "native.Program", x: int) -> tuple[int, dict[int, np.ndarray]]:
        handle = program.weight(width, columns)
        return program.linear(x, handle, program.vector(bias), -1), {handle: weight}

    return build(isa, columns, describe), weight, bias


SHAPES = [(16, 1), (40, 17), (96, 100), (576, 960), (130, 16 * 7), (2, 33)]


@pytest.mark.parametrize("columns, width", SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_linear_agrees_with_numpy(isa: str, columns: int, width: int) -> None:
    layers, weight, bias = linear(isa, columns, width)
    tokens = list(range(VOCAB))
    reference = layers.normed @ weight.T.astype(np.float64) + bias
    error = np.abs(layers.run(tokens) - reference)
    # Of the norm's own rounding a few inputs differ in their last bit; of float sums in any order, the rest.
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(reference)
    assert error.max() < 0.03 * np.abs(reference).max()


@pytest.mark.parametrize("columns, width", SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_its_batch(isa: str, columns: int, width: int) -> None:
    layers, _, _ = linear(isa, columns, width)
    alone = np.concatenate([layers.run([token]) for token in range(20)])
    for rows in [*range(1, 20), 31, 32, 33, 64, 65, 128, 129, 160]:
        tokens = [(7 * i) % 20 for i in range(rows)]
        np.testing.assert_array_equal(layers.run(tokens), alone[tokens])


@pytest.mark.parametrize("intermediate", [1, 16, 40, 200])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("isa", ISAS)
def test_gated_agrees_with_numpy(isa: str, activation: str, intermediate: int) -> None:
    """A linear whose upper half gates its lower half, with biases, into a second linear with a residual."""
    columns = 48
    gate_up, bias = random(2 * intermediate, columns, seed=4), random(2 * intermediate, seed=5)
    down = random(columns, intermediate, seed=6)

    def describe(program: "native.Program", x: int) -> tuple[int, dict[int, np.ndarray]]:
        first, second = program.weight(*gate_up.shape), program.weight(*down.shape)
        h = program.gated(program.linear(x, first, program.vector(bias), -1), native.Activation[activation])
        return program.linear(h, second, -1, x - 1), {first: gate_up, second: down}  # x - 1: the embedding

    layers = build(isa, columns, describe)
    gate, up = np.split(layers.normed @ gate_up.T.astype(np.float64) + bias, 2, axis=1)
    if activation == "silu":
        activated = gate / (1 + np.exp(-gate))
    else:
        activated = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    reference = to_bf16((activated * up).astype(np.float32)) @ down.T.astype(np.float64) + layers.embed
    result = layers.run(list(range(VOCAB)))
    assert np.linalg.norm(result - reference) < 2e-3 * np.linalg.norm(reference)
    np.testing.assert_array_equal(layers.run([5]), result[5:6])


def test_threads_do_not_change_a_bit() -> None:
    weight = random(700, 96, seed=2)

    def describe(program: "native.Program", x: int) -> tuple[int, dict[int, np.ndarray]]:
        handle = program.weight(*weight.shape)
        return program.linear(x, handle, -1, -1), {handle: weight}

    results = [build(ISAS[0], 96, describe, threads).run(list(range(90))) for threads in (1, 2)]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("gated", [False, True])
def test_row_order_and_parts(gated: bool) -> None:
    """Rows stored in another order, and a weight in several parts, give what the plain weight gives."""
    weight = random(64, 32, seed=7)
    order = np.random.default_rng(0).permutation(24)
    first = np.empty_like(weight[:24])
    first[order] = weight[:24]  # stored so that row i is at order[i]
    split = [(first.view(np.uint8), "F32", order), (weight[24:].view(np.uint8), "F32", None)]

    def result(parts: list[tuple[np.ndarray, str, np.ndarray | None]]) -> np.ndarray:
        handles = []

        def describe(program: "native.Program", x: int) -> tuple[int, dict[int, np.ndarray]]:
            handles.append(program.weight(*weight.shape))
            y = program.linear(x, handles[0], -1, -1)
            if not gated:
                return y, {}
            handles.append(program.weight(64, 32))
            return program.linear(program.gated(y, native.Activation.silu), handles[1], -1, -1), {handles[1]: weight}

        layers = build(ISAS[0], 32, describe)
        layers.program.pack(handles[0], parts, *weight.shape)
        return layers.run(list(range(40)))

    np.testing.assert_array_equal(result(split), result(stored(weight)))


def test_pack_refuses_what_does_not_fit() -> None:
    layers, weight, _ = linear(ISAS[0], 32, 16)
    with pytest.raises(ValueError, match="bytes per row"):
        layers.program.pack(0, [(weight.view(np.uint8)[:, :-4].copy(), "F32", None)], 16, 32)
    with pytest.raises(ValueError, match="bytes per row"):
        layers.program.pack(0, [(weight.view(np.uint8), "Q9_X", None)], 16, 32)
    with pytest.raises(ValueError, match="as many rows"):
        layers.program.pack(0, stored(weight), 17, 32)
    with pytest.raises(ValueError, match="row_order"):
        layers.program.pack(0, [(weight.view(np.uint8), "F32", np.full(16, 16))], 16, 32)
