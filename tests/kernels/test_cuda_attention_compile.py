"""The kernels of attention, rotary embedding and token embedding, compiled for A100 and H100 without either."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from triton_interpreter import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

import torch

from compiled_kernel import Compiled, compile_kernel
from octavo.backends.cuda.kernels.attention import attention_constants, attention_kernel
from octavo.backends.cuda.kernels.attention_plan import Tiling, tilings
from octavo.backends.cuda.kernels.rope_and_cache import KvPool, rope_and_cache_kernel, rope_constants

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of a program, at most
TYPES = dict.fromkeys(("tokens", "positions", "sequences", "page_tables", "tiles", "tile_count", "arrivals"), "*i32")
TYPES |= dict.fromkeys(("queries", "q_norm", "k_norm", "weight"), "*bf16")
TYPES |= dict.fromkeys(("qkv", "scales", "rotary", "part_values", "part_weights"), "*fp32")
TYPES |= {"eps": "fp32", "table_stride": "i32", "layer": "i32", "window": "i32"}
LLAMA_8B, SMOLLM2, GEMMA = (32, 8, 128), (9, 3, 64), (8, 4, 256)


def compile_attention(
    shape: tuple[int, int, int], page_size: int, int8: bool, tiling: Tiling, capability: int
) -> Compiled:
    heads, kv_heads, head_dim = shape
    pool = KvPool(torch.empty(0), 32, kv_heads, page_size, head_dim, int8)
    types = TYPES | {"pool": "*i8" if int8 else "*bf16", "out": "*bf16"}
    constants = {**pool.constants, **attention_constants(heads, head_dim, tiling)}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": False}
    return compile_kernel(attention_kernel, types, constants, options, capability)


def check(made: Compiled, tiling: Tiling, capability: int, int8: bool) -> None:
    hopper = capability == 90 and tiling.rows >= 64
    assert made.count("HGMMA") > 0 if hopper else (made.count("HMMA") > 0 and made.count("HGMMA") == 0), tiling
    assert made.spills_in_loops() == 0, tiling
    assert made.stack_bytes <= 64, f"{made.stack_bytes} bytes are spilled outside of loops: {tiling}"
    assert made.count("LDGSTS.E.BYPASS.128") >= 8 if not int8 else made.count("LDGSTS") > 0, tiling
    assert made.shared_bytes <= SHARED_BYTES[capability], tiling
    assert made.registers * 32 * tiling.warps <= 65536, tiling


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    ("shape", "page_size", "int8", "capability"),
    [
        (LLAMA_8B, 32, False, 90),
        (LLAMA_8B, 64, True, 90),
        (SMOLLM2, 32, False, 80),
        *(
            pytest.param(shape, page_size, int8, capability, marks=pytest.mark.exhaustive)
            for shape in (LLAMA_8B, SMOLLM2, GEMMA, (32, 32, 80), (8, 2, 96))
            for page_size in (32, 64)
            for int8 in (False, True)
            for capability in (80, 90)
        ),
    ],
)
def test_attention(shape, page_size, int8, capability, size):
    tiling = tilings(shape[2], shape[0] // shape[1], int8, capability == 90)[size]
    check(compile_attention(shape, page_size, int8, tiling, capability), tiling, capability, int8)


@pytest.mark.parametrize("capability", [80, 90])
def test_rope_and_cache_loads_and_stores_vectors(capability):
    heads, kv_heads, head_dim = LLAMA_8B
    pool = KvPool(torch.empty(0), 32, kv_heads, 32, head_dim, False)
    constants = {**pool.constants, **rope_constants(heads, head_dim, True)}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    made = compile_kernel(rope_and_cache_kernel, TYPES | {"pool": "*bf16"}, constants, options, capability)
    assert made.stack_bytes == 0
    assert made.count("LDG.E.128") > 0
    assert made.count("STG.E.128") + made.count("STG.E.64") > 0
