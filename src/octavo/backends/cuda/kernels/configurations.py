"""Which tiles a linear layer is computed in, by its shape and the number of rows.

No tile changes a bit of the result: BLOCK_K is one constant, and every tile sums over k in one order. What differs is
the matrix instruction. On Hopper a tile whose left operand has 64 rows or more uses HGMMA, a smaller one HMMA. A family
is a set of tiles that uses one instruction, for chips on which the two should differ:

    swapped  the weight on the left: HGMMA for any number of rows. The default.
    plain    the rows on the left, 64 or more of them: HGMMA.
    hmma     the rows on the left, 16 or 32 of them: HMMA.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import torch
from triton.runtime import driver

Kind = Literal["linear", "gated", "int8", "int8 gated", "4 bits", "4 bits gated"]
Family = Literal["swapped", "plain", "hmma"]

BLOCK_K = 64
GROUP = 8  # blocks of rows that walk the weight together
PROCESSORS = 132  # of an H100 or H200
FEWEST_ROWS, MOST_ROWS = 16, 4096  # buckets of rows are the powers of two between
_MOST_ROWS_IN_GROUPS = 512  # with more, partial sums take much memory
_MOST_SUMS, _MOST_IN_ONE_LOOP = 128, 192  # float32 sums per thread, the waiting ones included
_MOST_SUMS_OF_INT8 = 160  # those of one span counted twice: as integers, and while they are scaled
_MOST_SUMS_UNPACKING = 64  # those of one span, beside the registers for 4-bit weights


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched.

    Attributes:
        rows: rows of x in a tile.
        outputs: rows of the weight in a tile.
        warps: of a program.
        stages: blocks of k that are in flight.
        swapped: the weight is the matrix instruction's left operand.
        groups: programs that share the spans of a tile. Their sums are merged afterwards.
        waits_in_memory: sums of spans wait in memory for their partner in the tree, not in registers.
        held: spans whose sum is made in registers even so.
        one_loop: sums of several spans are made in one loop over their blocks of k.
        programs: the most programs of a kernel whose sums wait in memory.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    swapped: bool = True
    groups: int = 1
    waits_in_memory: bool = False
    held: int = 1
    one_loop: bool = False
    programs: int = PROCESSORS

    def spans_here(self, spans: int) -> int:
        """Return how many of a layer's spans one program sums."""
        return spans // self.groups

    @property
    def constants(self) -> dict[str, int]:
        """Return the kernel's parameters that are known when it is compiled."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_OUTPUTS": self.outputs,
            "BLOCK_K": BLOCK_K,
            "GROUP": GROUP,
            "SWAPPED": self.swapped,
        }

    @property
    def options(self) -> dict[str, int]:
        """Return Triton's options. Fused multiplication and addition is off, so that no bit depends on its choice."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def sums_per_thread(self, spans: int) -> int:
        """Return how many float32 sums a thread holds, those that wait included."""
        here = self.held if self.waits_in_memory else self.spans_here(spans)
        return self.sums_of_a_span * here.bit_length()

    @property
    def sums_of_a_span(self) -> int:
        """Return how many of them are of one span."""
        return self.rows * self.outputs // (32 * self.warps)


_TILES: dict[Family, list[Tile]] = {
    "swapped": [
        Tile(16, 64, 4, 6),
        Tile(16, 64, 4, 12),
        Tile(16, 128, 4, 5),
        Tile(32, 64, 4, 6),
        Tile(32, 128, 4, 6),
        Tile(64, 64, 4, 5),
        Tile(64, 64, 4, 10),
        Tile(64, 128, 4, 4),
        Tile(64, 128, 8, 4),
        Tile(64, 128, 8, 8),
        Tile(128, 64, 4, 4),
        Tile(128, 64, 8, 4),
        Tile(128, 64, 8, 8),
        Tile(128, 128, 8, 4),
        Tile(128, 128, 8, 6),
        Tile(128, 128, 4, 3),
        Tile(256, 64, 8, 4),
        Tile(256, 128, 8, 4),
    ],
    "plain": [
        Tile(64, 64, 4, 5, swapped=False),
        Tile(128, 128, 8, 4, swapped=False),
        Tile(128, 256, 8, 4, swapped=False),
    ],
    "hmma": [
        Tile(16, 64, 4, 6, swapped=False),
        Tile(32, 128, 4, 5, swapped=False),
    ],
}


def choose(kind: Kind, outputs: int, inputs: int, spans: int, rows: int, family: Family = "swapped") -> Tile:
    """Return the tile for `rows` rows of a layer with weight [outputs, inputs]: the measured one, or a guess."""
    bucket = min(max(FEWEST_ROWS, 1 << (rows - 1).bit_length()), MOST_ROWS)
    return _chosen(kind, outputs, inputs, spans, bucket, family)


