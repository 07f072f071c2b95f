"""Part d: whole models of random weights: decode, prefill, the host's time per step; and real text in 4 bits."""

import argparse
import statistics
import time

import torch

from octavo.backends.base import StepBatch
from octavo.backends.cuda.backend import CudaBackend
from octavo.backends.cuda.weights import head_of, nbytes
from octavo.model.registry import parameter_shapes
from octavo.model.spec import DecoderSpec

from .report import Report
from .shapes import MODELS, PAGE_SIZE, backend, decode_step, random_weights, step
from .timing import copy_bandwidth, matmul_peak

CONTEXT, STEPS = 1024, 24
DECODE = {1: 0.75, 8: None, 64: 0.70, 256: 0.70}  # sequences, and the share of the memory's limit that is wanted
PREFILL = {512: None, 8192: 0.60}  # tokens, and the share of the matmul peak that is wanted


def run(report: Report, options: argparse.Namespace) -> None:
    bandwidth, peak = copy_bandwidth(), matmul_peak()
    names = [name for name in MODELS if name in options.models]
    for name in sorted(names, key=lambda name: MODELS[name].hidden_size):
        for recipe in ("bf16", "8bit", "4bit"):
            with report.attempt(f"{name} {recipe}"):
                model(report, name, MODELS[name], bandwidth, peak, recipe)
            torch.cuda.empty_cache()
    with report.attempt("real text in 4 bits"):
        from . import text  # needs packages that the rest does not

        text.run(report, options)


def model(report: Report, model: str, spec: DecoderSpec, bandwidth: float, peak: float, recipe: str) -> None:
    name, plain = f"{model} {recipe}", recipe == "bf16"
    started = time.monotonic()
    pages = 256 * ((CONTEXT + STEPS + 8) // PAGE_SIZE + 1)
    weights = random_weights(spec, recipe=recipe)
    made = backend(spec, weights, pages, batch_tokens=8192, batch_size=256, model_len=16384, warm_up=True)
    torch.cuda.synchronize()
    held, steps = torch.cuda.memory_allocated() / 2**30, made.footprint.step_bytes / 2**30
    ready = f"{time.monotonic() - started:.1f} s, {held:.1f} GiB; steps take {steps:.1f} GiB"
    report.add(f"{name}: weights and kernels ready", ready)
    made._kv.pool.values.normal_()
    torch.cuda.synchronize()
    for sequences, wanted in DECODE.items():
        wanted = wanted if plain else None
        with report.attempt(f"{name}, decode {sequences}"):
            decode(report, name, made, sequences, wanted if spec.hidden_size > 2048 else None, bandwidth)
    for tokens, wanted in PREFILL.items():
        with report.attempt(f"{name}, prefill {tokens}"):
            prefill(report, name, made, tokens, wanted if spec.hidden_size > 2048 else None, peak)
    made.close()


def decode(
    report: Report, name: str, made: CudaBackend, sequences: int, wanted: float | None, bandwidth: float
) -> None:
    """Report tokens per second with a step launched before the last one's tokens are read, and with none."""
    batches = [decode_step(sequences, CONTEXT + i) for i in range(STEPS)]
    made.step(batches[0])
    walls, hosts, devices = [], [], []
    for batch in batches:
        wall, host, device = timed(made, batch)
        walls.append(wall)
        hosts.append(host)
        devices.append(device)
    overlapped = overlapped_seconds(made, batches)
    wall, host, device = (statistics.median(times) for times in (walls, hosts, devices))
    limit = bytes_read(made, sequences) / bandwidth
    share = limit / overlapped
    what = f"{name}, decode {sequences} x {CONTEXT}"
    report.add(
        what,
        f"{sequences / overlapped:9,.0f} tok/s  {overlapped * 1e3:7.3f} ms  {share:4.0%} of bandwidth",
        sequences / overlapped,
        None if wanted is None else share >= wanted,
    )
    report.add(
        f"{what}: in turn",
        f"{sequences / wall:9,.0f} tok/s  {wall * 1e3:7.3f} ms  "
        f"device {device * 1e3:.3f}, host's launch {host * 1e3:.3f} ms",
        wall,
    )
    hidden = device / overlapped
    report.add(f"{what}: share of the device's own time", f"{hidden:4.0%}", hidden, hidden >= 0.97)


def timed(made: CudaBackend, batch: StepBatch) -> tuple[float, float, float]:
    """Return seconds of a step, of the host until it is launched, and of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun = time.perf_counter()
    start.record(made._stream)
    pending = made.launch(batch)
    end.record(made._stream)
    launched = time.perf_counter()
    pending.result()
    ended = time.perf_counter()
    end.synchronize()
    return ended - begun, launched - begun, start.elapsed_time(end) / 1e3


def overlapped_seconds(made: CudaBackend, batches: list[StepBatch]) -> float:
    """Return seconds per step where each is launched before the result of the one before is read."""
    begun = time.perf_counter()
    pending = made.launch(batches[0])
    for batch in batches[1:]:
        following = made.launch(batch)
        pending.result()
        pending = following
    pending.result()
    return (time.perf_counter() - begun) / len(batches)


def bytes_read(made: CudaBackend, sequences: int) -> float:
    """Return the bytes of weights, keys and values that a decode step has to read."""
    weights = made._model.weights
    embedding_is_head = made.spec.tied_embeddings and head_of("embed") not in weights
    read = sum(nbytes(weight) for name, weight in weights.items() if name != "embed" or embedding_is_head)
    return read + sequences * CONTEXT * made.page_bytes / PAGE_SIZE


def prefill(report: Report, name: str, made: CudaBackend, tokens: int, wanted: float | None, peak: float) -> None:
    spec = made.spec
    batch = step([([5] * tokens, 0, list(range(tokens // PAGE_SIZE)))], [tokens - 1])
    made.step(batch)
    times = [timed(made, batch) for _ in range(3 if tokens > 1000 else 8)]
    wall, host, device = (statistics.median(values) for values in zip(*times, strict=True))
    shapes = parameter_shapes(spec)
    matrices = sum(
        sum(part[0] for part in parts) * parts[0][1]
        for key, parts in shapes.items()
        if len(parts[0]) == 2 and key not in ("embed", "head")
    )
    work = 2 * matrices * tokens + 2 * tokens**2 * spec.q_size * spec.num_layers
    share = work / wall / peak
    report.add(
        f"{name}, prefill {tokens}",
        f"{tokens / wall:9,.0f} tok/s  {wall * 1e3:7.2f} ms  {share:4.0%} of matmul; device {device * 1e3:.2f}, "
        f"host's launch {host * 1e3:.2f} ms",
        tokens / wall,
        None if wanted is None else share >= wanted,
    )
