"""Ranks of the cuda backend in Triton's interpreter: the same bits for any number of them, in every recipe."""

import dataclasses
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from triton_interpreter import INTERPRETED, run_interpreted

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from gpu_parts.ranks_in_turns import RanksInTurns  # noqa: E402

from octavo.backends.base import PoolingBatch, StepBatch  # noqa: E402
from octavo.backends.cuda import collectives, device  # noqa: E402
from octavo.backends.cuda import ranks as cuda_ranks  # noqa: E402
from octavo.backends.cuda.backend import load as load_cuda  # noqa: E402
from octavo.backends.cuda.kernels.four_bits import FourBits  # noqa: E402
from octavo.backends.cuda.ops import check_ranks  # noqa: E402
from octavo.backends.cuda.rank_messages import Step, decode, encode  # noqa: E402
from octavo.backends.cuda.ranks import load_ranks  # noqa: E402
from octavo.backends.rank_process import Joined, RankProcess  # noqa: E402
from octavo.errors import ConfigError, EngineDead, OutOfMemory  # noqa: E402
from octavo.model import describe_model  # noqa: E402
from octavo.model.spec import DecoderSpec  # noqa: E402
from octavo.weights import open_checkpoint  # noqa: E402
from random_model import PLAIN, TOKENS, load, random_parameters  # noqa: E402
from rank_requests import children  # noqa: E402
from step_batches import run_chunks, sampling_batch, step_batch  # noqa: E402
from tiny_gguf import write_gguf  # noqa: E402
from tiny_models import save_tiny_model  # noqa: E402

WIDE = dataclasses.replace(
    PLAIN, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=32, hidden_size=64, intermediate_size=256, windows=(0,)
)
SPECS = {
    "kv heads copied": WIDE,
    "heads that do not divide": dataclasses.replace(WIDE, num_heads=6, num_kv_heads=3, qkv_bias=True, output_bias=True),
    "biases, untied, qk_norm": dataclasses.replace(
        WIDE, qkv_bias=True, output_bias=True, mlp_bias=True, tied_embeddings=False, num_kv_heads=4, qk_norm=True
    ),
}
CASES = {
    **{name: (spec, {"quantization": "none"}, (2, 4) if spec is WIDE else (2,)) for name, spec in SPECS.items()},
    "8bit, int8 cache": (
        dataclasses.replace(WIDE, num_heads=4, vocab_size=101, intermediate_size=128),
        {"quantization": "8bit", "kv_cache_dtype": "int8"},
        (2,),
    ),
}
SETTINGS: dict[str, Any] = {
    "page_size": 8, "max_batch_tokens": 64, "max_batch_size": 32, "max_model_len": 128, "threads": 1, "dtype": "auto",
    "quantization": "none", "device": "auto", "kv_cache_dtype": "bf16",
}  # fmt: skip
PROMPT, PAGES = TOKENS[:11], [5, 2]  # two pages of 8
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")


def on_devices(test: Any) -> Any:
    """Run a test in the interpreter's process, or with -m gpu on two GPUs."""
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")(test))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


def alone(spec: DecoderSpec, **settings: Any) -> Any:
    return load(spec, load_cuda, **{**SETTINGS, **settings})


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, recipe, sizes = CASES[name]
    settings = SETTINGS | recipe
    whole = run_chunks(alone(spec, **settings), PROMPT, 11, PAGES)
    mixed = step_batch([(PROMPT[10:], 10, PAGES), (PROMPT[:6], 0, [1])])
    for size in sizes:
        monkeypatch.setattr(collectives, "_LARGE", 0)  # four ranks divide the rows
        ranks = RanksInTurns(spec, random_parameters(spec), size, **settings)
        ranks.call("allocate_pages", 10)
        for logits in ranks.call("logits", step_batch([(PROMPT[:10], 0, PAGES)])):
            np.testing.assert_array_equal(logits, whole[:10])
        monkeypatch.undo()
        for logits in ranks.call("logits", mixed):
            np.testing.assert_array_equal(logits, np.concatenate([whole[10:], whole[:6]]))
        ranks.close()


@interpreted
def test_all_ranks_sample_the_same_tokens_and_read_them_from_their_own_device() -> None:
    def steps(call: Any) -> list[Any]:
        drawn = sampling_batch(2, temperature=np.float32([1, 1]), top_p=np.float32([0.9, 1]))
        first = step_batch([(PROMPT[:5], 0, [1, 2]), (PROMPT[:3], 0, [3])], [4, 7])
        ahead = step_batch([([-1 - 5], 5, [1, 2]), ([-1 - 2], 3, [3])])
        launched = []
        for batch in (first, ahead):
            batch = dataclasses.replace(batch, sampling=drawn, places=np.array([5, 2], np.int32))
            launched.append(call(batch))
        return launched

    one = alone(WIDE)
    expected = [pending.result().tokens for pending in steps(one.launch)]
    ranks = RanksInTurns(WIDE, random_parameters(WIDE), 2, **SETTINGS)
    ranks.call("allocate_pages", 10)
    of_ranks = steps(lambda batch: ranks.call("launch", batch))
    for tokens, pending in zip(expected, of_ranks, strict=True):
        for each in pending:
            np.testing.assert_array_equal(each.result().tokens, tokens)
    ranks.close()


