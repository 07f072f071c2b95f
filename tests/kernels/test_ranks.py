"""Ranks of one model, here as threads: the same bits for any number of them and of nodes, in every recipe and shape."""

import contextlib
import dataclasses
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.backends.cpu import _native
from octavo.model import describe_model
from octavo.model.shard import Shard, divides_heads, sizes_for
from octavo.model.spec import DecoderSpec
from octavo.weights import open_checkpoint
from packed_layers import Format, save_quantized
from random_model import PAGES, PLAIN, TOKENS, load, random_parameters
from step_batches import run_chunks, step_batch
from tiny_gguf import write_gguf

WIDE = dataclasses.replace(
    PLAIN, vocab_size=203, hidden_size=256, intermediate_size=600, num_layers=2, num_heads=8, num_kv_heads=2,
    head_dim=64, windows=(0, 40),
)  # fmt: skip
SPECS = {
    "kv heads copied": WIDE,
    "heads that do not divide": dataclasses.replace(WIDE, num_heads=9, num_kv_heads=3, qkv_bias=True, output_bias=True),
    "biases, untied": dataclasses.replace(
        WIDE, qkv_bias=True, output_bias=True, mlp_bias=True, tied_embeddings=False, num_kv_heads=8
    ),
    "qk_norm, gelu, odd widths": dataclasses.replace(
        WIDE, qk_norm=True, activation="gelu_tanh", hidden_size=250, vocab_size=301
    ),
}
RECIPES: dict[str, dict[str, str]] = {
    "none": {"quantization": "none"},
    "8bit, int8 cache": {"quantization": "8bit", "kv_cache_dtype": "int8"},
    "4bit": {"quantization": "4bit"},
}


def share_memory() -> int:
    file = os.memfd_create("ranks")
    os.ftruncate(file, 1 << 40)
    return file


