"""The cost model: the time of a step as a function of its shape, measured once and stored in a JSON file."""

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
    """The counts that a step's time depends on."""

    sequences: int
    rows: int
    sampled: int  # rows
    kv_tokens: int  # tokens whose keys and values are read, once for all rows of a sequence
    pairs: int  # pairs of a row and a token that it attends to

    @classmethod
    def of(cls, batch: StepBatch) -> "Shape":
        """Return the shape of a step."""
        last = batch.positions[batch.query_start[1:] - 1]
        return cls(
            sequences=len(last),
            rows=len(batch.positions),
            sampled=len(batch.sample_rows),
            kv_tokens=len(last) + int(last.sum(dtype=np.int64)),
            pairs=len(batch.positions) + int(batch.positions.sum(dtype=np.int64)),
        )


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The time of a step, in milliseconds:

        rows_ms(rows) + sampled_ms(sampled) + step_ms
        + (kv_token_us * kv_tokens + pair_us * pairs + sequence_us * sequences + row_us * rows) / 1000

    where the two curves are linear between the measured points. Sliding windows are not modeled.
    """

    settings: dict[str, Any]  # of the measured engine, by their names in EngineConfig
    machine: dict[str, Any]  # where it was measured; not used
    page_size: Count  # tokens
    page_bytes: Count
    num_pages: Count  # of the measured engine: the default of a simulation
    max_model_len: Annotated[int, msgspec.Meta(ge=2)]
    rows_ms: Curve  # linear layers and everything row-wise
    sampled_ms: Curve  # head and sampler, by sampled rows
    kv_token_us: Cost  # attention, together with pair_us
    pair_us: Cost
    step_ms: Cost  # Python outside the backend, together with sequence_us and row_us
    sequence_us: Cost
    row_us: Cost
    seconds_per_page: Cost = 0.0  # to fetch a page from a lower tier; 0: there was none

    def seconds(self, shape: Shape) -> float:
        """Return the time of a step."""
        milliseconds = interpolate(self.rows_ms, shape.rows) + self.step_ms
        if shape.sampled:
            milliseconds += interpolate(self.sampled_ms, shape.sampled)
        attention = self.kv_token_us * shape.kv_tokens + self.pair_us * shape.pairs
        host = self.sequence_us * shape.sequences + self.row_us * shape.rows
        return milliseconds / 1e3 + (attention + host) / 1e6

    def save(self, path: Path) -> None:
        """Write the model to a file. Raises ConfigError."""
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> "CostModel":
        """Return the model that `save` wrote to a file. Raises ConfigError."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path} is not a cost model ({error}); make one with --measure") from None


def interpolate(curve: Curve, count: int) -> float:
    """Return the milliseconds at `count`: linear between points, and extrapolated from the last two beyond the end."""
    i = bisect_left(curve, count, key=lambda point: point[0])
    if i == 0 or len(curve) == 1:
        return curve[0][1]
    (x0, y0), (x1, y1) = curve[i - 1 : i + 1] if i < len(curve) else curve[-2:]
    return y0 + (y1 - y0) * (count - x0) / (x1 - x0)
