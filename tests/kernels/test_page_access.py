"""A page of the KV pool, taken out and put in elsewhere: the next step computes the same bits."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.backends.torch import load as load_torch
from random_model import PLAIN, TOKENS, load
from rank_requests import wait_until
from step_batches import run_chunks, step_batch

BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {"quantization": "none"},
    "cpu, int8 cache": {"quantization": "none", "kv_cache_dtype": "int8"},
    "torch": {"factory": load_torch, "dtype": "float32"},
    "torch, bfloat16": {"factory": load_torch, "dtype": "bfloat16"},
}
PREFIX = 70  # of TOKENS: two full pages and a part of a third
PAGES = [5, 0, 7]


@pytest.fixture(params=BACKENDS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BACKENDS[request.param]


def next_logits(backend: Any, pages: list[int]) -> np.ndarray:
    logits: np.ndarray = backend.logits(step_batch([(TOKENS[PREFIX : PREFIX + 1], PREFIX, pages)]))
    return logits


def test_exported_pages_serve_another_pool(settings: dict[str, Any]) -> None:
    backend, other = load(PLAIN, **settings), load(PLAIN, **settings)
    run_chunks(backend, TOKENS[:PREFIX], 64, PAGES)
    content = [backend.export_page(page) for page in PAGES]
    assert all(page.shape == (backend.page_bytes,) and page.dtype == np.uint8 for page in content)
    assert not any(page.flags.writeable for page in content)
    for page, exported in zip([2, 3, 8], content, strict=True):
        other.import_page(page, exported)
    np.testing.assert_array_equal(next_logits(other, [2, 3, 8]), next_logits(backend, PAGES))
    np.testing.assert_array_equal(other.export_page(2), content[0])


def test_a_copied_page_serves_as_the_original(settings: dict[str, Any]) -> None:
    backend = load(PLAIN, **settings)
    run_chunks(backend, TOKENS[:PREFIX], 64, PAGES)
    expected = next_logits(backend, PAGES)
    backend.copy_page(7, 1)
    backend.copy_page(7, 7)
    run_chunks(backend, TOKENS[:32], 32, [7])  # the original goes its own way
    np.testing.assert_array_equal(next_logits(backend, [5, 0, 1]), expected)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="there are no huge pages")
def test_memory_of_the_first_pages_is_taken_ahead() -> None:
    """Of 128 MiB and not of the whole pool, of which most may never be used."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

    backend = load(PLAIN)
    before = resident()
    backend.allocate_kv((1 << 30) // backend.page_bytes)
    wait_until(lambda: resident() - before >= 125)
    assert resident() - before < 170


def test_nothing_outside_of_the_pool(settings: dict[str, Any]) -> None:
    backend = load(PLAIN, **settings)
    content = np.zeros(backend.page_bytes, np.uint8)
    for page in (-1, 10, 2**40):
        with pytest.raises(ValueError, match="not in the KV pool"):
            backend.export_page(page)
        with pytest.raises(ValueError, match="not in the KV pool"):
            backend.import_page(page, content)
        with pytest.raises(ValueError, match="not in the KV pool"):
            backend.copy_page(0, page)
    with pytest.raises(ValueError, match="page_bytes"):
        backend.import_page(0, content[1:])


def test_a_view_outlives_its_backend() -> None:
    backend = load(PLAIN)
    run_chunks(backend, TOKENS[:32], 32, [0])
    view = backend.export_page(0)
    before = view.copy()
    backend.close()
    del backend
    gc.collect()
    np.testing.assert_array_equal(view, before)
