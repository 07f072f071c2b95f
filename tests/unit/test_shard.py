"""Parts of a model: together they are the whole, whatever its shape and the formats of its tensors."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.formats.blocks import BLOCK_FORMATS
from octavo.model.registry import parameter_shapes
from octavo.model.shard import Shard, check_size, divides_heads, sizes_for
from octavo.model.spec import DecoderSpec, RopeSpec
from octavo.weights.tensor import Parameter, Tensor, bfloat16_tensor

LLAMA_70B = DecoderSpec(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8,
    head_dim=128, max_positions=8192, norm_eps=1e-5, rope=RopeSpec(), windows=(0,) * 80,
)  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> DecoderSpec:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    return dataclasses.replace(
        LLAMA_70B,
        num_layers=1,
        windows=(0,),
        hidden_size=draw(st.integers(40, 400)),
        intermediate_size=draw(st.integers(64, 1100)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([16, 32, 64, 80, 128])),
        vocab_size=draw(st.integers(64, 700)),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def numbered(spec: DecoderSpec) -> dict[str, Parameter]:
    """Parameters whose values are different small integers, exact in float32."""
    parameters = {}
    for name, shapes in parameter_shapes(spec).items():
        parts = []
        for i, shape in enumerate(shapes):
            values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + i * 2**22
            parts.append(
                Tensor(name, shape, "F32", values.reshape(shape[0] if len(shape) > 1 else 1, -1).view(np.uint8))
            )
        parameters[name] = Parameter(tuple(parts))
    return parameters


def values(parameter: Parameter) -> np.ndarray:
    return np.concatenate([part.float32() for part in parameter.parts])


@settings(deadline=None, max_examples=40)
@given(specs())
def test_the_parts_are_the_whole(spec: DecoderSpec) -> None:
    whole = numbered(spec)
    sizes = sizes_for(spec)
    assert sizes[0] == 1
    for size in sizes:
        parts = [Shard(spec, rank, size) for rank in range(size)]
        own = [part.parameters(whole) for part in parts]
        shapes = [parameter_shapes(part.spec) for part in parts]
        for name in ("layers.0.down", "layers.0.out"):
            by_columns = name.endswith("down") or divides_heads(spec, size)
            joined = np.concatenate([values(each[name]) for each in own], axis=int(by_columns and size > 1))
            np.testing.assert_array_equal(joined, values(whole[name]))
        for name in ("embed", "head", "layers.0.gate_up", "layers.0.gate_up.bias"):
            rows = np.concatenate([values(each[name]) for each in own])
            np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(values(whole[name]), axis=0))
        if divides_heads(spec, size):
            for each, shape in zip(own, shapes, strict=True):
                assert each["layers.0.qkv"].shape == (sum(rows for rows, _ in shape["layers.0.qkv"]), spec.hidden_size)
            assert {row for each in own for row in values(each["layers.0.qkv"])[:, 0]} == {
                *values(whole["layers.0.qkv"])[:, 0]
            }
        else:
            joined = np.concatenate([values(each["layers.0.qkv"]) for each in own])
            np.testing.assert_array_equal(joined, values(whole["layers.0.qkv"]))
        for each in own:
            np.testing.assert_array_equal(values(each["layers.0.down.bias"]), values(whole["layers.0.down.bias"]))


def test_each_head_has_its_own_keys_and_values() -> None:
    spec = dataclasses.replace(LLAMA_70B, num_kv_heads=2)
    assert [list(Shard(spec, rank, 8).kv_heads) for rank in range(8)] == [[0]] * 4 + [[1]] * 4
    spec = dataclasses.replace(LLAMA_70B, num_kv_heads=16)
    assert [list(Shard(spec, rank, 4).kv_heads) for rank in range(4)] == [
        list(range(4 * rank, 4 * rank + 4)) for rank in range(4)
    ]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_70b_shape_is_divided_evenly(size: int) -> None:
    """At most 10 % more than its part on any rank."""

    def weights(spec: DecoderSpec, shapes: dict[str, tuple[tuple[int, ...], ...]]) -> int:
        return sum(int(np.prod(shape)) for parts in shapes.values() for shape in parts)

    whole = weights(LLAMA_70B, parameter_shapes(LLAMA_70B))
    table = LLAMA_70B.vocab_size * LLAMA_70B.hidden_size
    for rank in range(size):
        spec = Shard(LLAMA_70B, rank, size).spec
        own = weights(spec, parameter_shapes(spec)) - 2 * table + 2 * table // size  # of embedding and head
        assert own <= whole / size * 1.001


@pytest.mark.parametrize("format", [name for name in BLOCK_FORMATS if BLOCK_FORMATS[name].number < 1000])
def test_columns_of_any_format(format: str) -> None:
    """Also where they begin and end within a block."""
    block = BLOCK_FORMATS[format]
    data = np.random.default_rng(0).integers(0, 60, (6, 1024 // block.values * block.nbytes), np.uint8)
    order = np.array([3, 1, 0, 2, 5, 4])
    for tensor in (Tensor("w", (6, 1024), format, data), Tensor("w", (6, 1024), format, lambda: data, order)):
        whole = tensor.float32()
        for start, stop in ((0, 256), (64, 192), (320, 1024), (448, 960)):
            part = tensor.take_columns(start, stop)
            np.testing.assert_array_equal(part.float32(), whole[:, start:stop])
            np.testing.assert_array_equal(part.take_rows(2, 5).float32(), whole[2:5, start:stop])
            np.testing.assert_array_equal(part.take_columns(64, 128).float32(), whole[:, start + 64 : start + 128])


def test_rows_of_a_stack() -> None:
    parts = tuple(bfloat16_tensor(name, np.full((3, 4), i, np.float32)) for i, name in enumerate("abc"))
    taken = Parameter(parts).take_rows(range(1, 4), range(8, 9))
    assert [(part.name, part.shape) for part in taken.parts] == [("a", (2, 4)), ("b", (1, 4)), ("c", (1, 4))]
    assert values(taken)[:, 0].tolist() == [0, 0, 1, 2]


def test_a_size_that_does_not_divide_is_refused() -> None:
    small = dataclasses.replace(LLAMA_70B, intermediate_size=160)
    with pytest.raises(ConfigError, match="must be 1 or 2 for this model, not 4"):
        check_size(small, 4)
    check_size(LLAMA_70B, 8)