@pytest.mark.exhaustive
@interpreted
def test_four_bits_that_a_rank_cannot_keep_give_the_same_bits(tmp_path: Path) -> None:
    """Columns of `down` that begin within a block of 256 are kept in bfloat16."""
    source = save_tiny_model("llama-ranks", tmp_path / "model")
    write_gguf(source, tmp_path / "model.gguf", "Q4_K")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    batch = step_batch([(PROMPT[:3], 0, [0])])
    expected = alone(spec, parameters=parameters, quantization="auto").logits(batch)
    ranks = RanksInTurns(spec, parameters, 4, **SETTINGS | {"quantization": "auto"})
    ranks.call("allocate_pages", 1)
    weights = ranks.ranks[1]._model.weights
    assert isinstance(weights["layers.0.gate_up"], FourBits) and isinstance(weights["layers.0.down"], torch.Tensor)
    np.testing.assert_array_equal(ranks.call("logits", batch)[0], expected)
    ranks.close()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets a function of rank_main fail in the ranks that are started from now on."""
    start, support = RankProcess.__init__, Path(__file__).parents[1] / "support"

    def choose(function: str, by: str = "raise") -> None:
        monkeypatch.setenv("FAILING_FUNCTION", function)
        monkeypatch.setenv("FAILING_BY", by)

    monkeypatch.setenv("PYTHONPATH", str(support))
    monkeypatch.setattr(RankProcess, "__init__", lambda self, rank, _, files: start(self, rank, "failing_rank", files))
    return choose


@interpreted
@pytest.mark.parametrize(
    "function", ["make_part", "CudaBackend.allocate_pages", "CudaBackend.launch", "CudaBackend.export_page"]
)
def test_the_error_of_a_rank_is_that_of_the_engine(
    function: str, failing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ranks, "step_of_every_kind", lambda: step_batch([]))  # is done in no time
    path, before = save_tiny_model("llama-ranks", tmp_path), children(os.getpid(), b"rank")
    failing(function)
    with pytest.raises(OutOfMemory, match=r"this does not fit \(rank 1\)"):
        two = load_two(path)
        try:
            two.allocate_kv(2)
            two.step(step_batch([([5], 0, [0])]) if function == "CudaBackend.launch" else step_batch([]))
            two.export_page(0)
        finally:
            two.close()
    assert children(os.getpid(), b"rank") == before
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model as one backend, and as two ranks that are processes and exchange through gloo."""
    path = save_tiny_model("llama-ranks", tmp_path_factory.mktemp("model"))
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    one = alone(spec, parameters=parameters)
    two = load_two(path)
    two.allocate_kv(10)
    yield one, two, path
    two.close()


def load_two(path: Path, **changes: Any) -> Any:
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    return load_ranks(
        spec, parameters, size=2, path=path, identity=None, hide=False, on_end=None,
        progress=lambda done, total: None, **SETTINGS | changes,
    )  # fmt: skip


@on_devices
def test_processes_and_their_pages(processes: Any) -> None:
    one, two, _ = processes
    whole = run_chunks(one, PROMPT, 11, PAGES)
    np.testing.assert_array_equal(run_chunks(two, PROMPT, 9, PAGES), whole)
    assert (two.page_bytes, two.arithmetic, two.runs_ahead) == (one.page_bytes, one.arithmetic, True)
    for page in PAGES[:1]:
        np.testing.assert_array_equal(two.export_page(page), one.export_page(page))
    for page, source in zip((1, 4), PAGES, strict=True):
        two.import_page(page, one.export_page(source))
    two.copy_page(4, 8)
    np.testing.assert_array_equal(two.logits(step_batch([(PROMPT[10:], 10, [1, 8])])), whole[10:])
    for call in (lambda: two.export_page(10), lambda: two.copy_page(0, 10), lambda: two.import_page(0, whole[0])):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match="vocabulary"):
        two.step(step_batch([([9999], 0, [0])]))
    two.step(step_batch([]))
    np.testing.assert_array_equal(two.logits(step_batch([(PROMPT[10:], 10, [1, 8])])), whole[10:])


@on_devices
def test_a_rank_that_ends_is_the_end_of_all(processes: Any) -> None:
    _, two, path = processes
    with pytest.raises(ConfigError, match=r"torch\.distributed already"):
        load_two(path)
    two._others.processes[0]._popen.kill()
    with pytest.raises(EngineDead, match="ranks of the engine have been stopped"):
        for _ in range(1000):
            two.step(step_batch([(PROMPT[:1], 0, [0])]))
    for call in (lambda: two.export_page(0), lambda: two.copy_page(0, 1), lambda: two.step(step_batch([]))):
        with pytest.raises(EngineDead, match="killed by SIGKILL"):
            call()
    two.close()


