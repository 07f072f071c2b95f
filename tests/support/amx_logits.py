"""Run by test_amx.py in a process of its own: python amx_logits.py OUTPUT.npz MODEL ...

Writes each model's logits of one prompt on amx and on avx512, with bfloat16, 8-bit and 4-bit weights and with a KV
cache in 8 bits, computed in steps of several sizes and beside others, and how many products of AMX tiles that took (0
where no emulator counts them), under keys such as "llama/none/bf16/amx/chunk_17".
"lengths" are of the prompts whose logits are, one after another, those of "several". "first" are the logits of 40
tokens, each alone in its sequence. "long" are those of the last two of 530 tokens, from a chunk of 30; they are
"long_one_by_one" too. This prompt, which is slow on an emulator, is for one model, with weights in bfloat16.
"""

import ctypes
import os
import sys
from itertools import product
from pathlib import Path

import numpy as np

import octavo.backends.cpu.backend
from octavo.backends.cpu import load
from octavo.model import describe_model
from octavo.weights import open_checkpoint
from step_batches import run_chunks, step_batch

TOKENS = np.random.default_rng(0).integers(3, 500, 530).tolist()
LENGTHS = (70, 3, 50, 20)
PAGES = 3  # of a prompt
FIRST = 40
RECIPES = [("none", "bf16"), ("8bit", "bf16"), ("4bit", "bf16"), ("none", "int8")]  # weights, KV cache


def logits(model: Path, quantization: str, kv_cache_dtype: str) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(model)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    backend = load(
        spec, parameters, page_size=32, max_batch_tokens=512, max_batch_size=512, max_model_len=1024,
        threads=len(os.sched_getaffinity(0)), dtype="auto", quantization=quantization, device="auto",
        kv_cache_dtype=kv_cache_dtype, progress=lambda done, total: None,
    )  # fmt: skip
    backend.allocate_kv(FIRST)
    several = [(TOKENS[:length], 0, range(i * PAGES, (i + 1) * PAGES)) for i, length in enumerate(LENGTHS)]
    results = {f"chunk_{chunk}": run_chunks(backend, TOKENS[:70], chunk, range(PAGES)) for chunk in (17, 70)}
    backend.logits(step_batch([(TOKENS[:66], 0, range(PAGES))]))
    results["one_by_one"] = np.concatenate(
        [backend.logits(step_batch([(TOKENS[i : i + 1], i, range(PAGES))])) for i in range(66, 70)]
    )
    results["several"] = backend.logits(step_batch(several))
    results["first"] = backend.logits(step_batch([(TOKENS[i : i + 1], 0, [i]) for i in range(FIRST)]))
    if model.name == "llama" and quantization == "none":
        pages = range(17)
        backend.logits(step_batch([(TOKENS[:500], 0, pages)], []))
        results["long"] = backend.logits(step_batch([(TOKENS[500:], 500, pages)], [28, 29]))
        results["long_one_by_one"] = np.concatenate(
            [backend.logits(step_batch([(TOKENS[i : i + 1], i, pages)])) for i in (528, 529)]
        )
    backend.close()
    return results


def main(output: Path, models: list[Path]) -> None:
    # What is measured in bfloat16 differs in its last bits, and so would a few of the integers that it leads to.
    octavo.backends.cpu.backend.measure_importances = lambda *_: ()
    count = getattr(ctypes.CDLL(None), "amx_emulator_products", lambda: 0)
    results = {"lengths": np.array(LENGTHS)}
    for model, recipe, isa in product(models, RECIPES, ("amx", "avx512")):
        os.environ["OCTAVO_ISA"] = isa
        before, name = count(), f"{model.name}/{'/'.join(recipe)}/{isa}"
        results |= {f"{name}/{key}": array for key, array in logits(model, *recipe).items()}
        results[f"{name}/products"] = np.array(count() - before)
    np.savez(output, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(model) for model in sys.argv[2:]])
