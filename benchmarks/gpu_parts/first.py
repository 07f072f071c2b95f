"""Part s: does a small model run at all, first without and then with CUDA graphs?"""

import argparse

import numpy as np

from octavo.backends.cuda.backend import CudaBackend

from .report import Report
from .shapes import QWEN3_06B, backend, random_weights, shortened, step


def run(report: Report, options: argparse.Namespace) -> None:
    spec = shortened(QWEN3_06B, 1)
    weights = random_weights(spec)
    for graphs in (False, True):
        kind = "by graph" if graphs else "eagerly"
        with report.attempt(f"a small model {kind}"):
            made = backend(spec, weights, 64, graphs=graphs)
            rows(report, made, kind)
            made.close()


def rows(report: Report, made: CudaBackend, kind: str) -> None:
    for count in (1, 3, 33):
        batch = step([([7 + i], 40 + i, [2 * i % 64, (2 * i + 1) % 64, 5]) for i in range(count)])
        ok = bool(np.isfinite(made.logits(batch)).any())
        report.check(f"{count} rows {kind}", ok, f"token {made.step(batch).tokens[0]}")
    chunk = made.logits(step([(list(range(1, 100)), 0, [1, 2, 3, 4])]))
    report.check(f"a chunk of 99 {kind}", bool(np.isfinite(chunk).all()), f"largest {np.abs(chunk).max():.1f}")
