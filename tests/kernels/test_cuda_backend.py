"""The cuda backend on a tiny model, in Triton's interpreter; with -m gpu and a GPU, the same on the device."""

import dataclasses
import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triton_interpreter import INTERPRETED, run_interpreted

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

from octavo.backends.base import ComputesAtOnce, PoolingBatch, SamplingBatch, StepBatch, StepResult  # noqa: E402
from octavo.backends.cuda import backend as cuda_backend  # noqa: E402
from octavo.backends.cuda import graph_shapes  # noqa: E402
from octavo.backends.cuda import weights as cuda_weights  # noqa: E402
from octavo.backends.cuda.backend import load as load_cuda  # noqa: E402
from octavo.backends.cuda.first_steps import chunk, decode  # noqa: E402
from octavo.backends.cuda.graph_shapes import GraphShape, GraphShapes  # noqa: E402
from octavo.backends.cuda.inputs import Inputs  # noqa: E402
from octavo.backends.cuda.kernels import adjustment, draw, logprobs, sampler, selection  # noqa: E402
from octavo.backends.cuda.kernels.rope_and_cache import KvPool  # noqa: E402
from octavo.backends.cuda.kernels.sampling_arrays import DeviceSampling  # noqa: E402
from octavo.backends.cuda.ops import spans_of  # noqa: E402
from octavo.backends.cuda.staging import Staging  # noqa: E402
from octavo.backends.cuda.weight_bytes import bytes_of_weights  # noqa: E402
from octavo.backends.torch.backend import load as load_torch  # noqa: E402
from octavo.backends.torch.sampling import sample as plain_sample  # noqa: E402
from octavo.engine.engine import Engine  # noqa: E402
from octavo.engine.messages import EngineRequest  # noqa: E402
from octavo.errors import ConfigError, OutOfMemory, UnsupportedModel  # noqa: E402
from octavo.params import SamplingParams  # noqa: E402
from random_model import PLAIN, TOKENS, load, random_parameters  # noqa: E402
from step_batches import run_chunks, step_batch  # noqa: E402