def connect(nodes: int) -> list[dict[int, socket.socket]]:
    """For each node, a socket to each other one."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(nodes)]
    for i, j in itertools.combinations(range(nodes), 2):
        ends[i][j], ends[j][i] = socket.socketpair()
    return ends


@contextlib.contextmanager
def ranks(
    spec: DecoderSpec, size: int, follow: bool = True, steps: int | None = None, nodes: int = 1, **settings: Any
) -> Iterator[Any]:
    """Rank 0 of a random model; the others follow it in threads, which end with the block. `steps`: see Place."""
    from octavo.backends.cpu.backend import load_shard
    from octavo.backends.cpu.program import Place

    files = [[share_memory() if steps is None else steps, share_memory()] for _ in range(nodes)]
    pools = [share_memory() for _ in range(size)]
    sockets = connect(nodes)
    parameters = settings.pop("parameters", None) or random_parameters(spec)
    backends: list[Any] = [None] * size

    def lines_of(rank: int) -> tuple[int, ...]:
        node, number = divmod(rank, size // nodes)
        if nodes == 1:
            return ()
        return tuple(sockets[node][i].fileno() if i != node and number == 0 else -1 for i in range(nodes))

    def load_rank(rank: int) -> None:
        def factory(spec: DecoderSpec, parameters: Any, **settings: Any) -> Any:
            place = Place(*files[rank * nodes // size], pools[rank], lines_of(rank))
            return load_shard(Shard(spec, rank, size), parameters, place, **settings)

        backends[rank] = load(
            spec, factory, parameters=parameters, **{"threads": 1, "kv_cache_dtype": "bf16", **settings}
        )

    loading = [threading.Thread(target=load_rank, args=(rank,)) for rank in range(size)]
    for thread in loading:
        thread.start()
    for thread in loading:
        thread.join()
    following = [threading.Thread(target=backend.follow) for backend in backends[1:]] if follow else []
    for thread in following:
        thread.start()
    try:
        yield backends[0]
    finally:
        for steps_of_node, _ in files:
            _native.stop_ranks(steps_of_node)
        for end in itertools.chain(*(ends.values() for ends in sockets)):
            end.shutdown(socket.SHUT_RDWR)
        for thread in following:
            thread.join(10)
            assert not thread.is_alive()
        for end in itertools.chain(*(ends.values() for ends in sockets)):
            end.close()
        for file in (*itertools.chain(*files), *pools):
            os.close(file)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SPECS)
def test_same_bits_for_any_number_of_ranks(name: str, recipe: str) -> None:
    spec, settings = SPECS[name], RECIPES[recipe]
    alone = load(spec, **settings)
    whole = run_chunks(alone, TOKENS, 150, PAGES)
    mixed = [(TOKENS[70:71], 70, [0, 1, 2]), (TOKENS[40:101], 40, [3, 4, 5, 6]), (TOKENS[:50], 0, [7, 8])]
    assert sizes_for(spec) == [1, 2, 4, 8]
    for size, threads in ((2, 2), (4, 1), (8, 1)):
        with ranks(spec, size, threads=threads, **settings) as backend:
            np.testing.assert_array_equal(run_chunks(backend, TOKENS, 60, PAGES), whole)
            run_chunks(backend, TOKENS[:70], 70, [0, 1, 2])
            run_chunks(backend, TOKENS[:40], 13, [3, 4, 5, 6])
            expected = np.concatenate([whole[70:71], whole[40:101], whole[:50]])
            np.testing.assert_array_equal(backend.logits(step_batch(mixed)), expected)
            one_row = step_batch([(TOKENS[40:41], 40, [3, 4])])
            np.testing.assert_array_equal(backend.logits(one_row), whole[40:41], "fewer rows than ranks")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SPECS)
def test_same_bits_for_any_number_of_nodes(name: str, recipe: str) -> None:
    spec, settings = SPECS[name], RECIPES[recipe]
    whole = run_chunks(load(spec, **settings), TOKENS, 150, PAGES)
    for size, nodes in ((2, 2), (4, 4), (8, 2)):
        with ranks(spec, size, nodes=nodes, **settings) as backend:
            np.testing.assert_array_equal(run_chunks(backend, TOKENS, 60, PAGES), whole)
            backend.step(step_batch([]))
            one_row = step_batch([(TOKENS[70:71], 70, PAGES)])
            np.testing.assert_array_equal(backend.logits(one_row), whole[70:71], "fewer rows than ranks")


def test_heads_are_divided_where_they_can_be() -> None:
    assert [divides_heads(SPECS["heads that do not divide"], size) for size in (1, 2, 4)] == [True, False, False]
    assert all(divides_heads(WIDE, size) for size in (1, 2, 4, 8))
    assert sizes_for(PLAIN) == [1, 2]  # columns of `down` for two spans
    assert sizes_for(dataclasses.replace(WIDE, num_heads=9, num_kv_heads=3, hidden_size=60)) == [1, 2]


def test_samples_are_drawn_from_all_of_the_vocabulary() -> None:
    batch = step_batch([(TOKENS[:40], 0, [0, 1]), (TOKENS[:7], 0, [2])])
    expected = load(WIDE).step(batch).tokens
    with ranks(WIDE, 4) as backend:
        np.testing.assert_array_equal(backend.step(batch).tokens, expected)
        assert expected.max() > 64, "from several ranks"


def test_steps_without_rows_and_without_samples() -> None:
    expected = run_chunks(load(WIDE), TOKENS[:40], 40, [0, 1])[-1:]
    with ranks(WIDE, 2) as backend:
        backend.step(step_batch([]))
        backend.step(step_batch([(TOKENS[:39], 0, [0, 1])], []))
        np.testing.assert_array_equal(backend.logits(step_batch([(TOKENS[39:40], 39, [0, 1])])), expected)


def test_a_batch_that_is_refused_reaches_no_rank() -> None:
    batch = step_batch([(TOKENS[:5], 0, [0])])
    expected = load(WIDE).logits(batch)
    with ranks(WIDE, 2) as backend:
        for wrong in (step_batch([([WIDE.vocab_size], 0, [0])]), step_batch([(TOKENS[:5], 0, [99])])):
            with pytest.raises(ValueError):
                backend.step(wrong)
        np.testing.assert_array_equal(backend.logits(batch), expected)


def test_a_step_that_waits_for_a_missing_rank_can_be_stopped() -> None:
    steps = share_memory()
    with ranks(WIDE, 2, follow=False, steps=steps) as backend:
        stop = threading.Timer(0.2, _native.stop_ranks, [steps])
        stop.start()
        with pytest.raises(RuntimeError, match="stopped"):
            backend.step(step_batch([(TOKENS[:5], 0, [0])]))
        with pytest.raises(RuntimeError, match="stopped"):
            backend.step(step_batch([(TOKENS[:5], 0, [0])]))


def test_a_rank_has_its_part_of_the_weights() -> None:
    backend = load(WIDE)
    for size in (2, 4):
        with ranks(WIDE, size) as own:
            assert own.weight_bytes < backend.weight_bytes / size * 1.1


STORED = ["BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K"]
PACKED = {"awq": Format("awq", 4, 128), "gptq": Format("gptq", 8, 32)}


@pytest.fixture(scope="module")
def stored(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(model, format) -> a checkpoint of it."""

    def write(name: str, format: str) -> Path:
        folder = tmp_path_factory.mktemp("stored")
        if format in PACKED:
            save_quantized(tiny_model(name), PACKED[format], folder / "packed", folder / "plain")
            return folder / "packed"
        write_gguf(tiny_model(name), folder / "model.gguf", format)
        return folder / "model.gguf"

    return write


@pytest.mark.parametrize("format", [*STORED, *PACKED])
@pytest.mark.parametrize("name", ["llama-ranks", "llama-odd-heads"])
def test_weights_of_any_format_are_divided(stored: Callable[[str, str], Path], name: str, format: str) -> None:
    """Spans end within the blocks of K-quants; rows of GGUF files are in another order."""
    checkpoint = open_checkpoint(stored(name, format))
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    for quantization in ("auto", "8bit"):
        settings = {"parameters": parameters, "quantization": quantization}
        whole = run_chunks(load(spec, **settings), TOKENS[:40], 40, [0, 1])
        for size in (2, 8):
            with ranks(spec, size, **settings) as backend:
                np.testing.assert_array_equal(run_chunks(backend, TOKENS[:40], 40, [0, 1]), whole)
