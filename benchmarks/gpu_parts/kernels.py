"""Part c: the speed of each kernel against the machine's limits, and a sweep over tiles that writes tuned.json."""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from octavo.backends.base import SamplingBatch
from octavo.backends.cuda.graph_shapes import GraphShapes
from octavo.backends.cuda.inputs import Inputs, StepInputs
from octavo.backends.cuda.kernels.attention import attention
from octavo.backends.cuda.kernels.configurations import Kind, Tile, choose, write_tuned
from octavo.backends.cuda.kernels.sampler import sample

from . import linear_tiles
from .linear_tiles import Layer, seconds, tune, weights_of
from .report import Report
from .shapes import LLAMA_8B, backend, decode_step, random_weights, shortened, step
from .timing import copy_bandwidth, device_seconds, matmul_peak

DECODE, PREFILL = (1, 8, 64, 256), (512, 8192)
LAYERS = {"Llama-3.1-8B": linear_tiles.LLAMA_8B, "Qwen3-0.6B": linear_tiles.QWEN3_06B}


def run(report: Report, options: argparse.Namespace) -> None:
    bandwidth, peak = limits(report)
    chosen = [(name, layers) for name, layers in LAYERS.items() if name in options.models]
    for name, layers in chosen:
        for layer in layers:
            with report.attempt(f"{name} {layer.name}"):
                layer_speed(report, name, layer, bandwidth, peak)
    with report.attempt("attention"):
        attention_speed(report, bandwidth, peak)
    with report.attempt("sampler"):
        sampler_speed(report)
    with report.attempt("sweep"):
        sweep(report, chosen, options.out)


def limits(report: Report) -> tuple[float, float]:
    """Measure and report the machine's bytes and operations per second."""
    bandwidth, peak = copy_bandwidth(), matmul_peak()
    report.add("copy, read and written", f"{bandwidth / 1e12:.2f} TB/s", bandwidth)
    report.add("cuBLAS, bfloat16 8192 x 8192", f"{peak / 1e12:.0f} TFLOP/s", peak)
    return bandwidth, peak


def layer_speed(report: Report, model: str, layer: Layer, bandwidth: float, peak: float) -> None:
    weights = weights_of(layer)
    for rows in DECODE + PREFILL:
        if layer.name == "head" and rows > 512:
            continue  # only sampled rows have logits
        took = seconds(layer, rows, None, weights)
        read, work = layer.weight_bytes / took, 2 * rows * layer.outputs * layer.inputs / took
        tile = choose(layer.kind, layer.outputs, layer.inputs, layer.spans, rows)
        groups = "memory" if tile.waits_in_memory else f"{tile.groups} groups"
        value = f"{took * 1e6:8.1f} us  {read / bandwidth:4.0%} of bandwidth  {work / peak:4.0%} of matmul"
        used = f"[{tile.rows}x{tile.outputs} {tile.warps}w {tile.stages}s {groups}]"
        report.add(f"{model} {layer.name}, {rows} rows", f"{value}  {used}", took)


def attention_speed(report: Report, bandwidth: float, peak: float) -> None:
    """Measure attention of one layer in Llama-3.1-8B's shapes: decode at 1k context, and a prompt."""
    spec = shortened(LLAMA_8B, 4)
    small = replace(spec, vocab_size=1024, intermediate_size=1024)
    made = backend(small, random_weights(small), 256 * 33, batch_tokens=8192, batch_size=256, model_len=16384)
    made._kv.pool.values.normal_()

    def report_one(what: str, inputs: StepInputs, limit: float) -> None:
        rows = len(inputs.tokens)
        q = torch.randn(rows, spec.num_heads, spec.head_dim, device="cuda").bfloat16()
        out = torch.empty(rows, spec.q_size, device="cuda", dtype=torch.bfloat16)
        arguments = (made._kv.pool, inputs.rows, inputs.work, inputs.parts)
        took = device_seconds([partial(attention, q, *arguments, layer, 0, out) for layer in range(4)])
        report.add(f"attention, {what}", f"{took * 1e6:8.1f} us  {limit / took:4.0%} of the limit", took)

    for sequences, context in ((1, 1024), (1, 16000), (8, 1024), (64, 1024), (256, 1024)):
        read = 4 * sequences * context * spec.kv_size
        report_one(
            f"decode {sequences} x {context}", made._inputs.send(decode_step(sequences, context - 1)), read / bandwidth
        )
    for rows in PREFILL:
        batch = step([([1] * rows, 0, list(range(rows // 32)))], [0])
        report_one(f"prompt of {rows}", made._inputs.send(batch), 2 * rows * rows * spec.q_size / peak)
    made.close()


def sampler_speed(report: Report) -> None:
    """Measure the sampler over Llama-3.1-8B's vocabulary."""
    kinds = {
        "greedy": {},
        "temperature": {"temperature": 1.0},
        "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
        "top_k 50, top_p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    }
    device = torch.zeros(0, device="cuda").device
    inputs = Inputs(LLAMA_8B, 32, 1024, GraphShapes(256, 256), device)
    for rows in (1, 64, 256):
        logits = torch.randn(rows, LLAMA_8B.vocab_size, device="cuda") * 3
        for name, values in kinds.items():
            greedy = SamplingBatch.greedy(rows)
            batch = replace(greedy, **{key: getattr(greedy, key) * 0 + value for key, value in values.items()})
            sent = inputs.send(replace(decode_step(rows, 5), sampling=batch)).sampling
            took = device_seconds([partial(sample, logits, sent, batch)] * 3)
            report.add(f"sampler, {name}, {rows} rows", f"{took * 1e6:8.1f} us", took)


def sweep(report: Report, chosen: list[tuple[str, tuple[Layer, ...]]], folder: Path) -> None:
    """Write the fastest tile of every layer and number of rows, as many as the time allows, to tuned.json."""
    table: dict[tuple[Kind, int, int, int, int], Tile] = {}
    for number, (_, layers) in enumerate(chosen, 1):
        left = report.seconds_left - 8
        table |= tune(layers, time.monotonic() + left * number / len(chosen))
        (folder / "tuned.json").write_text(write_tuned(table))
    report.add("tuned.json", f"{len(table)} layers and numbers of rows", len(table))
