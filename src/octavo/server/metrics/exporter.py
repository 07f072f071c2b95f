"""Exporter: collect what a scrape shows, and render it off the event loop."""

import asyncio
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from octavo.config import EngineConfig
from octavo.engine.messages import EngineStats
from octavo.fleet.fleet import Fleet
from octavo.fleet.model import Model
from octavo.frontend.meter import Meter
from octavo.server.stats import ModelStats, model_stats

from .devices import Devices
from .engine_history import EngineHistory
from .families import Families
from .http_meter import HttpMeter
from .text_format import render
from .window import Window


@dataclass(frozen=True, slots=True)
class EngineNow:
    """An engine at the time of a scrape.

    Attributes:
        model: the name of its model.
        stats: its latest statistics; None if it has never reported any, or has ended.
        waiting: completions that wait for it, or in it.
        max_model_len: maximum tokens of prompt and output together.
    """

    model: str
    number: int
    config: EngineConfig
    stats: EngineStats | None
    waiting: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a scrape shows.

    Attributes:
        meters: by the model's name.
        totals: statistics of engines and of those before them, by the model's name and the engine's number.
        swap_rates: pages per second that came back from lower tiers, by the same.
        devices: utilization in percent, by the device's name.
    """

    meters: dict[str, Meter]
    engines: list[EngineNow]
    totals: dict[tuple[str, int], EngineStats]
    swap_rates: dict[tuple[str, int], float]
    devices: dict[str, float]
    http: HttpMeter


class Exporter:
    """Serves the metrics of a fleet. Nothing is collected between scrapes but what the meters count.

    Args:
        fleet: its `meters` are set.
    """

    def __init__(self, fleet: Fleet, http: HttpMeter):
        self._fleet, self._http = fleet, http
        self._history, self._devices = EngineHistory(), Devices()
        self._swaps: dict[tuple[str, int], Window] = {}
        self._process = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._process)

    async def scrape(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        models = self._fleet.all_models()
        statistics = await asyncio.gather(*map(model_stats, models))
        utilization = await asyncio.to_thread(self._devices.utilization)  # a GPU's driver may take its time
        for model, stats in zip(models, statistics, strict=True):
            for number, replica in enumerate(stats.replicas):
                if replica.engine is not None:
                    self._history.update(model, number, replica.pid, replica.engine)
        self._history.keep(self._fleet.all_models())
        snapshot = self._snapshot(models, statistics, utilization)
        return await asyncio.to_thread(self._render, snapshot)

    def _snapshot(self, models: list[Model], statistics: list[ModelStats], devices: dict[str, float]) -> Snapshot:
        assert self._fleet.meters is not None
        engines = [
            engine for model, stats in zip(models, statistics, strict=True) for engine in self._engines(model, stats)
        ]
        for engine in engines:
            self._fleet.meters[engine.model].engine(engine.number)  # its series are there before its first request
        totals = self._history.totals()
        fetched = {key: stats.pages_fetched for key, stats in totals.items()}
        return Snapshot(
            meters={name: meter.copy() for name, meter in self._fleet.meters.items()},
            engines=engines,
            totals=totals,
            swap_rates={key: self._swaps.setdefault(key, Window(pages)).rate(pages) for key, pages in fetched.items()},
            devices=devices,
            http=self._http.copy(),
        )

    def _engines(self, model: Model, stats: ModelStats) -> list[EngineNow]:
        """Return the engines of a model. While none reports, the first one has all that waits."""
        length = stats.limits.max_model_len if stats.limits else 0
        latest = [
            replica.engine or self._history.latest(model, number, replica.pid)
            for number, replica in enumerate(stats.replicas)
        ]
        waiting = [engine.waiting if engine else 0 for engine in latest] or [0]
        if not any(latest) and stats.frontend is not None:
            waiting[0] = stats.frontend.live
        return [
            EngineNow(model.name, number, model.config, engine, waiting[number], length)
            for number, engine in enumerate(latest or [None])
        ]

    def _render(self, snapshot: Snapshot) -> bytes:
        return render(Families(snapshot)) + generate_latest(self._process)
