"""Part a: the same bits for any tile, chunk, batch, graph and page."""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.backends.cuda.backend import CudaBackend
from octavo.backends.cuda.kernels.four_bit_linear import unpack
from octavo.backends.cuda.kernels.four_bits import FourBits
from octavo.backends.cuda.weights import Weights
from octavo.weights.tensor import Parameter, Tensor

from . import attention_tiles, shapes
from .linear_tiles import FAMILIES, FOUR_BITS, LLAMA_8B, QWEN3_06B, Layer, disagreements, tiles_of
from .ranks_in_turns import RanksInTurns
from .report import Report
from .shapes import backend, random_weights, shortened, step

TOKENS = np.random.default_rng(0).integers(1, 1000, 1200).tolist()
PAGES = np.random.default_rng(1).permutation(60)[:38].tolist()  # of 32 tokens, for 1,200 of them


def run(report: Report, options: argparse.Namespace) -> None:
    with report.attempt("model"):
        whole_model(report)
    for shape in attention_tiles.SHAPES[:3]:
        with report.attempt(f"attention {shape}"):
            for what, different, count in attention_tiles.disagreements(*shape):
                value = f"{different} of {count} rows differ" if different else ""
                report.check(f"attention {shape}: {what}", different == 0, value)
    with report.attempt("4 bits"):
        four_bits(report)
    for quantization in ("none", "8bit"):
        with report.attempt(f"ranks, {quantization}"):
            divided(report, quantization)
    for layer in (LLAMA_8B[3], FOUR_BITS[3], FOUR_BITS[2], LLAMA_8B[2], LLAMA_8B[0], QWEN3_06B[1]):
        with report.attempt(layer.name):
            tiles(report, layer)


def whole_model(report: Report) -> None:
    """Check a model of four layers in Qwen3-0.6B's shapes."""
    spec = shortened(shapes.QWEN3_06B, 4)
    weights = random_weights(spec)
    sizes = {"batch_tokens": 1536, "batch_size": 1200, "model_len": 2048}
    made = backend(spec, weights, 160, **sizes)
    whole = chunked(made, 1200, PAGES)
    report.check("logits are finite", bool(np.isfinite(whole).all()), f"largest {np.abs(whole).max():.2f}")
    for chunk in (1, 16, 37, 130, 512):
        length = 1200 if chunk > 16 else 40 * chunk
        with report.attempt(f"chunks of {chunk}"):
            same(
                report,
                f"chunks of {chunk}, {length} tokens, against 1,200 at once",
                chunked(made, chunk, PAGES, length),
                whole,
            )
    with report.attempt("graph and eager"):
        one_row = decode_logits(report, made, whole)
        graphs, made._graphs = made._graphs, None
        same(report, "eager against graph, 1 row", made.logits(step([(TOKENS[1199:], 1199, PAGES)])), one_row)
        chunk = step([(TOKENS[:300], 0, PAGES)])
        by_chunk = made.logits(chunk)
        same(report, "eager against graph, a chunk of 300", by_chunk, whole[:300])
        made._graphs = graphs
        same(report, "graph against eager, a chunk of 300", made.logits(chunk), by_chunk)
    with report.attempt("moved pages"):
        moved(report, made, whole)
    with report.attempt("page size"):
        wide = backend(spec, weights, 30, page_size=96, **sizes)
        same(report, "pages of 96 tokens", chunked(wide, 512, list(range(13))), whole)
        wide.close()
    with report.attempt("sampling"):
        sampling(report, made)


def four_bits(report: Report) -> None:
    """Compare two layers in Qwen3-0.6B's shapes, in 4 bits, with a model of the values that these stand for."""
    spec = shortened(shapes.QWEN3_06B, 2)
    weights = random_weights(spec, recipe="4bit")
    unpacked = {name: unpack(weight) if isinstance(weight, FourBits) else weight for name, weight in weights.items()}
    found = []
    for each in (weights, unpacked):
        made = backend(spec, each, 160, batch_tokens=1536, batch_size=256, model_len=2048)
        found.append([chunked(made, chunk, PAGES, length) for chunk, length in ((1200, 1200), (37, 259), (1, 24))])
        made.close()
    for packed, plain, chunk in zip(*found, (1200, 37, 1), strict=True):
        same(report, f"4 bits against their bfloat16 values, chunks of {chunk}", packed, plain)
        same(report, f"4 bits, chunks of {chunk} against 1,200 at once", packed, found[0][0])


def divided(report: Report, quantization: str) -> None:
    """Compare two layers in Qwen3-0.6B's shapes, divided over two and four ranks, with the whole model."""
    spec = shortened(shapes.QWEN3_06B, 2)
    parameters = stored(random_weights(spec))
    settings: dict[str, Any] = {
        "page_size": shapes.PAGE_SIZE, "max_batch_tokens": 1536, "max_batch_size": 1200, "max_model_len": 2048,
        "threads": 0, "dtype": "auto", "quantization": quantization, "device": "cuda", "kv_cache_dtype": "bf16",
    }  # fmt: skip
    one = RanksInTurns(spec, parameters, 1, **settings)
    one.call("allocate_pages", 60)
    [whole] = one.each(lambda rank: chunked(rank, 1200, PAGES))
    one.close()
    for size in (2, 4):
        ranks = RanksInTurns(spec, parameters, size, **settings)
        ranks.call("allocate_pages", 60)
        for chunk, length in ((1200, 1200), (37, 259), (1, 24)):
            got = ranks.each(lambda rank, chunk=chunk, length=length: chunked(rank, chunk, PAGES, length))[0]
            same(report, f"{size} ranks, {quantization}, chunks of {chunk}, against one", got, whole)
        ranks.close()


