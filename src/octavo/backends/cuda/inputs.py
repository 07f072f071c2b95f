"""What the kernels of a step read, made from its StepBatch: arrays on the device, and attention's plan."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.model.spec import DecoderSpec

from .kernels.attention import Parts, Tiles
from .kernels.attention_plan import TILE_FIELDS, plan, tilings
from .kernels.rope_and_cache import StepRows
from .kernels.sampler import DeviceSampling
from .staging import Staging

_SLOTS = 4096  # sums of a row over a part of its context that can wait to be merged
_EXTRA_WORDS = 1 << 21  # of histories, biases and masks that travel with a step's other arrays
_SAMPLING = [field.name for field in fields(SamplingBatch)]


@dataclass(frozen=True)
class StepInputs:
    """What the kernels of a step read, on the device. Arrays of integers are int32.

    Attributes:
        tokens: [N].
        rows: where the N rows are.
        sample_rows: [R].
        work: the tiles of attention.
        parts: where attention merges.
        sampling: of the rows that the StepBatch samples.
    """

    tokens: Tensor
    rows: StepRows
    sample_rows: Tensor
    work: list[Tiles]
    parts: Parts
    sampling: DeviceSampling


class Inputs:
    """Makes the inputs of steps. Each step overwrites those of the step before, in the order of the stream."""

    def __init__(
        self,
        spec: DecoderSpec,
        page_size: int,
        max_model_len: int,
        max_batch_tokens: int,
        rows: int,
        device: torch.device,
        int8_kv: bool = False,
    ):
        """Allocate memory for steps of `max_batch_tokens` tokens and graphs of `rows` rows."""
        self._group = spec.num_heads // spec.num_kv_heads
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self._small, self._large = tilings(spec.head_dim, self._group, int8_kv, hopper)
        self._kv_heads = spec.num_kv_heads
        width = -(-max_model_len // page_size)
        capacity = (8 + TILE_FIELDS) * max_batch_tokens + (width + 32) * rows + TILE_FIELDS * _SLOTS + _EXTRA_WORDS
        self._staging = Staging(capacity, device)
        self._page_tables = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self._parts = Parts.allocate(_SLOTS, spec.num_heads, spec.num_kv_heads, spec.head_dim, device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._programs = 4 * processors  # of small tiles
        self._enough = -(-2 * processors // spec.num_kv_heads)

    def send(self, batch: StepBatch, size: int | None = None) -> StepInputs:
        """Copy a step's arrays to the device.

        Args:
            size: pad a step of one row for each sequence to so many rows, for a CUDA graph. What the graph reads then
                lies at the same addresses in each step of this size. The added rows have position -1: nothing of them
                is computed in attention, or written to the pool.
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
        more = 0 if size is None else size - len(batch.tokens)
        arrays = {
            "tokens": _padded(batch.tokens, more, 0),
            "positions": _padded(batch.positions, more, -1),
            "sequences": _padded(np.repeat(np.arange(len(batch.page_tables)), np.diff(batch.query_start)), more, 0),
            "sample_rows": _padded(batch.sample_rows, 0 if size is None else size - len(batch.sample_rows), 0),
            "counts": np.array([len(cut.small), len(cut.large)], np.int32),
            "small": cut.small,
            "large": cut.large,
        }
        arrays |= {f"sampling {name}": getattr(batch.sampling, name) for name in _SAMPLING}
        sent = self._staging.send(arrays | {"page_tables": batch.page_tables})
        tables = sent["page_tables"] if size is None else self._kept(sent["page_tables"], size)
        work = [
            Tiles(sent["small"], sent["counts"][:1], self._programs, self._small),
            Tiles(sent["large"], sent["counts"][1:], len(cut.large) * self._kv_heads, self._large),
        ]
        return StepInputs(
            sent["tokens"],
            StepRows(sent["positions"], sent["sequences"], tables),
            sent["sample_rows"],
            work[:1] if size is not None else [tiles for tiles in work if len(tiles.tiles)],
            self._parts,
            DeviceSampling(**{name: sent[f"sampling {name}"] for name in _SAMPLING}),
        )

    def _kept(self, tables: Tensor, size: int) -> Tensor:
        """Copy the page tables of a decode step to where graphs read them."""
        rows, width = tables.shape[0], min(tables.shape[1], self._page_tables.shape[1])
        self._page_tables[:rows, :width].copy_(tables[:, :width])
        return self._page_tables[:size]


def _padded(array: np.ndarray, more: int, value: int) -> np.ndarray:
    """Return an int32 array with `more` entries of `value` after its own."""
    if more == 0 and array.dtype == np.int32:
        return array
    return np.concatenate([array, np.full((more, *array.shape[1:]), value, np.int32)]).astype(np.int32)
