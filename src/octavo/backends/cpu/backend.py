"""The cpu backend: the decoder, recorded once into a native program that runs each step in one call."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np

from octavo.backends.base import ComputesAtOnce, Footprint, Progress, StepBatch, StepResult
from octavo.errors import ConfigError, OutOfMemory
from octavo.machine import available_memory
from octavo.model.decoder import describe
from octavo.model.shard import Shard
from octavo.model.spans import ORDER
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter

from ._native import Program
from .calibration import measure_importances
from .program import Place, choose_isa, kernels_build, new_program, pack
from .recorder import Recorder


class CpuBackend(ComputesAtOnce):
    """A Backend (see backends.base) that runs a native program."""

    def __init__(self, spec: DecoderSpec, program: Program, page_size: int, isa: str, arithmetic: str):
        self.spec, self.page_size, self.isa, self.arithmetic = spec, page_size, isa, arithmetic
        self.page_bytes, self.weight_bytes = program.page_bytes, program.weight_bytes
        self.footprint = Footprint(isa, program.weight_bytes, program.page_bytes)
        # For the weights of the layers, and those of the head: bytes that a step reads, and the share of integers.
        self.layer_bytes, self.layer_integers = program.layers
        self.head_bytes, self.head_integers = program.head
        self._program: Program | None = program

    def allocate_kv(self, num_pages: int) -> None:
        available = available_memory()
        if num_pages * self.page_bytes > available:
            raise OutOfMemory(
                f"{num_pages} KV pages need {num_pages * self.page_bytes / 2**30:.1f} GiB and "
                f"{available / 2**30:.1f} GiB are free: at most {available // self.page_bytes} pages fit; "
                "lower kv_cache_memory"
            )
        self._running.allocate_kv(num_pages)

    def export_page(self, page: int) -> np.ndarray:
        return self._running.export_page(page)

    def import_page(self, page: int, content: np.ndarray) -> None:
        self._running.import_page(page, content)

    def copy_page(self, source: int, target: int) -> None:
        self._running.copy_page(source, target)

    def step(self, batch: StepBatch) -> StepResult:
        return StepResult(*self._running.step(batch))

    def logits(self, batch: StepBatch) -> np.ndarray:
        logits: np.ndarray = self._running.logits(batch)
        return logits

    def close(self) -> None:
        self._program = None

    def follow(self) -> None:
        """Run this rank's part of every step of rank 0, until the ranks are stopped."""
        self._running.follow()

    def ceilings(self) -> tuple[float, float, float]:
        """Measure the machine's roofline with these threads and kernels. Takes half a second.

        Returns bytes read from memory per second, and operations per second of bf16 and of int8 dot products, where a
        multiplication and an addition count as two operations.
        """
        return self._running.ceilings()

    def profile(self, on: bool) -> None:
        """Start measuring the time of each op, from zero, or stop."""
        self._running.profile(on)

    def times(self) -> dict[str, float]:
        """Return seconds by kind of op since profile(True); "head" is the linear that computes the logits."""
        return self._running.times()

    def sampling_seconds(self) -> float:
        """Return the seconds spent on sampling so far."""
        return self._running.sampling_seconds()

    @property
    def _running(self) -> Program:
        assert self._program is not None, "the backend is closed"
        return self._program


def load(
    spec: DecoderSpec,
    parameters: Mapping[str, Parameter],
    *,
    page_size: int,
    max_batch_tokens: int,
    max_batch_size: int,
    max_model_len: int,
    threads: int,
    dtype: str,
    quantization: str,
    device: str,
    progress: Progress,
    kv_cache_dtype: str = "bf16",
) -> CpuBackend:
    """Pack the weights and compile the decoder: a BackendFactory (see backends.base).

    The environment variable OCTAVO_ISA (amx, avx512, avx2 or portable) overrides the choice of kernels.

    Args:
        dtype: auto or bfloat16.
        quantization: none: all weights in bfloat16. auto: 8-bit or 4-bit integers where the checkpoint stores them,
            bfloat16 elsewhere. 8bit, 4bit: weights with more bits are quantized when they are packed. With 4bit, the
            weights for which model.decoder.needs_8_bits is true keep 8 bits, and errors are weighted by each column's
            importance (calibration.py).
        kv_cache_dtype: bf16; or int8, with a scale for each K and each V of a position and kv head.

    Raises:
        ConfigError: a setting is not one of the above.
        OutOfMemory: the weights, or a step, need more memory than is free.
        UnsupportedModel: the model's shape is not supported.
    """
    return load_shard(
        Shard(spec),
        parameters,
        page_size=page_size,
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        threads=threads,
        dtype=dtype,
        quantization=quantization,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        progress=progress,
    )


