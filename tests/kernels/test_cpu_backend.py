"""The cpu backend on random models: close to float32 PyTorch, and the same bits in any batch, chunk and page."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from octavo.backends.torch import load as load_torch
from octavo.errors import ConfigError, OutOfMemory, UnsupportedModel
from random_model import PAGES, PLAIN, SPECS, TOKENS, cpu, load
from step_batches import run_chunks, sampling_batch, step_batch

AFFINITY = os.sched_getaffinity(0)  # before any test


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OCTAVO_ISA", request.param)
    return str(request.param)


RECIPES: dict[str, tuple[dict[str, str], float]] = {  # settings; how far random weights, which suit none, may stray
    "none": ({"quantization": "none"}, 0.01),
    "8bit": ({"quantization": "8bit"}, 0.05),
    "4bit": ({"quantization": "4bit"}, 0.25),
    "int8 cache": ({"quantization": "none", "kv_cache_dtype": "int8"}, 0.012),  # scales off by 1/128 stray by 0.015
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SPECS)
def test_logits_agree_with_float32(isa: str, name: str, recipe: str) -> None:
    settings, limit = RECIPES[recipe]
    reference = run_chunks(load(SPECS[name], load_torch, dtype="float32"), TOKENS, 150, PAGES)
    logits = run_chunks(load(SPECS[name], **settings), TOKENS, 150, PAGES)
    error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
    assert error < limit


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SPECS)
def test_same_bits_in_any_chunks_pages_and_batch(isa: str, name: str, recipe: str) -> None:
    backend = load(SPECS[name], **RECIPES[recipe][0])
    whole = run_chunks(backend, TOKENS, 150, PAGES)
    for chunk, pages in [(1, [1, 3, 4, 6, 8]), (16, PAGES), (37, [9, 8, 7, 6, 5])]:
        np.testing.assert_array_equal(run_chunks(backend, TOKENS, chunk, pages), whole)
    # A decode step, a chunk in the middle, and another sequence's prompt, all in one step.
    run_chunks(backend, TOKENS[:70], 70, [0, 1, 2])
    run_chunks(backend, TOKENS[:40], 40, [3, 4, 5, 6])
    mixed = [(TOKENS[70:71], 70, [0, 1, 2]), (TOKENS[40:101], 40, [3, 4, 5, 6]), (TOKENS[:50], 0, [7, 8])]
    expected = np.concatenate([whole[70:71], whole[40:101], whole[:50]])
    np.testing.assert_array_equal(backend.logits(step_batch(mixed)), expected)


def test_same_bits_with_any_page_size_and_threads(isa: str) -> None:
    spec = SPECS["head_dim 64, group of 3"]
    whole = run_chunks(load(spec), TOKENS, 150, PAGES)
    np.testing.assert_array_equal(run_chunks(load(spec, page_size=96), TOKENS, 60, [4, 1]), whole)
    np.testing.assert_array_equal(run_chunks(load(spec, threads=1), TOKENS, 60, PAGES), whole)


@pytest.mark.parametrize("windows", [(0, 0, 0), (500, 0, 530)], ids=["all", "windows"])
def test_a_long_context_in_parts(isa: str, windows: tuple[int, ...]) -> None:
    """Where threads share one row's context they sum it up as one alone does beside other rows: the same bits."""
    spec = dataclasses.replace(PLAIN, windows=windows)
    tokens, pages = np.random.default_rng(3).integers(1, 100, 1100).tolist(), list(range(35))
    settings = {"pages": 40, "max_model_len": 2048}
    reference = run_chunks(load(spec, load_torch, dtype="float32", **settings), tokens, 250, pages)
    backend = load(spec, **settings)
    whole = run_chunks(backend, tokens, 250, pages)
    assert np.linalg.norm(whole - reference) < 0.01 * np.linalg.norm(reference)
    np.testing.assert_array_equal(run_chunks(load(spec, **settings, threads=1), tokens, 64, pages), whole)
    np.testing.assert_array_equal(run_chunks(load(spec, **settings, page_size=96), tokens, 250, range(12)), whole)
    beside = [(TOKENS, 0, [35, 36, 37, 38, 39])]
    for at in (511, 513, 900, 1099, 512):  # 512 last: it begins a block anew
        row = [(tokens[at : at + 1], at, pages)]
        np.testing.assert_array_equal(backend.logits(step_batch(row)), whole[at : at + 1])
        np.testing.assert_array_equal(backend.logits(step_batch(beside + row))[-1:], whole[at : at + 1])


