"""The kernels of linear layers and norms, compiled for A100 and H100 without either.

What cannot be seen without a GPU is how fast they are; what can: that every configuration compiles, which matrix
instruction it uses, that nothing is spilled from registers, and that loads are of 16 bytes.
"""

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from triton_interpreter import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from compiled_kernel import Compiled, compile_kernel
from octavo.backends.cuda.kernels import embed, four_bit_linear, gated, integer_linear, linear, norm
from octavo.backends.cuda.kernels.configurations import Tile, candidates, choose
from octavo.backends.cuda.kernels.rotation import largest_power, warps

TYPES = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "residual": "*fp32", "waiting": "*fp32", "rows": "i32"}
TYPES |= {"length": "i32", "outputs": "i32", "features": "i32", "partials": "*fp32", "eps": "fp32", "row_of": "*i32"}
TYPES |= {"values": "*i8", "scales": "*fp32", "normed": "*fp32", "scratch": "*fp32"}
INT8 = TYPES | {"x": "*i8", "weight": "*i8", "x_scale": "*fp32", "weight_scale": "*fp32"}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of a program, at most
FAMILIES = ("swapped", "plain", "hmma")
ROWS = (1, 32, 64, 128, 2048)


def compile_linear(
    tile: Tile, spans: int, capability: int, integer: bool = False, inputs: int | None = None
) -> Compiled:
    types = (INT8 if integer else TYPES) | {"out": "*fp32" if spans > 1 else "*bf16"}
    here = tile.spans_here(spans)
    constants = {"K": inputs or (14336 if spans > 1 else 4096), "SPANS": spans, "bias": None, **tile.constants}
    constants |= {"BLOCK_K": integer_linear.BLOCK_K} if integer else {"x_scale": None, "weight_scale": None}
    if spans == 1 or here < spans:
        constants["residual"] = None
    if tile.waits_in_memory:
        constants |= {"SPANS_HELD": tile.held, "PART": 1024 * tile.warps}
        kernel = linear.large_spanned_kernel
    else:
        constants |= {"SPANS_HERE": here, "ONE_LOOP": tile.one_loop}
        kernel = linear.linear_kernel
    return compile_kernel(kernel, types, constants, tile.options, capability, ("outputs",))


def compile_gated(tile: Tile, capability: int, integer: bool = False) -> Compiled:
    constants = {"K": 4096, "ACTIVATION": "silu", "bias": None, **tile.constants}
    constants |= {"BLOCK_K": integer_linear.BLOCK_K} if integer else {"x_scale": None, "weight_scale": None}
    types = (INT8 if integer else TYPES) | {"out": "*bf16"}
    return compile_kernel(gated.gated_kernel, types, constants, tile.options, capability, ("features",))


def check(
    made: Compiled, tile: Tile, capability: int, copies_of_pairs: bool = False, instructions: str = "HGMMA HMMA"
) -> None:
    left = tile.outputs if tile.swapped else tile.rows
    hopper = capability == 90 and left >= 64
    of_hopper, of_ampere = map(made.count, instructions.split())
    assert of_hopper > 0 if hopper else (of_ampere > 0 and of_hopper == 0), tile
    assert made.spills_in_loops() <= (0 if capability == 90 else 4), tile
    assert capability < 90 or made.stack_bytes <= 128, f"{made.stack_bytes} bytes are spilled outside of loops: {tile}"
    copies, large = made.count("LDGSTS"), made.count("LDGSTS.E.BYPASS.128")
    if copies_of_pairs:  # of 4 or 8 bytes, one for each output and group
        copies -= made.sass.count("LDGSTS.E.64 ") + made.sass.count("LDGSTS.E ")
        assert large >= tile.stages - 1
    assert copies == large > 0, f"copies of less than 16 bytes: {tile}"
    assert made.shared_bytes <= SHARED_BYTES[capability], tile
    assert made.registers * 32 * tile.warps <= 65536, tile