def load_shard(
    shard: Shard,
    parameters: Mapping[str, Parameter],
    place: Place = Place(),  # noqa: B008 (immutable)
    *,
    progress: Progress,
    **settings: Any,
) -> CpuBackend:
    """Return the backend of a part of a model. If it is one of several, load them all at the same time.

    Args:
        parameters: those of the whole model.
        settings: the other arguments of `load`.
    """
    quantization, kv_cache_dtype = settings["quantization"], settings["kv_cache_dtype"]
    own = shard.parameters(parameters)
    isa, program, handles = _compile(shard, own, place, **settings)
    importances: Iterable[tuple[str, np.ndarray]] = ()
    if quantization == "4bit":
        importances = measure_importances(shard.whole, parameters, settings["threads"], shard.rank, shard.size, place)
    _pack_all(program, handles, own, importances, progress)
    arithmetic = f"cpu {kernels_build()} {isa} {quantization} {kv_cache_dtype} {ORDER}"
    return CpuBackend(shard.whole, program, settings["page_size"], isa, arithmetic)


def footprint(
    spec: DecoderSpec, parameters: Mapping[str, Parameter], ranks: int = 1, nodes: int = 1, **settings: Any
) -> Footprint:
    """Return the footprint of the backend that `load` would return. Reads no weights and touches no memory for them.

    Args:
        ranks: the processes over which the model is divided.
        nodes: the machines over which the ranks are divided; the footprint is that of the first one.
        settings: the other arguments of `load`, without `progress`.

    Raises ConfigError, OutOfMemory, UnsupportedModel.
    """
    weights = pages = 0
    for rank in range(ranks // nodes):
        shard = Shard(spec, rank, ranks)
        isa, program, _ = _compile(shard, shard.parameters(parameters), Place(), **settings)
        weights, pages = weights + program.weight_bytes, pages + program.page_bytes
    return Footprint(isa, weights, pages)


def _compile(
    shard: Shard,
    parameters: Mapping[str, Parameter],
    place: Place,
    *,
    page_size: int,
    max_batch_tokens: int,
    max_batch_size: int,
    max_model_len: int,
    threads: int,
    dtype: str,
    quantization: str,
    device: str,
    kv_cache_dtype: str,
) -> tuple[str, Program, Mapping[str, int]]:
    """Return the instruction set, the decoder as a program without weights, and the handles of its weights by name.

    Args:
        parameters: those of the shard.

    Raises ConfigError, OutOfMemory, UnsupportedModel.
    """
    if dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"the cpu backend computes in bfloat16, not {dtype}; use dtype auto or backend torch")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"the cpu backend runs on device cpu, not {device}; use device auto or backend cuda")
    isa = choose_isa()
    program = new_program(
        shard,
        isa,
        place.of_threads(threads),
        page_size=page_size,
        max_rows=max_batch_tokens,
        max_sampled=max_batch_size,
        int8_kv=kv_cache_dtype == "int8",
        group=place.steps,
        kv=place.kv,
        lines=place.lines,
    )
    recorder = Recorder(shard, program, parameters, quantization)
    try:
        program.finish(describe(shard.spec, recorder))
    except MemoryError:
        message = f"there is not enough memory for steps of {max_batch_tokens} tokens; use a smaller max_batch_tokens"
        raise OutOfMemory(message) from None
    if program.weight_bytes > (available := available_memory()):
        raise OutOfMemory(
            f"the weights need {program.weight_bytes / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; "
            "use a smaller model, or quantization 4bit"
        )
    return isa, program, recorder.weights


def _pack_all(
    program: Program,
    weights: Mapping[str, int],
    parameters: Mapping[str, Parameter],
    importances: Iterable[tuple[str, np.ndarray]],
    progress: Progress,
) -> None:
    """Pack all weights: first those with measured importances, as they arrive, then the others."""
    total = sum(parameters[name].nbytes for name in weights)
    done, left = 0, dict(weights)
    for name, importance in chain(importances, ((name, None) for name in weights)):
        if name not in left:
            continue
        pack(program, left.pop(name), parameters[name], importance)
        for part in parameters[name].parts:
            part.release()
        done += parameters[name].nbytes
        progress(done, total)
