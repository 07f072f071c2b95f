"""The CUDA backend: the decoder in Triton kernels, launched as CUDA graphs for all but the largest steps."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from octavo.backends.base import Footprint, Progress, StepBatch, StepResult
from octavo.errors import ConfigError
from octavo.model.decoder import describe
from octavo.model.shard import Shard
from octavo.model.spans import ORDER
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter

from .check import Limits
from .collectives import Group
from .compiling import compile_kernels
from .device import architecture, find_device, name_of, or_out_of_memory
from .first_steps import chunk, decode, step_of_every_kind
from .graph_shapes import MOST_ROWS, GraphShape, GraphShapes
from .graphs import Graphs
from .inputs import Inputs, Labels, StepInputs
from .kernels.rope_and_cache import rotary_table
from .kernels.sampler import sample
from .kernels.sampling_arrays import Sampled
from .memory import EXCHANGE, DeviceMemory, estimated_step_bytes, measure_steps, memory_of
from .ops import CudaOps, Model, check_ranks, spans_of, spans_of_shard
from .pages import Pages, bytes_of_page, heads_of_page
from .pooling import pooled_sums
from .roofline import Meter
from .staging import fetch
from .weight_bytes import bytes_of_weights
from .weights import Weights, check_stored, load_weights, nbytes, recipe_of

_SMALLER = "use a smaller kv_cache_memory, gpu_memory_utilization, max_batch_size, max_batch_tokens or max_model_len"


@dataclass(frozen=True)
class Pending:
    """A step that was launched. `result` may be called once."""

    batch: StepBatch
    sampled: Sampled
    words: Callable[[], np.ndarray]
    sums: Callable[[], np.ndarray] | None
    label_logits: Callable[[], np.ndarray] | None

    def result(self) -> StepResult:
        """Wait for the step and return its result."""
        result = self.sampled.result(self.words())
        if self.sums is None:
            return result
        labels = None if self.label_logits is None else self.label_logits().view(np.float32)
        return replace(result, sums=self.sums(), label_logits=labels)


class CudaBackend:
    """A Backend (see backends.base) of Triton kernels.

    Steps run in order on one stream. Pages move to and from the host on another.
    """

    runs_ahead = True

    def __init__(
        self,
        shard: Shard,
        weights: Weights,
        *,
        page_size: int,
        max_batch_tokens: int,
        max_batch_size: int,
        max_model_len: int,
        int8_kv: bool = False,
        capture_seconds: float = 20.0,
        group: Group | None = None,
    ):
        """Make the backend of weights that are on a device.

        Args:
            shard: the part of the model that it computes.
            capture_seconds: how long allocate_kv captures graphs. With 0 each step captures what it is the first to
                need.
            group: the ranks, if the model is divided. All of them make the same calls in the same order.
        """
        device = _tensor(weights["embed"]).device
        spec, self._part = shard.whole, shard.spec
        self.spec, self.page_size, self.page_bytes = spec, page_size, bytes_of_page(self._part, page_size, int8_kv)
        self.arithmetic = _arithmetic(device, spans_of(spec), recipe_of(weights), "int8" if int8_kv else "bf16")
        held = sum(nbytes(weight) for weight in weights.values())
        self.footprint = Footprint(f"Triton on {name_of(device)}", held, self.page_bytes)
        self._capture_seconds = capture_seconds
        self._int8_kv = int8_kv
        self._limits = Limits(spec.vocab_size, page_size, 0, max_batch_tokens, max_batch_size, max_model_len)
        self._pages: Pages | None = None
        self._shapes = GraphShapes(max_batch_size, max_batch_tokens)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._on_stream(), or_out_of_memory("the steps' arrays do not fit beside the weights", _SMALLER):
            rotary = torch.from_numpy(rotary_table(spec.rope.frequencies(spec.head_dim), max_model_len)).to(device)
            self._logits = torch.empty((self._shapes.most_sampled, spec.vocab_size), dtype=torch.float32, device=device)
            self._inputs = Inputs(self._part, page_size, max_model_len, self._shapes, device, int8_kv)
            self._norm = _tensor(weights["norm"]).float().cpu().numpy()
        self._model = Model(shard, weights, rotary, group)
        self.meter = Meter(self._part, weights, page_size, self.page_bytes, name_of(device))
        self._graphs = None if self._stream is None else Graphs(self._forward)

    @property
    def memory(self) -> DeviceMemory:
        """The memory of the device."""
        return memory_of(self._logits.device)

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels run on a GPU, not in Triton's interpreter."""
        return self._stream is not None

    @property
    def is_idle(self) -> bool:
        """Whether all steps that were launched have ended."""
        return self._stream is None or self._stream.query()

    def allocate_kv(self, num_pages: int) -> None:
        self.allocate_pages(num_pages)
        self.capture_graphs()
        self.step(step_of_every_kind())

    def allocate_pages(self, num_pages: int) -> None:
        """Allocate the KV pool, as the first part of allocate_kv. Raises OutOfMemory."""
        device = self._logits.device
        with self._on_stream(), or_out_of_memory(f"{num_pages} KV pages do not fit", _SMALLER):
            self._pages = Pages(self._part, self.page_size, num_pages, self._int8_kv, device)
            self._limits = replace(self._limits, num_pages=num_pages)

    def capture_graphs(self, before: Callable[[int], None] = lambda number: None) -> None:
        """Capture CUDA graphs until the time is over, as the second part of allocate_kv. Raises OutOfMemory.

        Args:
            before: told the number of each graph before it is captured, so that other ranks can `capture` it too.
        """
        end = time.monotonic() + self._capture_seconds
        for number in range(len(self._shapes.first) if self._graphs is not None else 0):
            if time.monotonic() > end:
                break
            before(number)
            self.capture(number)

    def capture(self, number: int) -> None:
        """Capture a graph of `capture_graphs`."""
        assert self._graphs is not None, "there are graphs on a GPU only"
        with self._on_stream(), or_out_of_memory("CUDA graphs do not fit beside weights and KV pages", _SMALLER):
            self._graphs.capture(self._first(self._shapes.first[number]))

    def heads_of_page(self, content: np.ndarray, spec: DecoderSpec | None = None) -> list[np.ndarray]:
        """Return views of a page's content by head: uint8 [layers, 2, kv_heads, bytes], for int8 those of scales too.

        Args:
            spec: the sizes of the model to which the page belongs; by default those of this part.
        """
        return heads_of_page(content, spec or self._part, self.page_size, self._int8_kv)

    def check(self, batch: StepBatch) -> None:
        """Raise ValueError if a step reaches outside of the model or the pool."""
        self._limits.check(batch)

    def export_page(self, page: int) -> np.ndarray:
        return self._kv.export(page)

    def import_page(self, page: int, content: np.ndarray) -> None:
        self._kv.write(page, content)

    def copy_page(self, source: int, target: int) -> None:
        with self._on_stream():
            self._kv.copy(source, target)

    def step(self, batch: StepBatch) -> StepResult:
        return self.launch(batch).result()

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> Pending:
        """Start a step: everything is in the order of the stream, and nothing waits for the device.

        Raises ValueError if the batch reaches outside of the model or the pool, OutOfMemory.
        """
        with self._on_stream(), _step_fits(batch), self.meter.clock.step():
            logits, pooled, inputs = self._run(batch)
            sampled = sample(logits, inputs.sampling, batch.sampling)
            inputs.kept[inputs.places] = sampled.words[: len(inputs.places)]
            pending = self._pending(batch, sampled, logits, pooled, inputs.labels)
        return pending

    @torch.inference_mode()
    def logits(self, batch: StepBatch) -> np.ndarray:
        with self._on_stream(), _step_fits(batch):
            logits: np.ndarray = self._run(batch)[0].cpu().numpy().copy()
        return logits

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._graphs = self._pages = None
        for name in ("_model", "_inputs", "_logits"):
            vars(self).pop(name, None)
        if self._stream is not None:
            torch.cuda.empty_cache()

    @property
    def _kv(self) -> Pages:
        assert self._pages is not None, "allocate_kv comes first"
        return self._pages

    def _run(self, batch: StepBatch) -> tuple[Tensor, Tensor | None, StepInputs]:
        """Launch the forward pass. Returns the logits of the sampled rows and, with a PoolingBatch, what it sums."""
        self.check(batch)
        inputs = self._inputs.send(batch, graph=self._graphs is not None and batch.pooling is None)
        if self._graphs is not None and inputs.shape is not None:
            return self._graphs.replay(inputs)[: len(batch.sample_rows)], None, inputs
        if len(batch.tokens) == 0:
            return self._logits[:0], None, inputs
        ops = CudaOps(self._model, self._kv.pool, inputs, self._logits)
        return _tensor(describe(self._part, ops)), ops.pooled, inputs

    @torch.inference_mode()
    def warm_up(self, alive: Callable[[], None]) -> None:
        """Compile the kernels of all steps, and measure the memory that steps take. Called before allocate_kv.

        Args:
            alive: called after each kernel.

        Raises OutOfMemory.
        """
        device, most = self._logits.device, self._limits.max_batch_tokens
        with self._on_stream(), or_out_of_memory(f"a step of {most} tokens does not fit beside the weights", _SMALLER):
            self._pages = Pages(self._part, self.page_size, 1, self._int8_kv, device)
            graphs = [partial(self._first_step, shape) for shape in self._shapes.of_each_power]
            eager: list[Callable[[], object]] = [self._sample_in_all_ways]
            if most > MOST_ROWS:
                eager.append(partial(self._forward_eagerly, MOST_ROWS + 1))
            compile_kernels([*graphs, *eager], device, alive)
            if device.type == "cuda":
                eager.append(partial(self._forward_eagerly, most))
                step_bytes = measure_steps(eager, graphs, device) + (EXCHANGE if self._model.group else 0)
                self.footprint = replace(self.footprint, step_bytes=step_bytes)
            self._pages = None

    def _forward_eagerly(self, rows: int) -> None:
        self._forward(self._inputs.send(chunk(rows)))

    def _first_step(self, shape: GraphShape) -> None:
        self._forward(self._first(shape))

    def _sample_in_all_ways(self) -> None:
        """Sample as many rows as a step may have."""
        step = step_of_every_kind(self._shapes.most_sampled)
        logits = self._logits[: len(step.sample_rows)].zero_()
        sample(logits, self._inputs.send(step).sampling, step.sampling)

    @torch.inference_mode()
    def _first(self, shape: GraphShape) -> StepInputs:
        """Return the inputs of some step of a shape."""
        step = chunk(shape.rows) if shape.chunks else decode(shape.rows)
        return self._inputs.send(step, graph=True)

    @torch.inference_mode()
    def _forward(self, inputs: StepInputs) -> Tensor:
        return _tensor(describe(self._part, CudaOps(self._model, self._kv.pool, inputs, self._logits)))

    def _pending(
        self, batch: StepBatch, sampled: Sampled, logits: Tensor, pooled: Tensor | None, labels: Labels | None
    ) -> Pending:
        words, pooling = fetch(sampled.words), batch.pooling
        if pooling is None or labels is None:
            return Pending(batch, sampled, words, None, None)
        hidden, eps, norm = self.spec.hidden_size, self.spec.norm_eps, self._norm
        residual = fetch(pooled.view(torch.int32)) if pooled is not None else lambda: np.zeros((0, hidden), np.int32)
        return Pending(
            batch,
            sampled,
            words,
            lambda: pooled_sums(residual().view(np.float32), norm, eps, pooling),
            fetch(logits[labels.rows, labels.tokens].view(torch.int32)),
        )

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def load(
    spec: DecoderSpec,
    parameters: Mapping[str, Parameter],
    *,
    page_size: int,
    max_batch_tokens: int,
    max_batch_size: int,
    max_model_len: int,
    threads: int,
    dtype: str,
    quantization: str,
    device: str,
    progress: Progress,
    kv_cache_dtype: str = "bf16",
) -> CudaBackend:
    """Put the weights on the device: a BackendFactory (see backends.base).

    Args:
        threads: not used.
        dtype: auto or bfloat16.
        quantization: none: weights in bfloat16; 8bit: the matrices of linear layers in int8; auto: in 4 bits where the
            file has 4; 4bit: the same, and it must have some.
        device: auto, cuda or cuda:N.
        kv_cache_dtype: bf16; or int8, with a scale for each K and each V of a position and kv head.

    Raises:
        ConfigError: a setting is not one of the above, or there is no such GPU.
        DamagedWeights, OutOfMemory, UnsupportedModel
    """
    shard = Shard(spec)
    weights = load_part(shard, parameters, dtype=dtype, quantization=quantization, device=device, progress=progress)
    read = sum(parameter.nbytes for parameter in parameters.values())
    return make_part(
        shard, weights, None, alive=partial(progress, read, read), page_size=page_size, kv_cache_dtype=kv_cache_dtype,
        max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size, max_model_len=max_model_len,
    )  # fmt: skip