@lru_cache(maxsize=4096)
def _chosen(kind: Kind, outputs: int, inputs: int, spans: int, rows: int, family: Family) -> Tile:
    tuned = _tuned().get(_key(kind, outputs, inputs, spans, rows)) if family == "swapped" else None
    guesses = [tuned] if tuned else [t for t in candidates(kind, inputs, spans, rows, family) if not t.one_loop]
    best = min(guesses, key=lambda tile: estimate(tile, outputs, inputs, spans, rows))
    return replace(best, stages=min(best.stages, shared_bytes() // _stage_bytes(best)))


def candidates(kind: Kind, inputs: int, spans: int, rows: int, family: Family = "swapped") -> list[Tile]:
    """Return the tiles worth measuring for `rows` rows of a layer with that many inputs."""
    sizes = [tile.rows for tile in _TILES[family]]
    found: list[Tile] = []
    for tile in _TILES[family]:
        if (rows <= 4 * tile.rows or 4 * tile.rows >= max(sizes)) and tile.rows < max(2 * rows, min(sizes) + 1):
            found += _divisions(tile, inputs) if kind == "int8" and spans == 1 else _spread(kind, tile, spans)
    if kind.startswith("4 bits"):
        in_registers = [tile for tile in found if not (tile.waits_in_memory or tile.one_loop)]
        found = [tile for tile in in_registers if tile.sums_per_thread(tile.groups) <= _MOST_SUMS_UNPACKING]
    return [tile for tile in found if rows <= _MOST_ROWS_IN_GROUPS or tile.groups <= (2 if tile.one_loop else 1)]


def write_tuned(table: dict[tuple[Kind, int, int, int, int], Tile]) -> str:
    """Return the text of tuned.json for a table by (kind, outputs, inputs, spans, rows)."""
    entries = {_key(*key): asdict(tile) for key, tile in sorted(table.items())}
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()) + "\n}\n"


@lru_cache(maxsize=1)
def shared_bytes() -> int:
    """Return how much of the GPU's fast memory a program may take; without a GPU, that of an H100."""
    if not torch.cuda.is_available():
        return 227 << 10
    return int(driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"])


def estimate(tile: Tile, outputs: int, inputs: int, spans: int, rows: int) -> float:
    """Return about how many microseconds a layer takes on an H200, fitted to measurements of one."""
    programs = -(-rows // tile.rows) * -(-outputs // tile.outputs) * tile.groups
    each = -(-programs // PROCESSORS)  # of a processor
    together = max(1, min(each, (227 << 10) // (_stage_bytes(tile) * tile.stages), 16 // tile.warps))
    area = tile.rows * tile.outputs
    multiplied, read = 2 * area * BLOCK_K / 5.6e6, _stage_bytes(tile) / 75e3  # by one processor, from the L2 cache
    block = max(multiplied, read, 1.3 / (tile.stages - 1) / together)
    here = spans if tile.waits_in_memory else spans // tile.groups
    folded = 1.3 / together * (1 if tile.one_loop else here) + (
        2.4e-4 * area * (spans // tile.held) if tile.waits_in_memory else 0
    )
    computed = each * (inputs / tile.groups / BLOCK_K * block + folded)
    merged = 2 + 8 * tile.groups * rows * outputs / 4.2e6 if tile.groups > 1 else 0
    return 2 + max(computed, 2 * outputs * inputs / 4.2e6) + merged


def _spread(kind: Kind, tile: Tile, spans: int) -> list[Tile]:
    """Return the ways to divide the spans of a tile between programs, the fewest programs first."""
    if spans == 1:
        return [tile]
    ways = [replace(tile, groups=g) for g in (1, 2, 4, 8) if g <= spans]
    ways += [replace(way, one_loop=True) for way in ways if way.groups < spans]
    in_registers = [way for way in ways if _fits(kind, way, spans)]
    if in_registers and in_registers[0].groups == 1:
        return in_registers
    programs = PROCESSORS * 8 // tile.warps
    in_memory = [
        replace(tile, waits_in_memory=True, held=held, programs=programs)
        for held in (4, 2, 1)
        if spans % held == 0 and (held == 1 or tile.warps == 8)  # with fewer warps, registers are spilled
    ]
    return [way for way in in_memory if _fits(kind, way, spans)][:1] + in_registers


def _fits(kind: Kind, tile: Tile, spans: int) -> bool:
    """Return whether a thread has registers for the sums of a tile."""
    sums = tile.sums_per_thread(spans)
    if kind == "int8":
        return sums + tile.sums_of_a_span <= _MOST_SUMS_OF_INT8
    return sums <= (_MOST_IN_ONE_LOOP if tile.one_loop else _MOST_SUMS)


def _divisions(tile: Tile, inputs: int) -> list[Tile]:
    """Return the ways to divide the one span between programs where sums are exact, the fewest programs first."""
    return [replace(tile, groups=g) for g in (1, 2, 4, 8) if g == 1 or (inputs % (128 * g) == 0 and tile.rows <= 64)]


def _stage_bytes(tile: Tile) -> int:
    return (tile.rows + tile.outputs) * BLOCK_K * 2


def _key(kind: Kind, outputs: int, inputs: int, spans: int, rows: int) -> str:
    return f"{kind} {outputs}x{inputs}/{spans} {rows}"


@lru_cache(maxsize=1)
def _tuned() -> dict[str, Tile]:
    """Return the measured tiles in tuned.json, which benchmarks/gpu.py writes."""
    file = files(__package__) / "tuned.json"
    return {key: Tile(**value) for key, value in json.loads(file.read_text()).items()} if file.is_file() else {}
