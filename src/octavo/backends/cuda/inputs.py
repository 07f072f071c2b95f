"""What the kernels of a step read, made from its StepBatch: arrays on the device, and attention's plan."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.model.spec import DecoderSpec

from .graph_shapes import GraphShape, GraphShapes
from .kernels.attention import Parts, Tiles
from .kernels.attention_plan import TILE_FIELDS, plan, tilings
from .kernels.rope_and_cache import StepRows
from .kernels.sampling_arrays import DeviceSampling
from .staging import Staging

_SLOTS = 4096  # sums of a row over a part of its context that can wait to be merged
_EXTRA_WORDS = 1 << 21  # of histories, biases and masks that travel with a step's other arrays
_NO_PLACES = np.zeros(0, np.int32)
_SAMPLING = [field.name for field in fields(SamplingBatch)]


@dataclass(frozen=True)
class Labels:
    """Logits that pooled requests want: tokens of sampled rows, int32 [L] each."""

    rows: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class StepInputs:
    """What the kernels of a step read, on the device. Arrays of integers are int32.

    Attributes:
        tokens: [N], as in the StepBatch.
        kept: the sampled tokens by place, those of earlier steps too: [max_batch_size or more].
        places: [R], those of the sampled rows; none if the StepBatch names none.
        rows: where the N rows are.
        sample_rows: [R].
        work: the tiles of attention.
        parts: where attention merges.
        sampling: of the rows that the StepBatch samples.
        shape: the size that the step was padded to, for a CUDA graph.
        labels: of the PoolingBatch, if there is one.
    """

    tokens: Tensor
    kept: Tensor
    places: Tensor
    rows: StepRows
    sample_rows: Tensor
    work: list[Tiles]
    parts: Parts
    sampling: DeviceSampling
    shape: GraphShape | None
    labels: Labels | None


class Inputs:
    """Makes the inputs of steps. Each step overwrites those of the step before, in the order of the stream.

    The sampled tokens of earlier steps stay.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        page_size: int,
        max_model_len: int,
        shapes: GraphShapes,
        device: torch.device,
        int8_kv: bool = False,
    ):
        """Allocate memory for the arrays of steps."""
        self._shapes, rows = shapes, shapes.most_sampled
        self._group = spec.num_heads // spec.num_kv_heads
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self._small, self._large = tilings(spec.head_dim, self._group, int8_kv, hopper)
        self._kv_heads = spec.num_kv_heads
        width = -(-max_model_len // page_size)
        capacity = (
            2 * (8 + TILE_FIELDS) * shapes.max_batch_tokens + (width + 32) * rows + TILE_FIELDS * _SLOTS + _EXTRA_WORDS
        )
        self._staging = Staging(capacity, device)
        self._sampled = torch.zeros(rows, dtype=torch.int32, device=device)
        self._page_tables = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self._parts = Parts.allocate(_SLOTS, spec.num_heads, spec.num_kv_heads, spec.head_dim, device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._programs = 4 * processors, 2 * processors  # of small tiles, and of large ones in a graph
        self._enough = -(-2 * processors // spec.num_kv_heads)

    def send(self, batch: StepBatch, graph: bool = False) -> StepInputs:
        """Copy a step's arrays to the device.

        Args:
            graph: pad the step to the shape of a CUDA graph, if it fits one. What the graph reads then lies at the same
                addresses in each step of this shape. Added rows have position -1: nothing of them is computed in
                attention, or written to the pool.
        """
        cut = plan(
            batch.query_start,
            batch.positions,
            self._group,
            self._small.rows,
            self._large.rows,
            _SLOTS,
            self._enough,
        )
        rows, sequences = len(batch.tokens), len(batch.page_tables)
        shape = self._shapes.choose(rows, len(batch.sample_rows), sequences, len(cut.large) > 0) if graph else None
        more_small = more_large = 0
        if shape is not None and shape.chunks:
            more_small = shape.rows + _SLOTS - len(cut.small)  # so that the large tiles have a fixed address
            more_large = 1 if len(cut.large) == 0 else 0  # an empty tensor would have none
        more = 0 if shape is None else shape.rows - rows
        more_sampled = 0 if shape is None else shape.sampled - len(batch.sample_rows)
        arrays = {
            "tokens": _padded(batch.tokens, more, 0),
            "positions": _padded(batch.positions, more, -1),
            "sequences": _padded(np.repeat(np.arange(sequences), np.diff(batch.query_start)), more, 0),
            "sample_rows": _padded(batch.sample_rows, more_sampled, 0),
            "counts": np.array([len(cut.small), len(cut.large)], np.int32),
            "small": _padded(cut.small, more_small, 0),
            "large": _padded(cut.large, more_large, 0),
        }
        arrays["places"] = _NO_PLACES if batch.places is None else batch.places.astype(np.int32)
        arrays |= {f"sampling {name}": getattr(batch.sampling, name) for name in _SAMPLING}
        if batch.pooling is not None:
            arrays |= {"label rows": batch.pooling.label_rows, "label tokens": batch.pooling.label_tokens}
        sent = self._staging.send(arrays | {"page_tables": batch.page_tables})
        return StepInputs(
            sent["tokens"],
            self._sampled,
            sent["places"],
            StepRows(
                sent["positions"],
                sent["sequences"],
                sent["page_tables"] if shape is None else self._kept(sent["page_tables"]),
            ),
            sent["sample_rows"],
            self._work(sent, shape),
            self._parts,
            DeviceSampling(**{name: sent[f"sampling {name}"] for name in _SAMPLING}),
            shape,
            None if batch.pooling is None else Labels(sent["label rows"], sent["label tokens"]),
        )

    def _work(self, sent: dict[str, Tensor], shape: GraphShape | None) -> list[Tiles]:
        """Return the tiles of attention. In a graph, a fixed number of programs shares them."""
        many = len(sent["large"]) * self._kv_heads if shape is None else self._programs[1]
        small = Tiles(sent["small"], sent["counts"][:1], self._programs[0], self._small)
        large = Tiles(sent["large"], sent["counts"][1:], many, self._large)
        if shape is not None:
            return [small, large] if shape.chunks else [small]
        return [tiles for tiles in (small, large) if len(tiles.tiles)]

    def _kept(self, tables: Tensor) -> Tensor:
        """Copy the page tables of a step to where graphs read them."""
        rows, width = tables.shape[0], min(tables.shape[1], self._page_tables.shape[1])
        self._page_tables[:rows, :width].copy_(tables[:, :width])
        return self._page_tables


def _padded(array: np.ndarray, more: int, value: int) -> np.ndarray:
    """Return an int32 array with `more` entries of `value` after its own."""
    if more == 0 and array.dtype == np.int32:
        return array
    return np.concatenate([array, np.full((more, *array.shape[1:]), value, np.int32)]).astype(np.int32)