@on_devices
def test_a_model_is_loaded_again_and_an_error_of_rank_0_ends_all(
    processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes[1].close()
    two = load_two(processes[2])

    def fail(batch: StepBatch) -> Any:
        raise OutOfMemory("no memory in rank 0")

    monkeypatch.setattr(two._own, "launch", fail)
    for _ in range(2):
        with pytest.raises(EngineDead, match="the ranks of the engine have been stopped: no memory in rank 0"):
            two.step(step_batch([]))
    two.close()


@on_devices
def test_a_suspended_rank_is_no_obstacle_to_closing(processes: Any) -> None:
    processes[1].close()
    two = load_two(processes[2])
    os.kill(two._others.processes[0]._popen.pid, signal.SIGSTOP)
    began = time.monotonic()
    two.close()
    assert time.monotonic() - began < 8
    assert not children(os.getpid(), b"rank")


@on_devices
def test_an_error_of_a_rank_while_loading_is_that_of_the_engine(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny_model("llama-ranks", tmp_path)
    checkpoint = open_checkpoint(path)
    spec, parameters = describe_model(checkpoint.config, checkpoint.tensors)
    (path / "config.json").write_text("{}")  # which the other rank will read
    with pytest.raises(Exception, match=r"architecture None .*\(rank 1\)"):
        load_ranks(
            spec, parameters, size=2, path=path, identity=None, hide=False, on_end=None,
            progress=lambda done, total: None, **SETTINGS,
        )  # fmt: skip


def test_messages_keep_every_array() -> None:
    one, none = np.ones(1, np.int32), np.zeros(0, np.int32)
    pooling = PoolingBatch(none, one, np.full((1, 4), 0.1), none, one)
    batch = dataclasses.replace(step_batch([(PROMPT[:3], 0, [1])], []), pooling=pooling)
    decoded = decode(bytearray(encode(Step(batch, True))))
    assert isinstance(decoded, Step) and decoded.only_logits and isinstance(decoded.batch, StepBatch)
    assert_same_arrays(decoded.batch, batch)
    assert_same_arrays(decoded.batch.sampling, batch.sampling)
    assert_same_arrays(decoded.batch.pooling, pooling)


def assert_same_arrays(one: Any, other: Any) -> None:
    for field in dataclasses.fields(other):
        array, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(array, expected)
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)


def test_gpus_of_different_kinds_are_refused() -> None:
    own: Any = SimpleNamespace(arithmetic="a", footprint=SimpleNamespace(kernels="Triton on A"))
    same = Joined(0, 0, 0, "a", "Triton on A")
    cuda_ranks._check_alike(own, [same, same])
    for arithmetic, kernels in (("b", "Triton on A"), ("a", "Triton on B")):
        with pytest.raises(ConfigError, match=r"of one kind: .* of rank 2"):
            cuda_ranks._check_alike(own, [same, Joined(0, 0, 0, arithmetic, kernels)])


def test_sizes_that_cannot_be_divided_are_refused() -> None:
    check_ranks(WIDE, 4)
    with pytest.raises(ConfigError, match="must be 1 or 2 or 4 for this model on GPUs, not 8"):
        check_ranks(WIDE, 8)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no GPUs")
def test_where_engines_and_ranks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert [device.place_engine("cuda", 1, number, 6) for number in range(6)] == [
        ("cuda:0", 2), ("cuda:1", 2), ("cuda:2", 1), ("cuda:3", 1), ("cuda:0", 2), ("cuda:1", 2),
    ]  # fmt: skip
    assert [device.place_engine("cuda", 2, number, 2) for number in range(2)] == [("cuda:0", 1), ("cuda:2", 1)]
    assert device.place_engine("cuda:1", 1, 3, 4) == ("cuda:1", 4)
    assert device.devices_of_ranks("cuda:2", 2) == ["cuda:2", "cuda:3"]
    with pytest.raises(ConfigError, match="tensor_parallel_size 8 needs as many GPUs, and PyTorch finds 4"):
        device.devices_of_ranks("cuda", 8)
    with pytest.raises(ConfigError, match="the first 3 are not for this engine"):
        device.devices_of_ranks("cuda:3", 2)


@interpreted
def test_a_rank_that_ends_while_it_connects(processes: Any, failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs last, as PyTorch can form no other group in this process then."""
    processes[1].close()
    failing("Group", "kill")
    with pytest.raises(EngineDead, match="rank 1 has ended while it loaded: killed by SIGKILL"):
        load_two(processes[2])
    with pytest.raises(ConfigError, match="use AsyncLLM or octavo serve"):
        load_two(processes[2])
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"cannot be connected.*: no shared memory"):
        patch.setattr(collectives.Group, "_is_usable", True)
        patch.setattr(torch.distributed, "init_process_group", Mock(side_effect=RuntimeError("no shared\nmemory")))
        load_two(processes[2])
    assert not children(os.getpid(), b"rank")