def load_part(
    shard: Shard,
    parameters: Mapping[str, Parameter],
    *,
    dtype: str,
    quantization: str,
    device: str,
    progress: Progress,
    **_: Any,
) -> Weights:
    """Put the weights of a part of a model on the device: the first half of `load`.

    Args:
        parameters: those of the whole model.
    """
    _check_settings(dtype)
    found = find_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return load_weights(shard.parameters(parameters), found, progress, quantization, spans_of_shard(shard))


def make_part(
    shard: Shard,
    weights: Weights,
    group: Group | None,
    *,
    alive: Callable[[], None],
    page_size: int,
    max_batch_tokens: int,
    max_batch_size: int,
    max_model_len: int,
    kv_cache_dtype: str,
    **_: Any,
) -> CudaBackend:
    """Return the backend of a part of a model, with its kernels compiled: the second half of `load`.

    Args:
        group: see CudaBackend.
        alive: called after each kernel.
    """
    made = CudaBackend(
        shard,
        weights,
        page_size=page_size,
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        int8_kv=kv_cache_dtype == "int8",
        group=group,
    )
    if made.on_gpu:
        made.warm_up(alive)
    return made


def footprint(
    spec: DecoderSpec,
    parameters: Mapping[str, Parameter],
    *,
    page_size: int,
    max_batch_tokens: int,
    max_batch_size: int,
    dtype: str,
    quantization: str,
    device: str,
    kv_cache_dtype: str = "bf16",
    ranks: int = 1,
    **_: Any,
) -> Footprint:
    """Return the footprint of the backend that `load` would return, without reading weights. Raises ConfigError.

    Args:
        ranks: GPUs over which the model is divided. The footprint is then that of the first.
    """
    _check_settings(dtype)
    check_stored(parameters, quantization)
    check_ranks(spec, ranks)
    shard = Shard(spec, 0, ranks)
    weights = bytes_of_weights(shard.parameters(parameters), quantization)
    page = bytes_of_page(shard.spec, page_size, kv_cache_dtype == "int8")
    steps = estimated_step_bytes(shard.spec, max_batch_tokens, max_batch_size) + (EXCHANGE if ranks > 1 else 0)
    return Footprint(f"Triton on {name_of(find_device(device))}", weights, page, steps)


def _step_fits(batch: StepBatch) -> AbstractContextManager[None]:
    advice = "use a smaller max_batch_tokens or kv_cache_memory"
    return or_out_of_memory(f"a step of {len(batch.tokens)} tokens does not fit", advice)


def _check_settings(dtype: str) -> None:
    """Raise ConfigError if the backend cannot serve a setting."""
    if dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"the cuda backend computes in bfloat16, not {dtype}; use dtype auto or backend torch")


def _arithmetic(device: torch.device, spans: Mapping[str, int], recipe: str, kv: str) -> str:
    """Return what determines a page's bits: Triton's version, architecture, kernels and tiles, spans, data types."""
    kernels = blake2b(digest_size=8)
    for path in sorted(Path(__file__).with_name("kernels").iterdir()):
        if path.suffix in (".py", ".json"):
            kernels.update(path.read_bytes())
    sums = " ".join(f"{name} {count}" for name, count in spans.items())
    return f"cuda triton {triton.__version__} {architecture(device)} {kernels.hexdigest()} {recipe} {kv} {ORDER} {sums}"


def _tensor(logits: object) -> Tensor:
    assert isinstance(logits, Tensor)
    return logits
