"""Models of random weights, made on the device, and the steps that measure them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.backends.cuda.backend import CudaBackend
from octavo.backends.cuda.kernels.four_bits import FourBits, pack
from octavo.backends.cuda.ops import spans_of
from octavo.backends.cuda.weights import Weights, head_of, round_weight
from octavo.model.registry import parameter_shapes
from octavo.model.shard import Shard
from octavo.model.spec import DecoderSpec, RopeSpec

from .report import short

PAGE_SIZE = 32

LLAMA_8B = DecoderSpec(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=131072,
    norm_eps=1e-5,
    rope=RopeSpec(theta=500000.0),
    windows=(0,) * 32,
)
QWEN3_06B = DecoderSpec(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_positions=40960,
    norm_eps=1e-6,
    rope=RopeSpec(theta=1000000.0),
    windows=(0,) * 28,
    qk_norm=True,
    tied_embeddings=True,
)
MODELS = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B}


def shortened(spec: DecoderSpec, layers: int) -> DecoderSpec:
    """Return the same shapes with fewer layers."""
    return replace(spec, num_layers=layers, windows=spec.windows[:layers])


def random_weights(spec: DecoderSpec, device: str = "cuda", recipe: str = "bf16") -> Weights:
    """Return weights by name, sized so that activations stay near 1.

    Args:
        recipe: bf16; 8bit: int8 where `load` would round; 4bit: integers of 4 bits for all matrices of linear layers.
    """
    generator = torch.Generator(device).manual_seed(0)
    weights = Weights()
    for name, parts in parameter_shapes(spec).items():
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        if recipe == "4bit" and len(shape) == 2 and (name != "embed" or spec.tied_embeddings):
            packed = random_four_bits(*shape, shape[-1] ** -0.5, device)
            weights[head_of(name) if name == "embed" else name] = packed
            if name != "embed":
                continue
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if name.endswith("norm"):
            weight.normal_(1.0, 0.1, generator=generator)
        else:
            weight.normal_(0.0, 1.0 if name == "embed" else shape[-1] ** -0.5, generator=generator)
        weights[name] = weight
        if recipe == "8bit":
            round_weight(weights, name, spec.tied_embeddings, spans_of(spec))
    return weights


def random_four_bits(rows: int, columns: int, scale: float, device: str = "cuda") -> FourBits:
    """Return a matrix of random 4-bit integers in groups of 32, whose values are about `scale`."""
    generator = torch.Generator(device).manual_seed(rows)
    q = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8, device=device)
    steps = torch.rand((rows, columns // 32), generator=generator, device=device).add_(0.5).mul_(scale / 4.6).half()
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    return pack(q, steps.float(), (-7.5 * steps).float(), hopper)


def backend(
    spec: DecoderSpec,
    weights: Weights,
    pages: int,
    *,
    batch_tokens: int = 512,
    batch_size: int = 256,
    model_len: int = 2048,
    page_size: int = PAGE_SIZE,
    int8_kv: bool = False,
    graphs: bool = True,
    warm_up: bool = False,
) -> CudaBackend:
    """Return the cuda backend of a model, with a KV pool.

    Args:
        warm_up: compile its kernels and measure its steps first, as `load` does.
    """
    made = CudaBackend(
        Shard(spec),
        weights,
        page_size=page_size,
        max_batch_tokens=batch_tokens,
        max_batch_size=batch_size,
        max_model_len=model_len,
        int8_kv=int8_kv,
        capture_seconds=0.0,
    )
    torch.cuda.synchronize()  # the weights were made on another stream
    if not graphs:
        made._graphs = None
    if warm_up:
        made.warm_up(lambda: None)
    try:
        made.allocate_kv(pages)
    except RuntimeError as error:  # of a capture: the rest can still be checked
        print(f"! without CUDA graphs: {short(error)}", flush=True)
        made._graphs = None
    return made


def step(pieces: Sequence[tuple[Sequence[int], int, Sequence[int]]], sample: Sequence[int] | None = None) -> StepBatch:
    """Return a step of `pieces`: (new tokens, position of the first, page table). `sample`: rows; None: all."""
    lengths = [len(tokens) for tokens, _, _ in pieces]
    tables = np.zeros((len(pieces), max(len(pages) for _, _, pages in pieces)), np.int32)
    for table, (_, _, pages) in zip(tables, pieces, strict=True):
        table[: len(pages)] = pages
    rows = np.arange(sum(lengths), dtype=np.int32) if sample is None else np.array(sample, np.int32)
    return StepBatch(
        tokens=np.concatenate([np.asarray(tokens, np.int32) for tokens, _, _ in pieces]),
        positions=np.concatenate([np.arange(at, at + len(tokens), dtype=np.int32) for tokens, at, _ in pieces]),
        query_start=np.array([0, *np.cumsum(lengths)], np.int32),
        page_tables=tables,
        sample_rows=rows,
        sampling=SamplingBatch.greedy(len(rows)),
    )


def decode_step(sequences: int, position: int, page_size: int = PAGE_SIZE) -> StepBatch:
    """Return a step of one token of each sequence at `position`, each with pages of its own."""
    pages = position // page_size + 1
    tokens = np.random.default_rng(position).integers(0, 1000, sequences)
    tables = np.arange(sequences * pages).reshape(sequences, pages)
    return step([([int(token)], position, table.tolist()) for token, table in zip(tokens, tables, strict=True)])
