"""Part c: the speed of each kernel against the machine's limits, and a sweep over tiles that writes tuned.json."""

import argparse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from octavo.backends.base import SamplingBatch
from octavo.backends.cuda.kernels.attention import attention
from octavo.backends.cuda.kernels.configurations import Kind, Tile, candidates, choose, write_tuned
from octavo.backends.cuda.kernels.sampler import sample
from octavo.backends.cuda.ops import spans_of
from octavo.model.spec import DecoderSpec

from .equality import computed
from .report import Report
from .shapes import LLAMA_8B, MODELS, backend, decode_step, random_weights, shortened, step
from .timing import copy_bandwidth, device_seconds, matmul_peak

DECODE, PREFILL = (1, 8, 64, 256), (512, 8192)
SWEPT = (1, 32, 64, 128, 256, 512, 4096)  # rows, each the largest of a bucket of configurations.py
L2 = 256 << 20  # bytes that push everything out of the cache
Layer = tuple[Kind, int, int, int]


def run(report: Report, options: argparse.Namespace) -> None:
    bandwidth, peak = limits(report)
    for name, spec in MODELS.items():
        if name not in options.models:
            continue
        for kind, layer in layers(spec).items():
            with report.attempt(f"{name} {kind}"):
                layer_speed(report, f"{name} {kind}", layer, bandwidth, peak)
    with report.attempt("attention"):
        attention_speed(report, bandwidth, peak)
    with report.attempt("sampler"):
        sampler_speed(report)
    with report.attempt("sweep"):
        (options.out / "tuned.json").write_text(write_tuned(sweep(report, options)))


def limits(report: Report) -> tuple[float, float]:
    """Measure and report the machine's bytes and operations per second."""
    bandwidth, peak = copy_bandwidth(), matmul_peak()
    report.add("copy, read and written", f"{bandwidth / 1e12:.2f} TB/s", bandwidth)
    report.add("cuBLAS, bfloat16 8192 x 8192", f"{peak / 1e12:.0f} TFLOP/s", peak)
    return bandwidth, peak


def layers(spec: DecoderSpec) -> dict[str, Layer]:
    """Return the linear layers of a model."""
    spans = spans_of(spec)
    hidden = spec.hidden_size
    return {
        "qkv": ("linear", spec.qkv_size, hidden, 1),
        "out": ("linear", hidden, spec.q_size, spans["out"]),
        "gate_up": ("gated", 2 * spec.intermediate_size, hidden, 1),
        "down": ("linear", hidden, spec.intermediate_size, spans["down"]),
        "head": ("linear", spec.vocab_size, hidden, 1),
    }


def layer_speed(report: Report, name: str, layer: Layer, bandwidth: float, peak: float) -> None:
    kind, outputs, inputs, spans = layer
    weights = copies(outputs, inputs)
    for rows in DECODE + PREFILL:
        if kind == "linear" and outputs > 100_000 and rows > 512:
            continue  # only sampled rows have logits
        seconds = layer_seconds(kind, weights, rows, spans, None)
        read, work = weights[0].nbytes / seconds, 2 * rows * outputs * inputs / seconds
        tile = choose(kind, outputs, inputs, spans, rows)
        value = f"{seconds * 1e6:8.1f} us  {read / bandwidth:4.0%} of bandwidth  {work / peak:4.0%} of matmul  {brief(tile)}"
        report.add(f"{name}, {rows} rows", value, seconds)


def brief(tile: Tile) -> str:
    kind = "memory" if tile.waits_in_memory else f"{tile.groups} groups"
    return f"[{tile.rows}x{tile.outputs} {tile.warps}w {tile.stages}s {kind}]"


