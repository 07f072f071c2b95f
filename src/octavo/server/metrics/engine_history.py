"""EngineHistory: the counts of engines, with those of engines that have ended or were replaced."""

from collections.abc import Collection

import msgspec

from octavo.engine.messages import EngineStats
from octavo.fleet.model import Model
from octavo.frontend.stats import total


class EngineHistory:
    """Adds up the statistics of all engines that have had the same model name and number.

    An engine that has ended counts with the statistics that it reported last.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[Model, int], tuple[int | None, EngineStats]] = {}
        self._ended: dict[tuple[str, int], EngineStats] = {}

    def update(self, model: Model, number: int, pid: int | None, stats: EngineStats) -> None:
        """Note the statistics of a model's engine, which is the process `pid`."""
        before = self._latest.get((model, number))
        if before is not None and before[0] != pid:
            self._end(model.name, number, before[1])
        self._latest[model, number] = pid, msgspec.structs.replace(stats, page_map="")

    def latest(self, model: Model, number: int, pid: int | None) -> EngineStats | None:
        """Return what the process `pid` has reported last."""
        before = self._latest.get((model, number))
        return before[1] if before is not None and before[0] == pid else None

    def keep(self, models: Collection[Model]) -> None:
        """End the engines of all other models."""
        for model, number in list(self._latest):
            if model not in models:
                self._end(model.name, number, self._latest.pop((model, number))[1])

    def totals(self) -> dict[tuple[str, int], EngineStats]:
        """Return the counts by the model's name and the engine's number. Only counters are meaningful."""
        totals = dict(self._ended)
        for (model, number), (_, stats) in self._latest.items():
            key = model.name, number
            totals[key] = total([totals[key], stats]) if key in totals else stats
        return totals

    def _end(self, name: str, number: int, stats: EngineStats) -> None:
        key = name, number
        self._ended[key] = total([self._ended[key], stats]) if key in self._ended else stats
