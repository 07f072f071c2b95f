"""Run by test_amx.py in a process of its own: python amx_logits.py OUTPUT.npz MODEL ...

Writes each model's logits of one prompt on amx and on avx512, with bfloat16, 8-bit and 4-bit weights, computed in
steps of several sizes and beside others, and how many products of AMX tiles that took (0 where no emulator counts
them), under keys such as "llama/none/amx/chunk_17".
"lengths" are of the prompts whose logits are, one after another, those of "several".
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

TOKENS = np.random.default_rng(0).integers(3, 500, 70).tolist()
LENGTHS = (70, 3, 50, 20)
PAGES = 3  # of a prompt


def logits(model: Path, quantization: str) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(model)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    backend = load(
        spec, parameters, page_size=32, max_batch_tokens=256, max_batch_size=256, max_model_len=256,
        threads=len(os.sched_getaffinity(0)), dtype="auto", quantization=quantization, device="auto",
        progress=lambda done, total: None,
    )  # fmt: skip
    backend.allocate_kv(len(LENGTHS) * PAGES)
    several = [(TOKENS[:length], 0, range(i * PAGES, (i + 1) * PAGES)) for i, length in enumerate(LENGTHS)]
    results = {f"chunk_{chunk}": run_chunks(backend, TOKENS, chunk, range(PAGES)) for chunk in (17, 70)}
    backend.logits(step_batch([(TOKENS[:66], 0, range(PAGES))]))
    results["one_by_one"] = np.concatenate(
        [backend.logits(step_batch([(TOKENS[i : i + 1], i, range(PAGES))])) for i in range(66, 70)]
    )
    results["several"] = backend.logits(step_batch(several))
    backend.close()
    return results


def main(output: Path, models: list[Path]) -> None:
    # What is measured in bfloat16 differs in its last bits, and so would a few of the integers that it leads to.
    octavo.backends.cpu.backend.measure_importances = lambda *_: ()
    count = getattr(ctypes.CDLL(None), "amx_emulator_products", lambda: 0)
    results = {"lengths": np.array(LENGTHS)}
    for model, quantization, isa in product(models, ("none", "8bit", "4bit"), ("amx", "avx512")):
        os.environ["OCTAVO_ISA"] = isa
        before, name = count(), f"{model.name}/{quantization}/{isa}"
        results |= {f"{name}/{key}": array for key, array in logits(model, quantization).items()}
        results[f"{name}/products"] = np.array(count() - before)
    np.savez(output, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(model) for model in sys.argv[2:]])
