"""What a step costs, by what is in it: a few curves and rates, measured once and kept as JSON."""

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from octavo.backends.base import StepBatch
from octavo.errors import ConfigError

Cost = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Curve = Annotated[list[tuple[int, Cost]], msgspec.Meta(min_length=1)]  # (count, milliseconds), by rising count


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how long a step takes."""

    sequences: int
    rows: int
    sampled: int  # rows
    kv_tokens: int  # tokens whose K and V are read, once for all rows of their sequence
    pairs: int  # (row, token that it attends to)

    @classmethod
    def of(cls, batch: StepBatch) -> "Shape":
        last = batch.positions[batch.query_start[1:] - 1]
        return cls(
            sequences=len(last),
            rows=len(batch.positions),
            sampled=len(batch.sample_rows),
            kv_tokens=len(last) + int(last.sum(dtype=np.int64)),
            pairs=len(batch.positions) + int(batch.positions.sum(dtype=np.int64)),
        )


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cost of a step is a sum: linear layers by rows, head and sampler by sampled rows, attention, and the host.

    Sliding windows are not looked at: attention costs what it did at the contexts that were measured.
    """

    settings: dict[str, Any]  # of the engine that was measured, by the names of EngineConfig
    machine: dict[str, Any]  # what it ran on; for people to read
    page_size: Count  # tokens
    page_bytes: Count
    num_pages: Count  # that it had; a simulation's default
    max_model_len: Annotated[int, msgspec.Meta(ge=2)]
    rows_ms: Curve
    sampled_ms: Curve
    kv_token_us: Cost
    pair_us: Cost
    step_ms: Cost  # the host's own, outside the backend, as the next two
    sequence_us: Cost
    row_us: Cost
    seconds_per_page: Cost = 0.0  # to bring a page back from the tier below the pool

    def seconds(self, shape: Shape) -> float:
        milliseconds = interpolate(self.rows_ms, shape.rows) + self.step_ms
        if shape.sampled:
            milliseconds += interpolate(self.sampled_ms, shape.sampled)
        attention = self.kv_token_us * shape.kv_tokens + self.pair_us * shape.pairs
        host = self.sequence_us * shape.sequences + self.row_us * shape.rows
        return milliseconds / 1e3 + (attention + host) / 1e6

    def save(self, path: Path) -> None:
        """Raises ConfigError if that cannot be."""
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> "CostModel":
        """Raises ConfigError, one line, if the file is not what `save` writes."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path} is not a cost model ({error}); make one with --measure") from None


def interpolate(curve: Curve, count: int) -> float:
    """Milliseconds at `count`: in a line between two points, and on along the last one beyond the end."""
    i = bisect_left(curve, count, key=lambda point: point[0])
    if i == 0 or len(curve) == 1:
        return curve[0][1]
    (x0, y0), (x1, y1) = curve[i - 1 : i + 1] if i < len(curve) else curve[-2:]
    return y0 + (y1 - y0) * (count - x0) / (x1 - x0)
