"""The cpu backend: describe() recorded once into a native program, which runs each step in one call."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from octavo.backends.base import Progress, StepBatch, StepResult
from octavo.errors import ConfigError, OutOfMemory, UnsupportedModel
from octavo.memory import available_memory
from octavo.model.decoder import describe
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter

from ._native import Program, available_isas
from .recorder import Recorder


class CpuBackend:
    """A Backend (see backends.base) over a native program."""

    def __init__(self, spec: DecoderSpec, program: Program, page_size: int, isa: str):
        self.spec, self.page_size, self.isa = spec, page_size, isa
        self.page_bytes, self.weight_bytes = program.page_bytes, program.weight_bytes
        self.layer_bytes, self.head_bytes = program.linear_bytes  # of the weights: what a step reads
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

    def step(self, batch: StepBatch) -> StepResult:
        return StepResult(*self._running.step(batch))

    def logits(self, batch: StepBatch) -> np.ndarray:
        logits: np.ndarray = self._running.logits(batch)
        return logits

    def close(self) -> None:
        self._program = None

    def ceilings(self) -> tuple[float, float]:
        """Measure what the machine can do at best with these threads and kernels, in half a second.

        Bytes read from memory per second, and operations of bf16 dot products per second.
        """
        return self._running.ceilings()

    def profile(self, on: bool) -> None:
        """Start to measure, from zero, or stop."""
        self._running.profile(on)

    def times(self) -> dict[str, float]:
        """Seconds by kind of op since profile(True); "head" is the linear that gives the logits."""
        return self._running.times()

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
    """A BackendFactory. `dtype` is auto or bfloat16. OCTAVO_ISA=amx|avx512|avx2|portable picks the kernels.

    `quantization` auto: integers of 8 or 4 bits where the checkpoint has them, bfloat16 elsewhere; none: bfloat16;
    8bit, 4bit: what has not so many bits is quantised as it is packed, to 4 bits all but the embedding and the head.
    `kv_cache_dtype` bf16; or int8, with a scale for each token's K and V of each head.

    Raises ConfigError, OutOfMemory or UnsupportedModel.
    """
    if dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"the cpu backend computes in bfloat16, not {dtype}; use dtype auto or backend torch")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"the cpu backend runs on device cpu, not {device}; use device auto or backend torch")
    if spec.head_dim % 16:
        raise UnsupportedModel(f"the cpu backend needs a head_dim that is a multiple of 16, not {spec.head_dim}")
    isa = _choose_isa()
    program = Program(
        isa=isa,
        cores=_choose_cores(threads),
        vocab=spec.vocab_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        layers=spec.num_layers,
        norm_eps=spec.norm_eps,
        page_size=page_size,
        max_rows=max_batch_tokens,
        max_sampled=max_batch_size,
        frequencies=spec.rope.frequencies(spec.head_dim).tolist(),
        int8_kv=kv_cache_dtype == "int8",
    )
    recorder = Recorder(program, parameters, quantization)
    program.finish(describe(spec, recorder))
    if program.weight_bytes > (available := available_memory()):
        raise OutOfMemory(
            f"the weights need {program.weight_bytes / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; "
            "use a smaller model, or quantization 4bit"
        )
    _pack(program, [(parameters[name], handle) for name, handle in recorder.weights.items()], progress)
    return CpuBackend(spec, program, page_size, isa)


def _pack(program: Program, weights: list[tuple[Parameter, int]], progress: Progress) -> None:
    total = sum(part.nbytes for parameter, _ in weights for part in parameter.parts)
    done = 0
    for parameter, handle in weights:
        parts = []
        for part in parameter.parts:
            order = None if part.row_order is None else np.ascontiguousarray(part.row_order, np.int64)
            parts.append((part.data, part.format, order))
        rows, columns = parameter.shape
        program.pack(handle, parts, rows, columns)
        for part in parameter.parts:
            part.release()
            done += part.nbytes
        progress(done, total)


def _choose_isa() -> str:
    available = available_isas()
    wanted = os.environ.get("OCTAVO_ISA", available[0])
    if wanted not in available:
        raise ConfigError(f"OCTAVO_ISA must be one of {', '.join(available)} on this machine, not {wanted!r}")
    return wanted


def _choose_cores(threads: int) -> list[int]:
    """So many of the processors this process may use: of each core one, before any core's second one."""

    def turn(processor: int) -> tuple[int, int]:
        topology = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        siblings = topology.read_text().strip().replace("-", ",").split(",") if topology.exists() else []
        return (siblings.index(str(processor)) if str(processor) in siblings else 0, processor)

    return sorted(os.sched_getaffinity(0), key=turn)[:threads]