@pytest.mark.parametrize("kv_cache_dtype", ["bf16", "int8"])
def test_what_a_page_held_before_does_not_matter(isa: str, kv_cache_dtype: str) -> None:
    """Not even NaN, since 0 times NaN is NaN."""
    fresh = run_chunks(load(PLAIN, kv_cache_dtype=kv_cache_dtype), TOKENS[:40], 40, [0, 1])
    backend = load(PLAIN, kv_cache_dtype=kv_cache_dtype)
    for page in (0, 1):
        backend.import_page(page, np.full(backend.page_bytes, 0xFF, np.uint8))
    np.testing.assert_array_equal(run_chunks(backend, TOKENS[:40], 40, [0, 1]), fresh)


def test_a_row_of_nan_spoils_no_other() -> None:
    backend = load(PLAIN)
    alone = backend.logits(step_batch([(TOKENS[:9], 0, [0])]))
    backend.import_page(1, np.full(backend.page_bytes, 0xFF, np.uint8))  # keys and values of NaN
    beside = backend.logits(step_batch([([100] * 5, 32, [1, 2]), (TOKENS[:9], 0, [0]), ([100], 32, [1, 3])]))
    np.testing.assert_array_equal(beside[5:14], alone)
    assert np.isnan(beside[:5]).all()


def test_step_samples_from_the_logits() -> None:
    backend = load(PLAIN)
    batch = step_batch([(TOKENS[:40], 0, [0, 1]), (TOKENS[:7], 0, [2])], [39, 3, 46])
    logits = backend.logits(batch)
    np.testing.assert_array_equal(backend.step(batch).tokens, logits.argmax(axis=1))
    wanted = dataclasses.replace(batch, sampling=sampling_batch(3, num_logprobs=np.array([2, -1, 0], np.int32)))
    result = backend.step(wanted)
    assert result.top_tokens.shape == (3, 2)
    np.testing.assert_array_equal(result.top_tokens[0], np.argsort(-logits[0], kind="stable")[:2])
    assert np.isnan(result.logprobs[1]) and result.ranks[0] == result.ranks[2] == 1


def test_no_rows_and_no_samples_are_steps_too() -> None:
    backend = load(PLAIN)
    assert backend.step(step_batch([], [])).tokens.shape == (0,)
    assert backend.step(step_batch([(TOKENS[:5], 0, [0])], [])).tokens.shape == (0,)