SPEC = dataclasses.replace(
    PLAIN,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    hidden_size=32,
    intermediate_size=128,
    windows=(0, 10),
    qk_norm=True,
    output_bias=True,
    mlp_bias=True,
)
PROMPT, PAGES = TOKENS[:19], [5, 2, 9]  # three pages of 8
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(test: Any) -> Any:
    """Run a test in the interpreter's process, or with -m gpu on a device."""
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(missing(test))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there is a device")
def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"PyTorch finds no GPU.*use device cpu"):
        load(SPEC, load_cuda, device="cuda:1")
    benchmark = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    ended = subprocess.run([sys.executable, benchmark], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stdout == ""
    assert re.fullmatch(r"gpu\.py: .* finds no NVIDIA GPU: run it on a machine with one\n", ended.stderr)


def test_settings_it_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        load(SPEC, load_cuda, dtype="float32", device="cuda")


def test_shapes_of_graphs() -> None:
    shapes = GraphShapes(20, 100)
    assert shapes.decode == [1, 2, 4, 8, 16, 24]
    assert GraphShapes(1, 100).decode == [8]
    assert shapes.choose(3, 2, 3, chunks=False) == GraphShape(4, 4, False)
    assert shapes.choose(25, 3, 20, chunks=False) == GraphShape(64, 24, True)
    assert shapes.choose(65, 3, 20, chunks=True) == GraphShape(128, 24, True)
    assert shapes.choose(65, 25, 3, chunks=True) is None  # more sampled rows than logits
    assert shapes.choose(2049, 1, 1, chunks=True) is None
    assert shapes.choose(0, 0, 0, chunks=False) is None
    large = GraphShapes(256, 8192).of_each_power
    assert [shape.rows.bit_length() for shape in large if not shape.chunks] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [(shape.rows - 1).bit_length() for shape in large if shape.chunks] == [6, 7, 8, 9, 10, 11]
    assert shapes.first[-2:] == [GraphShape(64, 24, True), GraphShape(128, 24, True)]


def cuda(**settings: Any) -> Any:
    return load(SPEC, load_cuda, device="auto", page_size=8, **settings)


@pytest.fixture(scope="module")
def backend() -> Any:
    return cuda()


@pytest.fixture(scope="module")
def whole(backend: Any) -> np.ndarray:
    """The logits of the prompt, computed at once."""
    return run_chunks(backend, PROMPT, len(PROMPT), PAGES)


@on_device
def test_logits_agree_with_float32(whole: np.ndarray) -> None:
    expected = run_chunks(load(SPEC, load_torch, dtype="float32", page_size=8), PROMPT, 19, PAGES)
    assert np.linalg.norm(whole - expected) < 0.012 * np.linalg.norm(expected)


@on_device
def test_same_bits_in_chunks_beside_others_and_from_other_pages(backend: Any, whole: np.ndarray) -> None:
    np.testing.assert_array_equal(run_chunks(backend, PROMPT, 11, [1, 3, 4]), whole)
    for page, target in zip([1, 3, 4], [8, 5, 6], strict=True):
        backend.import_page(target, backend.export_page(page))
    backend.copy_page(6, 7)
    mixed = [(PROMPT[:3], 0, [0]), (PROMPT[18:], 18, [8, 5, 7]), (PROMPT[13:18], 13, [1, 3, 4])]
    expected = np.concatenate([whole[:3], whole[18:], whole[13:18]])
    np.testing.assert_array_equal(backend.logits(step_batch(mixed)), expected)


@on_device
def test_padded_rows_change_nothing(backend: Any, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """What graphs of four rows, and of 24 with a chunk, would compute."""
    monkeypatch.setattr(graph_shapes, "_CHUNKS", (24,))
    run_chunks(backend, PROMPT, 19, PAGES)
    rows = [(PROMPT[at : at + 1], at, PAGES) for at in (18, 12, 5)]
    mixed = step_batch([(PROMPT[:12], 0, [1, 3]), rows[0]], [11, 12])
    for batch, expected in ((step_batch(rows), whole[[18, 12, 5]]), (mixed, whole[[11, 18]])):
        before = [backend.export_page(page) for page in (0, 4, 5, 6)]
        with backend._on_stream():
            inputs = backend._inputs.send(batch, graph=True)
            logits = backend._forward(inputs).cpu().numpy()
        assert inputs.shape is not None and len(inputs.tokens) > len(batch.tokens)
        np.testing.assert_array_equal(logits[: len(expected)], expected)
        for page, content in zip((0, 4, 5, 6), before, strict=True):
            np.testing.assert_array_equal(backend.export_page(page), content)


@on_device
def test_steps_that_record_kernels_have_their_shapes(backend: Any) -> None:
    """And no empty array, which would have no address."""
    for shape in backend._shapes.first[::9]:
        step = chunk(shape.rows) if shape.chunks else decode(shape.rows)
        with backend._on_stream():
            inputs = backend._inputs.send(step, graph=True)
        assert inputs.shape == shape
        assert all(len(tiles.tiles) for tiles in inputs.work) and len(inputs.work) == 1 + shape.chunks


@on_device
def test_step_samples_from_the_logits(backend: Any) -> None:
    batch = step_batch([(PROMPT[:5], 0, [0]), (PROMPT[:2], 0, [1])], [4, 6])
    logits = backend.logits(batch)
    np.testing.assert_array_equal(backend.step(batch).tokens, logits.argmax(axis=1))
    first, second = backend.launch(batch), backend.launch(decode(2))
    np.testing.assert_array_equal(first.result().tokens, logits.argmax(axis=1))
    assert second.result().tokens.shape == (2,)
    assert backend.step(step_batch([], [])).tokens.shape == (0,)


@on_device
def test_a_step_takes_the_tokens_that_another_sampled(backend: Any) -> None:
    """One that could not be sampled, as logits were NaN, reaches into nothing."""
    first = dataclasses.replace(
        step_batch([(PROMPT[:2], 0, [0]), (PROMPT[5:7], 0, [1])], [1, 3]), places=np.array([7, 3])
    )
    sampled = backend.step(first).tokens.tolist()
    unknown = step_batch([([-1 - 3], 2, [1]), ([-1 - 7], 2, [0])])
    known = step_batch([([sampled[1]], 2, [1]), ([sampled[0]], 2, [0])])
    np.testing.assert_array_equal(backend.logits(unknown), backend.logits(known))
    backend._inputs._sampled[3] = -1
    assert np.isfinite(backend.logits(unknown)).all()


class AtOnce(ComputesAtOnce):
    """A backend that does not run ahead."""

    def __init__(self, backend: Any):
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(self, batch: StepBatch) -> StepResult:
        assert batch.tokens.min() >= 0
        result: StepResult = self._backend.step(batch)
        return result


REQUESTS = {
    "greedy": (PROMPT[:5], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1)),
    "stops": (PROMPT[1:3], SamplingParams(max_tokens=9, temperature=1.5, seed=4, stop_token_ids=[*range(0, 128, 2)])),
    "penalized": (PROMPT[:4], SamplingParams(max_tokens=2, frequency_penalty=1.5, ignore_eos=True)),
    "aborted": (PROMPT[:2], SamplingParams(max_tokens=12, ignore_eos=True)),
    "waits": (PROMPT[:3], SamplingParams(max_tokens=2, ignore_eos=True)),
}


@on_device
def test_an_engine_that_runs_ahead_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among requests that wait for a place, stop and are aborted."""
    small = dataclasses.replace(SPEC, num_layers=1, windows=(0,), intermediate_size=32, vocab_size=128)
    backend = load(small, load_cuda, device="auto", page_size=8)
    unknown: list[int] = []  # tokens of each step that were not known when it was launched
    send = backend._inputs.send

    def watched(batch: StepBatch, **settings: Any) -> Any:
        unknown.append(int((batch.tokens < 0).sum()))
        return send(batch, **settings)

    monkeypatch.setattr(backend._inputs, "send", watched)

    def serve(made: Any) -> dict[str, list[tuple[int, str | None, Any]]]:
        engine = Engine(made, num_pages=10, max_model_len=32, max_batch_size=4, max_batch_tokens=8)
        served: dict[str, list[Any]] = {id: [] for id in REQUESTS}
        for id, (prompt, params) in REQUESTS.items():
            engine.add(EngineRequest(id, prompt, params))
        while engine.has_work:
            for output in engine.step():
                served[output.id].append((output.token, output.finish_reason, output.logprobs))
            if len(served["aborted"]) == 2:
                engine.abort(["aborted"])
                served["aborted"].append((-1, "aborted", None))
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.free_pages + stats.cached_pages) == (0, 0, 10)
        return served

    at_once = serve(AtOnce(backend))
    assert not any(unknown)
    assert [outputs[-1][1] for outputs in at_once.values()] == ["length", "stop", "length", "aborted", "length"]
    assert serve(backend) == at_once
    assert sum(unknown) > 3


@on_device
def test_sums_of_hidden_states_do_not_depend_on_chunks(backend: Any) -> None:
    def pooled(first: int, end: int, sums: np.ndarray) -> StepResult:
        batch = step_batch([(PROMPT[first:end], first, [4])], [end - first - 1])
        rows = np.array([0], np.int32), np.array([end - first], np.int32)
        labels = np.zeros(1, np.int32), np.array([7], np.int32)
        return backend.step(dataclasses.replace(batch, pooling=PoolingBatch(*rows, sums, *labels)))

    none = np.zeros((1, SPEC.hidden_size))
    at_once, first = pooled(0, 4, none), pooled(0, 3, none)
    second = pooled(3, 4, first.sums)
    np.testing.assert_array_equal(second.sums, at_once.sums)
    np.testing.assert_array_equal(second.label_logits, at_once.label_logits)
    rms = np.sqrt((at_once.sums**2).mean())
    assert 1 < rms < 4  # the sum of four rows of about 1


@on_device
def test_int8_cache_stays_close(whole: np.ndarray) -> None:
    made = cuda(kv_cache_dtype="int8")
    logits = run_chunks(made, PROMPT[:4], 3, PAGES)
    assert 1e-4 < np.linalg.norm(logits - whole[:4]) / np.linalg.norm(whole[:4]) < 0.03
    assert made.page_bytes == 2 * 2 * 8 * (16 + 4)  # layers, k and v, tokens, numbers and a scale


@on_device
def test_8_bits_stay_close_and_keep_their_bits_in_chunks() -> None:
    spec = dataclasses.replace(SPEC, num_layers=1, windows=(0,), num_heads=8, hidden_size=64, intermediate_size=128)
    made = load(spec, load_cuda, device="auto", page_size=8, quantization="8bit")
    expected = run_chunks(load(spec, load_torch, dtype="float32", page_size=8), PROMPT[:5], 5, PAGES)
    logits = run_chunks(made, PROMPT[:5], 5, PAGES)
    assert 1e-3 < np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.05
    np.testing.assert_array_equal(run_chunks(made, PROMPT[:5], 3, [7]), logits)
    assert "8bit" in made.arithmetic and made.arithmetic.endswith("out 2 down 2")
    scales_too_many = 4 * 64 * (8 - 2 + 8 - 2)  # those of `out` and `down` count as if there were 8 spans
    assert made.footprint.weight_bytes == bytes_of_weights(random_parameters(spec), "8bit") - scales_too_many


@on_device
def test_8_bits_need_blocks_of_64_inputs() -> None:
    with pytest.raises(UnsupportedModel, match="multiple of 64"):
        cuda(quantization="8bit")


def pooling_of_label(row: int, token: int) -> PoolingBatch:
    none = np.zeros(0, np.int32)
    return PoolingBatch(none, none, np.zeros((0, 32)), np.array([row], np.int32), np.array([token], np.int32))


BAD = {
    "vocabulary": {"tokens": np.array([1, 203, 2], np.int32)},
    "order of position": {"positions": np.array([0, 10**6, 2], np.int32)},
    "from 0 to 511": {"positions": np.array([510, 511, 512], np.int32), "page_tables": np.zeros((1, 65), np.int32)},
    "from 0": {"positions": np.array([-1, 0, 1], np.int32)},
    "a label": {"pooling": pooling_of_label(row=0, token=203)},
    "not sampled": {"pooling": pooling_of_label(row=1, token=0)},
    "end of its page table": {"positions": np.array([6, 7, 8], np.int32)},
    "KV pool": {"page_tables": np.array([[10]], np.int32)},
    "sampled row": {"sample_rows": np.array([3], np.int32)},
    "stand for one in a place": {"tokens": np.array([1, -257, 2], np.int32)},
    "places need": {"places": np.array([256])},
    "run from 0": {"query_start": np.array([0, 2], np.int32)},
    "one entry per token": {"positions": np.array([1, 2], np.int32)},
}


@on_device
@pytest.mark.parametrize("message", BAD)
def test_a_batch_that_reaches_outside_is_refused(message: str, backend: Any) -> None:
    good = step_batch([([1, 2, 3], 0, [0])], [2])
    with pytest.raises(ValueError, match=message):
        backend.step(dataclasses.replace(good, **BAD[message]))


def test_spans_are_those_of_the_other_backends_where_they_are_equal() -> None:
    def spans(heads: int, head_dim: int, intermediate: int) -> tuple[int, ...]:
        spec = dataclasses.replace(
            SPEC, num_heads=heads, num_kv_heads=1, head_dim=head_dim, intermediate_size=intermediate
        )
        return tuple(spans_of(spec).values())

    assert spans(32, 128, 14336) == (8, 8)
    assert spans(9, 64, 1536) == (1, 8)
    assert spans(14, 64, 4864) == (2, 4)
    assert spans(12, 64, 448) == (4, 1)  # the cpu backend has 4 spans of 64 or 128 columns
    assert spans(2, 16, 48) == (1, 1)


@on_device
def test_arithmetic_names_the_spans(backend: Any) -> None:
    assert backend.arithmetic.endswith("out 1 down 2")


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@on_device
def test_full_memory_is_an_error_with_advice(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_batch([([1, 2, 3], 0, [0])], [2])
    for place, name, advice, call in (
        (cuda_weights, "_copy", "use a smaller model or quantization 8bit", cuda),
        (Inputs, "__init__", "smaller kv_cache_memory, gpu_memory_utilization, max_batch_size", cuda),
        (KvPool, "allocate", "10 KV pages do not fit", cuda),
        (cuda_backend, "sample", "a step of 3 tokens does not fit", lambda: backend.step(step)),
    ):
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory, match=advice):
            patch.setattr(place, name, no_memory)
            call()


@on_device
def test_a_closed_backend_keeps_no_memory() -> None:
    made = cuda()
    kept = (made._logits, made._kv.pool.memory, made._model.rotary, made._inputs._page_tables)
    large = [weakref.ref(tensor) for tensor in kept]
    del kept
    made.close()
    made.close()
    gc.collect()
    assert [ref() for ref in large] == [None] * 4


class Recorded:
    """A kernel whose launches are noted."""

    def __init__(self, name: str, kernel: Any, launched: set[str]):
        self._name, self._kernel, self._launched = name, kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._launched.add(self._name)
        return self._kernel[grid]


SAMPLING_KERNELS = {
    adjustment: ("_add_biases", "_count_history", "_penalize", "_mask"),
    selection: ("_survey", "_weigh", "_bound", "_gather"),
    draw: ("draw_kernel",),
    logprobs: ("_logprobs", "_count_likelier"),
}


@on_device
def test_every_kernel_is_compiled_before_the_first_request(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    for module, names in SAMPLING_KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorded(name, getattr(module, name), launched))
    backend.allocate_kv(10)
    assert launched == {name for names in SAMPLING_KERNELS.values() for name in names}
    launched.clear()
    rows: list[int] = []
    monkeypatch.setattr(backend, "_forward", lambda inputs: rows.append(len(inputs.tokens)))
    monkeypatch.setattr(cuda_backend, "compile_kernels", lambda steps, *_: [step() for step in steps])
    backend.warm_up(lambda: None)
    backend.allocate_kv(10)
    assert {max(4, (n - 1).bit_length()) for n in rows} == {4, 5, 6, 7, 8}  # of 16 to 256, as tiles are chosen
    assert launched == {name for names in SAMPLING_KERNELS.values() for name in names}


def ragged(rows: list[Any], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths in one array, and where each starts."""
    starts = np.array([0, *np.cumsum([len(row) for row in rows])], np.int32)
    return np.concatenate([np.asarray(row, dtype) for row in rows]), starts


def every_option(rng: np.random.Generator, rows: int, vocab: int) -> SamplingBatch:
    """Rows with all options of sampling, at random."""
    histories = [rng.integers(0, vocab, rng.integers(0, 40)) if r % 3 == 0 else [] for r in range(rows)]
    bias_tokens, bias_start = ragged([rng.permutation(vocab)[:5] if r % 4 == 0 else [] for r in range(rows)], np.int32)
    masks = [rng.integers(0, 2**32, rng.integers(1, 8), np.uint32) if r % 5 == 0 else [] for r in range(rows)]
    history, history_start = ragged(histories, np.int32)
    mask_words, mask_start = ragged(masks, np.uint32)
    bias = rng.normal(0, 3, len(bias_tokens))
    bias[::6] = -np.inf
    return SamplingBatch(
        temperature=rng.choice([0, 0.5, 1, 2], rows).astype(np.float32),
        top_k=rng.choice([0, 1, 5, 50, 500], rows).astype(np.int32),
        top_p=rng.choice([1, 0.9, 0.5, 0.01], rows).astype(np.float32),
        min_p=rng.choice([0, 0.1, 0.5], rows).astype(np.float32),
        seeds=rng.integers(0, 2**63, rows).astype(np.uint64),
        positions=rng.integers(0, 2**40, rows),
        num_logprobs=rng.choice([-1, 0, 3, 20], rows).astype(np.int32),
        repetition=np.full(rows, 1.3, np.float32),
        presence=np.full(rows, 0.4, np.float32),
        frequency=np.full(rows, 0.2, np.float32),
        history=history,
        history_start=history_start,
        history_outputs=np.array([len(row) // 2 for row in histories], np.int32),
        bias_tokens=bias_tokens,
        bias_values=bias.astype(np.float32),
        bias_start=bias_start,
        masks=mask_words,
        mask_start=mask_start,
    )


def sample(logits: np.ndarray, batch: SamplingBatch) -> StepResult:
    """Sample on the device."""
    names = [field.name for field in dataclasses.fields(SamplingBatch)]
    device = torch.device(DEVICE)
    sent = Staging(1 << 14, device).send({name: getattr(batch, name) for name in names})
    sampled = sampler.sample(torch.from_numpy(logits).to(device), DeviceSampling(**sent), batch)
    return sampled.result(sampled.words.cpu().numpy())


@on_device
@pytest.mark.parametrize("block", [1024, 128])
def test_sampling_agrees_with_numpy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_BLOCK", block)
    rng = np.random.default_rng(block)
    logits = rng.normal(0, 2, (12, 203)).astype(np.float32)
    logits[3, 5], logits[7, 9] = np.nan, np.inf
    logits[4], logits[5] = 1.0, np.round(logits[5])  # ties
    batch = every_option(rng, *logits.shape)
    result, expected = sample(logits, batch), plain_sample(logits, batch)
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    np.testing.assert_array_equal(result.ranks, expected.ranks)
    np.testing.assert_array_equal(result.top_tokens, expected.top_tokens)
    np.testing.assert_allclose(result.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.top_logprobs, expected.top_logprobs, rtol=0, atol=1e-5)