def copies(outputs: int, inputs: int) -> list[torch.Tensor]:
    """Return as many weights as the L2 cache cannot hold."""
    count = min(16, -(-L2 // (2 * outputs * inputs)) + 1)
    return [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") for _ in range(count)]


def layer_seconds(kind: Kind, weights: list[torch.Tensor], rows: int, spans: int, tile: Tile | None) -> float:
    x = torch.randn(rows, weights[0].shape[1], device="cuda").bfloat16()
    return device_seconds([lambda w=w: computed(kind, x, w, spans, tile) for w in weights])


def attention_speed(report: Report, bandwidth: float, peak: float) -> None:
    """Measure attention of one layer in Llama-3.1-8B's shapes: decode at 1k context, and a prompt."""
    spec = shortened(LLAMA_8B, 4)
    small = replace(spec, vocab_size=1024, intermediate_size=1024)
    made = backend(small, random_weights(small), 256 * 33, batch_tokens=8192, batch_size=256, model_len=16384)
    made._kv.pool.values.normal_()
    for sequences, context in ((1, 1024), (1, 16000), (8, 1024), (64, 1024), (256, 1024)):
        inputs = made._inputs.send(decode_step(sequences, context - 1))
        q = torch.randn(sequences, spec.num_heads, spec.head_dim, device="cuda").bfloat16()
        out = torch.empty(sequences, spec.q_size, device="cuda", dtype=torch.bfloat16)

        def call(layer: int, inputs: object = inputs, q: torch.Tensor = q, out: torch.Tensor = out) -> None:
            attention(q, made._kv.pool, inputs.rows, inputs.work, inputs.parts, layer, 0, out)  # type: ignore[attr-defined]

        seconds = device_seconds([lambda layer=layer: call(layer) for layer in range(4)])
        read = 4 * sequences * context * spec.kv_size / seconds
        report.add(
            f"attention, decode {sequences} x {context}",
            f"{seconds * 1e6:8.1f} us  {read / bandwidth:4.0%} of bandwidth",
            seconds,
        )
    for rows in PREFILL:
        inputs = made._inputs.send(step([([1] * rows, 0, list(range(rows // 32)))], [0]))
        q = torch.randn(rows, spec.num_heads, spec.head_dim, device="cuda").bfloat16()
        out = torch.empty(rows, spec.q_size, device="cuda", dtype=torch.bfloat16)
        seconds = device_seconds(
            [lambda: attention(q, made._kv.pool, inputs.rows, inputs.work, inputs.parts, 0, 0, out)] * 2
        )
        work = 2 * rows * rows * spec.q_size / seconds
        report.add(f"attention, prompt of {rows}", f"{seconds * 1e6:8.1f} us  {work / peak:4.0%} of matmul", seconds)
    made.close()


def sampler_speed(report: Report) -> None:
    """Measure the sampler over Llama-3.1-8B's vocabulary."""
    kinds = {
        "greedy": {},
        "temperature": {"temperature": 1.0},
        "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
        "top_k 50, top_p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    }
    from octavo.backends.cuda.inputs import Inputs

    device = torch.device("cuda", torch.cuda.current_device())
    inputs = Inputs(LLAMA_8B, 32, 1024, 256, 256, device)
    for rows in (1, 64, 256):
        logits = torch.randn(rows, LLAMA_8B.vocab_size, device="cuda") * 3
        for name, values in kinds.items():
            greedy = SamplingBatch.greedy(rows)
            batch = replace(greedy, **{key: getattr(greedy, key) * 0 + value for key, value in values.items()})
            sent = inputs.send(replace(decode_step(rows, 5), sampling=batch)).sampling
            seconds = device_seconds([lambda: sample(logits, sent, batch)] * 3)
            report.add(f"sampler, {name}, {rows} rows", f"{seconds * 1e6:8.1f} us", seconds)


def sweep(report: Report, options: argparse.Namespace) -> dict[tuple[Kind, int, int, int, int], Tile]:
    """Measure the candidates of every layer and number of rows while time is left. Returns the best tiles."""
    table: dict[tuple[Kind, int, int, int, int], Tile] = {}
    chosen = [(name, kind, layer) for name in options.models.split(",") for kind, layer in layers(MODELS[name]).items()]
    for name, part, (kind, outputs, inputs, spans) in reversed(chosen):
        weights = copies(outputs, inputs)
        for rows in SWEPT:
            if outputs > 100_000 and rows > 256:
                continue
            if report.seconds_left < 12:
                report.add("sweep", f"stopped by the time limit before {name} {part}, {rows} rows", None, None)
                return table
            tiles = candidates(outputs, spans, rows)
            compile_all(kind, weights[0], spans, rows, tiles)
            usual = layer_seconds(kind, weights, rows, spans, None)
            timed = [(seconds, tile) for seconds, tile in measured(kind, weights, rows, spans, tiles)]
            if not timed:
                continue
            seconds, tile = min(timed, key=lambda pair: pair[0])
            if seconds < 0.98 * usual:
                table[kind, outputs, inputs, spans, max(16, rows)] = tile
            value = f"{usual * 1e6:8.1f} -> {seconds * 1e6:8.1f} us of {len(timed)}  {brief(tile)}"
            report.add(f"tuned {name} {part}, {rows} rows", value, seconds)
    return table


def compile_all(kind: Kind, weight: torch.Tensor, spans: int, rows: int, tiles: list[Tile]) -> None:
    """Compile the kernels of all tiles, on all processors."""
    x = torch.randn(rows, weight.shape[1], device="cuda").bfloat16()

    def attempt(tile: Tile) -> None:
        try:
            computed(kind, x, weight, spans, tile)
        except Exception:
            return  # measured() fails again

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(attempt, tiles))
    torch.cuda.synchronize()


def measured(
    kind: Kind, weights: list[torch.Tensor], rows: int, spans: int, tiles: Iterable[Tile]
) -> Iterable[tuple[float, Tile]]:
    """Yield the time of each tile that runs."""
    for tile in tiles:
        try:
            yield layer_seconds(kind, weights, rows, spans, tile), tile
        except Exception as error:
            print(f"  {tile}: {str(error)[:150]}", flush=True)
