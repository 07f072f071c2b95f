"""Perplexity by quantization of weights and KV cache: python benchmarks/perplexity.py [MODEL] [--shuffled]

The text is half English, half code, from Python's standard library. The cost of a setting is the mean difference to
bfloat16 token by token, which is far more exact than the perplexities themselves.

SmolLM2's file has 4-bit weights, so quantizing it to 4 bits again finds the same grid and costs nothing. --shuffled
permutes its channels consistently: the same function, but every block of 32 is a new mixture, and the quantizer sees
ordinary floats.
"""

import argparse
import heapq
import inspect
import json.decoder
import math
import pydoc_data.topics
import statistics
import string
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.backends.cpu import load
from octavo.backends.cpu.backend import CpuBackend
from octavo.config import QUANTIZATIONS, EngineConfig
from octavo.model import describe_model
from octavo.model.spec import DecoderSpec
from octavo.text import Tokenizer
from octavo.weights import Parameter, open_checkpoint, resolve
from octavo.weights.tensor import bfloat16_tensor

WINDOW, CHUNK, PAGE_SIZE = 512, 128, 32  # tokens; each window is a text of its own
CODE = (argparse, heapq, json.decoder, statistics, string, textwrap)


@dataclass(frozen=True)
class Model:
    spec: DecoderSpec
    parameters: dict[str, Parameter]
    windows: np.ndarray  # int32 [n, WINDOW]


def open_model(name: str, num_windows: int, shuffle: bool = False) -> Model:
    """Return a model and windows of text in its tokens, evenly spaced in the whole: half English, half code."""
    path = resolve(name)
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    tokenizer = Tokenizer.load(path)
    english = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    code = "\n".join(inspect.getsource(module) for module in CODE)
    halves = [(english, num_windows - num_windows // 2), (code, num_windows // 2)]
    windows = np.concatenate([_windows(tokenizer.encode(text), count) for text, count in halves])
    return Model(spec, shuffled(spec, parameters) if shuffle else parameters, windows)


def _windows(tokens: list[int], count: int) -> np.ndarray:
    whole = np.array(tokens[: len(tokens) // WINDOW * WINDOW], np.int32).reshape(-1, WINDOW)
    return whole[np.linspace(0, len(whole) - 1, count).astype(int)]


def losses(model: Model, quantization: str, kv_cache_dtype: str = "bf16") -> np.ndarray:
    """Return -log p of every token but each window's first, in nats: float64 [n * (WINDOW - 1)]."""
    backend = load(
        model.spec, model.parameters, page_size=PAGE_SIZE, max_batch_tokens=CHUNK, max_batch_size=CHUNK,
        max_model_len=WINDOW, threads=EngineConfig().num_threads, dtype="auto", quantization=quantization,
        device="auto", kv_cache_dtype=kv_cache_dtype, progress=lambda done, total: None,
    )  # fmt: skip
    backend.allocate_kv(WINDOW // PAGE_SIZE)
    result = [_window_losses(backend, window) for window in model.windows]
    backend.close()
    return np.concatenate(result)


def cost(of: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return by how much the perplexity of `of` exceeds that of `reference`, and the standard error, as fractions."""
    differences = of - reference
    return math.expm1(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def _window_losses(backend: CpuBackend, window: np.ndarray) -> np.ndarray:
    parts = []
    for start in range(0, WINDOW, CHUNK):
        logits = backend.logits(_step(window, start)).astype(np.float64)
        targets = window[start + 1 : start + 1 + CHUNK]  # one short at the end of the window
        logits = logits[: len(targets)]
        top = logits.max(axis=1)
        total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        parts.append(total - logits[np.arange(len(targets)), targets])
    return np.concatenate(parts)


def _step(window: np.ndarray, start: int) -> StepBatch:
    return StepBatch(
        tokens=window[start : start + CHUNK],
        positions=np.arange(start, start + CHUNK, dtype=np.int32),
        query_start=np.array([0, CHUNK], np.int32),
        page_tables=np.arange(WINDOW // PAGE_SIZE, dtype=np.int32)[None],
        sample_rows=np.arange(CHUNK, dtype=np.int32),
        sampling=SamplingBatch.greedy(CHUNK),
    )


def shuffled(spec: DecoderSpec, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return parameters of the same function with hidden, inner and value channels permuted, in bfloat16; no biases."""
    rng = np.random.default_rng(0)
    hidden = rng.permutation(spec.hidden_size)
    result = {}
    for name, parameter in parameters.items():
        values = np.concatenate([part.float32() for part in parameter.parts])
        kind = name.rpartition(".")[2]
        if kind == "qkv":  # the first of a layer's matrices: new orders inside the layer
            inner = rng.permutation(spec.intermediate_size)
            heads = [rng.permutation(spec.head_dim) for _ in range(spec.num_kv_heads)]
            group = spec.num_heads // spec.num_kv_heads
            of_values = np.concatenate([spec.head_dim * i + order for i, order in enumerate(heads)])
            of_heads = np.concatenate([spec.head_dim * i + heads[i // group] for i in range(spec.num_heads)])
            keep = np.arange(spec.q_size + spec.kv_size)
            values = values[np.concatenate([keep, len(keep) + of_values])][:, hidden]
        elif kind == "out":
            values = values[hidden][:, of_heads]
        elif kind == "gate_up":
            values = values[np.concatenate([inner, len(inner) + inner])][:, hidden]
        elif kind == "down":
            values = values[hidden][:, inner]
        else:  # norms, embedding and head
            values = values[..., hidden]
        result[name] = Parameter((bfloat16_tensor(name, values),))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity by quantization of weights and KV cache.")
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--shuffled", action="store_true", help="with channels in a random order; see above")
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens")
    arguments = parser.parse_args()
    model = open_model(arguments.model, arguments.windows, arguments.shuffled)
    table = Table("quantization", "KV cache", "perplexity", "against the first", "± (standard error)")
    reference = losses(model, "none")
    others = [(name, "bf16") for name in QUANTIZATIONS if name != "none"]
    for setting in (("none", "bf16"), *others, ("none", "int8")):
        of_setting = reference if setting == ("none", "bf16") else losses(model, *setting)
        more, error = cost(of_setting, reference)
        table.add_row(*setting, f"{math.exp(of_setting.mean()):.4f}", f"{100 * more:+.2f} %", f"{100 * error:.2f} %")
    Console().print(
        f"{arguments.model}{' shuffled' * arguments.shuffled}, {len(reference):,} tokens of English and code"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