def stored(weights: Weights) -> dict[str, Parameter]:
    """Return weights in bfloat16 as a file would have them."""
    parameters = {}
    for name, weight in weights.items():
        assert isinstance(weight, torch.Tensor)
        data = weight.view(torch.int16).cpu().numpy().reshape(len(weight) if weight.dim() > 1 else 1, -1)
        parameters[name] = Parameter((Tensor(name, tuple(weight.shape), "BF16", data.view(np.uint8)),))
    return parameters


def decode_logits(report: Report, made: CudaBackend, whole: np.ndarray) -> np.ndarray:
    """Check a last row alone, among decode rows of other sequences, and beside chunks. Returns it alone."""
    last = (TOKENS[1199:], 1199, PAGES)
    chunked(made, 1200, PAGES)
    alone = made.logits(step([last]))
    same(report, "a decode row alone, by graph", alone, whole[-1:])
    others = [([7 + i], 0, [100 + i % 50]) for i in range(60)]
    for beside in (1, 5, 23, 60):
        batch = step([*others[:beside], last])
        same(report, f"a decode row beside {beside} others", made.logits(batch)[-1:], alone)
    chunk = (TOKENS[:300], 0, list(range(100, 110)))
    mixed = made.logits(step([chunk, last, (TOKENS[:9], 0, [120])]))
    same(report, "a decode row beside chunks", mixed[300:301], alone)
    same(report, "a chunk beside a decode row", mixed[:300], whole[:300])
    return alone


def moved(report: Report, made: CudaBackend, whole: np.ndarray) -> None:
    """Check a sequence whose pages went to the host and came back elsewhere, and one computed again."""
    chunked(made, 1200, PAGES)
    content = [made.export_page(page) for page in PAGES]
    for target, page in zip(range(100, 138), content, strict=True):
        made.import_page(target, page)
    last = (TOKENS[1199:], 1199, list(range(100, 138)))
    same(report, "swapped out and in to other pages", made.logits(step([last])), whole[-1:])
    made.copy_page(137, 138)
    copied = (TOKENS[1199:], 1199, [*range(100, 137), 138])
    same(report, "the last page copied", made.logits(step([copied])), whole[-1:])
    same(report, "preempted and computed again, in chunks of 100", chunked(made, 100, PAGES[::-1])[-1:], whole[-1:])


def sampling(report: Report, made: CudaBackend) -> None:
    """Check that a row's token does not depend on the batch, and compare with the plain implementation in numpy."""
    from octavo.backends.torch.sampling import sample

    rows = 64
    batch = step([(TOKENS[:rows], 0, [100, 101])])
    rng = np.random.default_rng(2)
    wanted = replace(
        SamplingBatch.greedy(rows),
        temperature=rng.choice([0, 0.5, 1.0, 1.5], rows).astype(np.float32),
        top_k=rng.choice([0, 1, 20, 200], rows).astype(np.int32),
        top_p=rng.choice([1, 0.95, 0.5], rows).astype(np.float32),
        min_p=rng.choice([0, 0.05], rows).astype(np.float32),
        seeds=rng.integers(0, 2**53, rows).astype(np.uint64),
        positions=np.arange(rows, dtype=np.int64),
        num_logprobs=np.full(rows, 5, np.int32),
    )
    logits = made.logits(batch)
    result, expected = made.step(replace(batch, sampling=wanted)), sample(logits, wanted)
    agree = int((result.tokens == expected.tokens).sum())
    report.check("tokens against numpy (a rounding may change a few)", agree >= rows - 2, f"{agree} of {rows}")
    assert result.logprobs is not None and expected.logprobs is not None
    error = float(np.abs(result.logprobs - expected.logprobs)[result.tokens == expected.tokens].max())
    report.check("logprobs against numpy", error < 1e-4, f"within {error:.1e}")
    alone = [made.step(one_row(batch, wanted, row)).tokens[0] for row in range(0, rows, 7)]
    same(report, "tokens sampled alone", np.array(alone), result.tokens[::7])


def one_row(batch: StepBatch, wanted: SamplingBatch, row: int) -> StepBatch:
    """Return the step that samples only one of its rows."""
    fields = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "num_logprobs")
    one = {name: getattr(wanted, name)[row : row + 1] for name in fields}
    rows = batch.sample_rows[row : row + 1]
    return replace(batch, sample_rows=rows, sampling=replace(SamplingBatch.greedy(1), **one))


def tiles(report: Report, layer: Layer) -> None:
    """Compare the tiles of each family with the first of the default family, and few rows with many."""
    for family in FAMILIES:
        if report.seconds_left < 15:
            return
        families = ("swapped",) if family == "swapped" else ("swapped", family)
        found, count = disagreements(layer, families), len(tiles_of(layer, (family,)))
        name = f"{layer.name} {layer.outputs}x{layer.inputs}/{layer.spans}: {count} tiles, {family}"
        report.check(name, not found, f"{len(found)} differ or fail; {found[0]}" if found else "")


def chunked(made: CudaBackend, chunk: int, pages: list[int], length: int = 1200) -> np.ndarray:
    """Return the logits of every token, computed `chunk` tokens a step."""
    steps = [step([(TOKENS[i : min(i + chunk, length)], i, pages)]) for i in range(0, length, chunk)]
    return np.concatenate([made.logits(each) for each in steps])


def same(report: Report, what: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Report whether `got` equals the first rows of `expected` to the bit."""
    expected = expected[: len(got)]
    if np.array_equal(got, expected):
        report.check(what, True)
        return
    rows = np.flatnonzero((got != expected).reshape(len(got), -1).any(axis=1))
    largest = np.abs(got.astype(np.float64) - expected).max()
    report.check(what, False, f"DIFFERENT in {len(rows)} of {len(got)} rows, first {rows[0]}, by up to {largest:.2e}")
