"""Create a native program for a model, and pack weights into it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_hexdigest

from octavo.errors import ConfigError, UnsupportedModel
from octavo.model.shard import Shard
from octavo.weights.tensor import Parameter, not_finite

from . import _native
from ._native import Program, available_isas


@dataclass(frozen=True)
class Place:
    """Where a rank of a model runs.

    Attributes:
        steps: a file descriptor of the memory in which ranks exchange what they compute in a step; -1: memory of this
            process.
        calibration: the same, for what they exchange while they measure importances (calibration.py).
        kv: the same, for the KV pool of this rank.
        lines: if the ranks are on several nodes (machines), a socket to each other node. -1 for the own one, and for
            all in a rank that is not its node's first.
        processors: those of its threads; empty: all that this process may use.
    """

    steps: int = -1
    calibration: int = -1
    kv: int = -1
    lines: tuple[int, ...] = ()
    processors: frozenset[int] = frozenset()

    def of_threads(self, threads: int) -> list[list[int]]:
        """Return the processors that each thread may run on; [] for any.

        A thread has a single one only if there is a thread for every processor. With fewer threads, two engines would
        choose the same processors.
        """
        processors = sorted(self.processors or os.sched_getaffinity(0))
        if threads >= len(processors):
            return [[processor] for processor in processors]
        return [sorted(self.processors)] * threads


def new_program(
    shard: Shard,
    isa: str,
    processors: Sequence[Sequence[int]],
    *,
    page_size: int,
    max_rows: int,
    max_sampled: int,
    int8_kv: bool = False,
    group: int = -1,
    kv: int = -1,
    lines: Sequence[int] = (),
) -> Program:
    """Return an empty program, ready for recording. Raises UnsupportedModel.

    Args:
        processors: those of each thread, as Place.of_threads returns them.
        group, kv, lines: file descriptors of what ranks share (see Place).
    """
    spec = shard.spec
    if spec.head_dim % 16:
        raise UnsupportedModel(f"the cpu backend needs a head_dim that is a multiple of 16, not {spec.head_dim}")
    return Program(
        isa=isa,
        processors=processors,
        vocab=spec.vocab_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        layers=spec.num_layers,
        norm_eps=spec.norm_eps,
        page_size=page_size,
        max_rows=max_rows,
        max_sampled=max_sampled,
        frequencies=spec.rope.frequencies(spec.head_dim).tolist(),
        int8_kv=int8_kv,
        rank=shard.rank,
        ranks=shard.size,
        group=group,
        kv=kv,
        lines=list(lines),
    )


def pack(program: Program, handle: int, parameter: Parameter, importance: np.ndarray | None = None) -> None:
    """Write a weight into the program. Raises DamagedWeights if a value is NaN or infinite.

    Args:
        importance: float32 [columns], the weight of squared errors in each column, for weights rounded to 4 bits.
    """
    parts = []
    for part in parameter.parts:
        order = None if part.row_order is None else np.ascontiguousarray(part.row_order, np.int64)
        parts.append((part.data, part.format, order, part.first_column))
    rows, columns = parameter.shape
    damaged = program.pack(handle, parts, rows, columns, importance)
    if damaged >= 0:
        raise not_finite(parameter.parts[damaged].name)


def choose_isa() -> str:
    """Return the instruction set that OCTAVO_ISA names, or else the best available one. Raises ConfigError."""
    available = available_isas()
    wanted = os.environ.get("OCTAVO_ISA", available[0])
    if wanted not in available:
        raise ConfigError(f"OCTAVO_ISA must be one of {', '.join(available)} on this machine, not {wanted!r}")
    return wanted


def kernels_build() -> str:
    """Return a hash of the native kernels: those of another build may round differently."""
    return xxh3_64_hexdigest(Path(_native.__file__).read_bytes())
