"""Run the simulations of `octavo simulate`: of one configuration, or of every combination of a sweep."""

import dataclasses
from collections.abc import Sequence
from itertools import product
from typing import Any

import msgspec

from octavo.bench.report import progress
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.settings import convert

from .costs import CostModel
from .placement import EXACT, ROUTINGS
from .replay import Replay, simulate
from .report import summarize
from .trace import TraceRequest

PAGES, ROUTING = "pages", "routing"  # axes of sweeps that are not settings


def sweep(
    arrivals: Sequence[TraceRequest],
    config: EngineConfig,
    costs: CostModel,
    pages: int | None,
    axes: Sequence[tuple[str, Sequence[str]]],
    routing: str = EXACT,
) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Simulate every combination of `axes`: settings, "pages" or "routing", with the values to try.

    Returns:
        (Values by name, summary) of each combination; without axes, of one combination without values.

    Raises:
        ConfigError: For a setting or value that does not exist, or that the cost model does not cover.
    """
    runs = []
    for values in product(*(values for _, values in axes)):
        chosen = dict(zip((name for name, _ in axes), values, strict=True))
        runs.append((chosen, _run(arrivals, config, costs, pages, routing, chosen)))
    return runs


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Return the name and values of an axis such as pages=500,1000. Raises ConfigError."""
    name, _, values = text.partition("=")
    if not name or not all(values.split(",")):
        raise ConfigError(f"--sweep must be name=values such as pages=500,1000, not {text!r}")
    return name.strip().replace("-", "_"), values.split(",")


def _run(
    arrivals: Sequence[TraceRequest],
    config: EngineConfig,
    costs: CostModel,
    pages: int | None,
    routing: str,
    chosen: dict[str, str],
) -> dict[str, Any]:
    """Return the summary of one simulation, with the throughput that the engine sustains.

    This throughput comes from a second simulation, in which all requests arrive at the start and none is refused.
    Only those with `think_time` wait for the end of the request before them.
    """
    for name, value in chosen.items():
        if name == PAGES:
            pages = _parse_pages(value)
        elif name == ROUTING:
            routing = value
        else:
            config = config.replaced(name, value)
    check(config, costs)
    if routing not in ROUTINGS:
        raise ConfigError(f"routing must be one of {', '.join(ROUTINGS)}, not {routing!r}")
    pages = num_pages(config, costs, pages)
    at_once = [_at_once(request) for request in arrivals]
    patient = dataclasses.replace(config, max_queue=len(arrivals), request_timeout=None)
    with progress(" ".join(chosen.values()) or "Simulating", 2 * len(arrivals)) as advance:

        def run(requests: Sequence[TraceRequest], settings: EngineConfig) -> Replay:
            return simulate(requests, settings, costs, pages, advance, routing)

        summary, saturated = summarize(run(arrivals, config)), summarize(run(at_once, patient))
    return summary | {"sustained_per_second": saturated["requests_per_second"]}


def num_pages(config: EngineConfig, costs: CostModel, pages: int | None) -> int:
    """Return the pages of an engine: those given, those that kv_cache_memory holds, or those of the measured one."""
    if pages is not None:
        return pages
    return costs.num_pages if config.kv_cache_memory is None else config.kv_cache_memory // costs.page_bytes


def _at_once(request: TraceRequest) -> TraceRequest:
    think_time = None if request.think_time is None else 0.0
    return msgspec.structs.replace(request, at=0.0, timeout=None, think_time=think_time)


def check(config: EngineConfig, costs: CostModel) -> None:
    """Raise ConfigError for settings whose effect the cost model does not cover."""
    defaults = EngineConfig()
    for name, measured in costs.settings.items():
        if (value := getattr(config, name, measured)) not in (getattr(defaults, name, None), measured):
            raise ConfigError(f"the cost model was measured with {name} {measured}: measure again with {value}")
    if (config.kv_disk or config.kv_host_memory) and not costs.seconds_per_page:
        raise ConfigError(
            "the cost model was measured without a lower tier of the KV cache; measure again with --kv-disk FOLDER"
        )
    if config.kv_store:
        raise ConfigError("a simulation has no shared store; leave out kv_store")
    if config.speculative_tokens:
        raise ConfigError("a simulation has no text from which to draft tokens; leave out speculative_tokens")


def _parse_pages(text: str) -> int:
    try:
        pages: int = convert(text, int)
    except ValueError:
        pages = 0
    if pages < 1:
        raise ConfigError(f"pages must be an integer of at least 1, not {text!r}")
    return pages