BAD = {
    "vocabulary": {"tokens": np.array([1, 203, 2], np.int32)},
    "negative": {"positions": np.array([-1, 0, 1], np.int32)},
    "order of position": {"positions": np.array([0, 2, 3], np.int32)},
    "end of its page table": {"positions": np.array([30, 31, 32], np.int32)},
    "KV pool": {"page_tables": np.array([[10]], np.int32)},
    "sampled row": {"sample_rows": np.array([3], np.int32)},
    "run from 0": {"query_start": np.array([0, 2], np.int32)},
    "one entry per sampled row": {"sampling": sampling_batch(2)},
    "one entry per token": {"tokens": np.array([1, 2], np.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_batch_that_reaches_outside_is_refused(message: str) -> None:
    backend = load(PLAIN)
    good = step_batch([([1, 2, 3], 0, [0])], [2])
    expected = backend.step(good).tokens
    with pytest.raises(ValueError, match=message):
        backend.step(dataclasses.replace(good, **BAD[message]))
    np.testing.assert_array_equal(backend.step(good).tokens, expected)


def test_a_batch_larger_than_the_arena_is_refused() -> None:
    backend = load(PLAIN, max_batch_tokens=32, max_batch_size=2)
    with pytest.raises(ValueError, match="max_batch_tokens"):
        backend.step(step_batch([(TOKENS[:33], 0, [0, 1])], [0]))
    with pytest.raises(ValueError, match="max_batch_size"):
        backend.step(step_batch([(TOKENS[:3], 0, [0])]))
    with pytest.raises(TypeError, match="tokens"):
        backend.step(dataclasses.replace(step_batch([([1], 0, [0])]), tokens=np.array([1], np.int64)))


def test_bytes_of_a_page() -> None:
    values = 3 * 2 * 32 * 2 * 16  # layers, k and v, tokens, heads, head_dim
    assert load(PLAIN).page_bytes == 2 * values
    assert load(PLAIN, kv_cache_dtype="int8").page_bytes == values + 4 * values // 16  # and a scale per head


def test_a_pool_that_does_not_fit_says_what_would() -> None:
    backend = load(PLAIN)
    with pytest.raises(OutOfMemory, match=r"at most \d+ pages fit"):
        backend.allocate_kv(2**50 // backend.page_bytes)


def test_settings_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        load(PLAIN, dtype="float32")
    with pytest.raises(ConfigError, match="device"):
        load(PLAIN, device="cuda")
    with pytest.raises(UnsupportedModel, match="head_dim"):
        load(dataclasses.replace(PLAIN, head_dim=24))
    monkeypatch.setenv("OCTAVO_ISA", "sparc")
    with pytest.raises(ConfigError, match=r"OCTAVO_ISA must be one of .*portable"):
        load(PLAIN)


def test_threads_come_and_go_and_leave_the_caller_alone() -> None:
    def threads() -> set[str]:
        return {task.name for task in Path("/proc/self/task").iterdir()}

    before = threads()  # some of earlier tests' may end meanwhile
    backend = load(PLAIN, threads=2)
    backend.step(step_batch([(TOKENS[:5], 0, [0])]))
    assert len(threads() - before) == min(2, len(AFFINITY)) - 1
    assert os.sched_getaffinity(0) == AFFINITY
    backend.close()
    deadline = time.monotonic() + 10
    while not threads() <= before:  # the kernel lists a thread for a moment after it was joined
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.skipif(len(AFFINITY) < 2, reason="needs two processors")
@pytest.mark.parametrize("threads, pinned", [(len(AFFINITY) - 1, False), (len(AFFINITY), True)])
def test_threads_are_pinned_only_if_they_take_every_processor(threads: int, pinned: bool) -> None:
    """Else two engines that share a machine would be pinned to the same processors."""
    backend, batch = load(PLAIN, threads=threads), step_batch([(TOKENS, 0, PAGES)])
    stop = threading.Event()

    def run_steps() -> None:
        while not stop.is_set():
            backend.step(batch)

    stepping = threading.Thread(target=run_steps)
    stepping.start()
    sizes: set[int] = set()  # of the affinity masks seen while steps run
    for _ in range(2000):
        sizes |= {len(os.sched_getaffinity(int(task.name))) for task in Path("/proc/self/task").iterdir()}
        if 1 in sizes:
            break
    stop.set()
    stepping.join()
    backend.close()
    assert (1 in sizes) == pinned


def test_a_forked_child_can_go_on() -> None:
    """In a process of its own: PyTorch, imported here, has threads that do not survive a fork."""
    script = (
        "import os, sys; import numpy as np\n"
        "from random_model import PLAIN, TOKENS, load\n"
        "from step_batches import step_batch\n"
        "backend, batch = load(PLAIN), step_batch([(TOKENS[:40], 0, [0, 1])])\n"
        "before = backend.logits(batch)\n"
        "if child := os.fork():\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert np.array_equal(backend.logits(batch), before)\n"
        "backend.close()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


def test_two_steps_at_a_time_are_refused() -> None:
    backend = load(PLAIN)
    batch = step_batch([(TOKENS, 0, PAGES)])
    expected = backend.logits(batch)
    stop, refused = threading.Event(), 0

    def run_steps() -> None:
        while not stop.is_set():
            with contextlib.suppress(ValueError):
                np.testing.assert_array_equal(backend.logits(batch), expected)

    other = threading.Thread(target=run_steps)
    other.start()
    while refused < 5:
        try:
            np.testing.assert_array_equal(backend.logits(batch), expected)
        except ValueError as error:
            assert "another thread" in str(error)
            refused += 1
    stop.set()
    other.join()
