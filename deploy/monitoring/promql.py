"""PromQL: queries over metrics that exist, with labels that these have."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from octavo.server.metrics.catalog import catalog


def _exported() -> Iterator[tuple[str, frozenset[str]]]:
    """Return the names of all exported series and their labels, with those that Prometheus adds."""
    yield "up", frozenset({"job", "instance"})
    for family in catalog():
        labels = {*family.labels, "job", "instance"}
        if family.kind == "histogram":
            yield f"{family.name}_sum", frozenset(labels)
            yield f"{family.name}_count", frozenset(labels)
            yield f"{family.name}_bucket", frozenset(labels | {"le"})
        else:
            yield family.name, frozenset(labels)


EXPORTED = dict(_exported())


@dataclass(frozen=True)
class PromQL:
    """Writes queries. Raises ValueError for a name or a label that does not exist.

    Attributes:
        window: the range of rates, such as "5m".
        filters: regular expressions by label; they apply to each metric that has the label.
        metrics: the labels of each metric, by its name.
    """

    window: str
    filters: Mapping[str, str]
    metrics: Mapping[str, frozenset[str]]

    def series(self, name: str, **equal: str) -> str:
        """Return the series of a metric whose labels have these values."""
        self._check(name, equal)
        filters = [f'{label}=~"{regex}"' for label, regex in self.filters.items() if label in self.metrics[name]]
        matchers = [*filters, *(f'{label}="{value}"' for label, value in equal.items())]
        return f"{name}{{{', '.join(matchers)}}}" if matchers else name

    def sum(self, name: str, *by: str, **equal: str) -> str:
        """Return the sum of a gauge."""
        return self._total(name, self.series(name, **equal), by)

    def rate(self, name: str, *by: str, **equal: str) -> str:
        """Return the increase of a counter per second."""
        return self._total(name, f"rate({self.series(name, **equal)}[{self.window}])", by)

    def increase(self, name: str, *by: str, window: str = "$__range", **equal: str) -> str:
        """Return the increase of a counter within a range; by default the one that the dashboard shows."""
        return self._total(name, f"increase({self.series(name, **equal)}[{window}])", by)

    def ratio(self, part: str, whole: str, *by: str) -> str:
        """Return the increase of a counter divided by that of another."""
        return f"{self.rate(part, *by)} / {self.rate(whole, *by)}"

    def mean(self, histogram: str, *by: str) -> str:
        """Return the mean of the values that a histogram has counted."""
        return self.ratio(f"{histogram}_sum", f"{histogram}_count", *by)

    def quantile(self, quantile: float, histogram: str, *by: str) -> str:
        """Return a quantile of the values that a histogram has counted, such as 0.95."""
        return f"histogram_quantile({quantile}, {self.rate(f'{histogram}_bucket', 'le', *by)})"

    def _total(self, name: str, values: str, by: tuple[str, ...]) -> str:
        self._check(name, by)
        return f"sum by ({', '.join(by)}) ({values})" if by else f"sum({values})"

    def _check(self, name: str, labels: Mapping[str, str] | tuple[str, ...]) -> None:
        if name not in self.metrics:
            raise ValueError(f"there is no metric {name!r}: Octavo exports those in docs/metrics.md")
        if unknown := set(labels) - self.metrics[name]:
            raise ValueError(f"{name!r} has no label {', '.join(unknown)}: it has {', '.join(self.metrics[name])}")