def for_chip(tile: Tile, capability: int) -> Tile:
    """Return the tile with as many stages as the chip has shared memory for."""
    stage = (tile.rows + tile.outputs) * 128
    return replace(tile, stages=min(tile.stages, SHARED_BYTES[capability] // stage))


@pytest.mark.parametrize("family, rows, capability", [("swapped", 1, 90), ("swapped", 2048, 90), ("hmma", 1, 80)])
def test_chosen_tiles(family: str, rows: int, capability: int) -> None:
    _check_chosen(family, rows, capability)


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_chosen_tiles(family: str, rows: int, capability: int) -> None:
    _check_chosen(family, rows, capability)


def _check_chosen(family: str, rows: int, capability: int) -> None:
    plain, spanned, gate = (
        for_chip(choose(*shape, rows, family), capability)
        for shape in (("linear", 6144, 4096, 1), ("linear", 4096, 14336, 8), ("gated", 28672, 4096, 1))
    )
    check(compile_linear(plain, 1, capability), plain, capability)
    check(compile_linear(spanned, 8, capability), spanned, capability)
    check(compile_gated(gate, capability), gate, capability)


@pytest.mark.parametrize("rows, capability", [(1, 90), (2048, 90), (64, 80)])
def test_int8(rows: int, capability: int) -> None:
    _check_int8(rows, capability)


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", ROWS)
def test_all_int8(rows: int, capability: int) -> None:
    _check_int8(rows, capability)


def _check_int8(rows: int, capability: int) -> None:
    instructions = "IGMMA IMMA"
    plain, spanned, gate = (
        for_chip(choose(*shape, rows), capability)
        for shape in (("int8", 6144, 4096, 1), ("int8", 4096, 14336, 8), ("int8 gated", 28672, 4096, 1))
    )
    plain = replace(plain, groups=1)
    check(compile_linear(plain, 1, capability, integer=True), plain, capability, instructions=instructions)
    check(compile_linear(spanned, 8, capability, integer=True), spanned, capability, instructions=instructions)
    check(compile_gated(gate, capability, integer=True), gate, capability, instructions=instructions)


@pytest.mark.parametrize("ranks, rows, capability", [(4, 1, 90), (8, 64, 80)])
def test_parts_of_ranks(ranks: int, rows: int, capability: int) -> None:
    _check_parts(ranks, rows, capability)


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_parts_of_ranks(ranks: int, rows: int, capability: int) -> None:
    _check_parts(ranks, rows, capability)


def _check_parts(ranks: int, rows: int, capability: int) -> None:
    """Compile `down` of the 8B shape for one of several ranks."""
    inputs, spans = 14336 // ranks, 8 // ranks
    for kind, instructions in (("linear", "HGMMA HMMA"), ("int8", "IGMMA IMMA")):
        tile = for_chip(choose(kind, 4096, inputs, spans, rows), capability)
        if spans == 1:
            tile = replace(tile, groups=1)
        made = compile_linear(tile, spans, capability, integer=kind == "int8", inputs=inputs)
        check(made, tile, capability, instructions=instructions)


FOUR_BITS = TYPES | {"values": "*u8", "blocks": "i32"}
GROUPS = {32: "*i32", 128: "*i64"}  # values in a group, and the type of its scale and minimum


def check_four_bits(tile: Tile, spans: int, group: int, capability: int, gate: bool) -> None:
    constants = {"bias": None, "GROUP_OF_K": group, "MIXED": capability == 90, **tile.constants}
    types = FOUR_BITS | {"pairs": GROUPS[group], "out": "*bf16" if gate else "*fp32"}
    if gate:
        kernel, constants = four_bit_linear.four_bit_gated_kernel, constants | {"K": 4096, "ACTIVATION": "silu"}
    else:
        here = tile.spans_here(spans)
        kernel = four_bit_linear.four_bit_linear_kernel
        constants |= {"K": 14336, "SPANS": spans, "SPANS_HERE": here}
        constants |= {"residual": None} if here < spans else {}
    made = compile_kernel(kernel, types, constants, tile.options, capability, ("outputs", "features"))
    check(made, tile, capability, copies_of_pairs=True)
    assert made.sass.count("LDS.U8") == 0, f"bytes are read one by one: {tile}"


@pytest.mark.parametrize("rows, capability, group", [(1, 90, 128), (128, 90, 32), (16, 80, 32)])
def test_four_bits(rows: int, capability: int, group: int) -> None:
    _check_four_bits(rows, capability, group)


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("group", GROUPS)
def test_all_four_bits(rows: int, capability: int, group: int) -> None:
    _check_four_bits(rows, capability, group)


def _check_four_bits(rows: int, capability: int, group: int) -> None:
    check_four_bits(for_chip(choose("4 bits", 4096, 14336, 8, rows), capability), 8, group, capability, gate=False)
    check_four_bits(for_chip(choose("4 bits", 6144, 14336, 1, rows), capability), 1, group, capability, gate=False)
    check_four_bits(for_chip(choose("4 bits gated", 28672, 4096, 1, rows), capability), 1, group, capability, gate=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_candidates_for_tuning(rows: int) -> None:
    for tile in candidates("linear", 14336, 8, rows):
        check(compile_linear(tile, 8, 90), tile, 90)
    for tile in candidates("gated", 4096, 1, rows):
        check(compile_gated(tile, 90), tile, 90)
    for tile in candidates("int8", 14336, 8, rows):
        check(compile_linear(tile, 8, 90, integer=True), tile, 90, instructions="IGMMA IMMA")


@pytest.mark.parametrize("width, capability", [(4096, 90), (576, 80)])
def test_norms_sum_alike(width: int, capability: int) -> None:
    """norm and add_norm share a row's squares between threads in the same way, so that they add them in one order."""
    block = 1 << (width - 1).bit_length()
    options = {"num_warps": norm.warps(width), "enable_fp_fusion": False}
    types = TYPES | {"x": "*fp32", "out": "*bf16"}
    constants = {"H": width, "BLOCK": block}
    alone = compile_kernel(norm.norm_kernel, types, constants | {"row_of": None}, options, capability)
    some = compile_kernel(norm.norm_kernel, types, constants, options, capability)
    added = [
        compile_kernel(norm.add_norm_kernel, types, constants | {"COUNT": count, "bias": None}, options, capability)
        for count in (2, 8)
    ]
    assert len({_reduced_layout(made.layouts) for made in (alone, some, *added)}) == 1
    for made in (alone, some, *added):
        assert made.stack_bytes == 0
    assert made.count("LDG.E.128") > 0 and made.count("STG.E.128") > 0


@pytest.mark.parametrize("width, capability", [(4096, 90), (576, 80)])
def test_int8_norms_sum_alike(width: int, capability: int) -> None:
    """A row's squares are added in one order, whether or not the norm first adds the sums of a linear layer."""
    most = largest_power(width)
    options = {"num_warps": warps(most), "enable_fp_fusion": False}
    types = TYPES | {"x": "*fp32"}
    constants = {"H": width, "BLOCK": 1 << (width - 1).bit_length(), "MOST": most, "bias": None}
    without = constants | {"partials": None, "COUNT": 0}
    ways = [without | {"row_of": None}, without, *({"row_of": None, "COUNT": count} | constants for count in (2, 8))]
    made = [compile_kernel(norm.norm_int8_kernel, types, way, options, capability) for way in ways]
    assert len({_reduced_layout(each.layouts) for each in made}) == 1


def _reduced_layout(code: str) -> str:
    """Return the layout of the block that the kernel's one sum of floats reduces."""
    reduced = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<(\S+), #([^>]+)>\)', code, re.DOTALL)
    sums = [(block, name) for block, name in reduced if block.endswith("f32")]
    assert len(sums) == 1 and len(reduced) == code.count('"tt.reduce"'), code
    layout = re.search(rf"^#{sums[0][1]} = (.*)$", code, re.MULTILINE)
    assert layout is not None
    return f"{sums[0][0]} {layout[1]}"


@pytest.mark.parametrize("capability", [80, 90])
def test_embedding(capability: int) -> None:
    """A token that is not known yet is read from where the step before has put it."""
    types = {"tokens": "*i32", "kept": "*i32", "weight": "*bf16", "out": "*fp32", "first": "i32", "count": "i32"}
    constants = {"scales": None, "WIDTH": 4096, "SCALED": False, "BLOCK": 1024}
    made = compile_kernel(embed.embed_kernel, types, constants, {"num_warps": 4, "enable_fp_fusion": False}, capability)
    assert made.stack_bytes == 0
    assert made.count("LDG.E.128") > 0 and made.count("STG.E.128") > 0
