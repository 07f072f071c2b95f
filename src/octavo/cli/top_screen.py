"""The screen of octavo top: one frame, drawn from a server's statistics at two moments."""

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from octavo.engine.messages import EngineStats
from octavo.errors import ConfigError
from octavo.frontend.stats import FrontendStats
from octavo.kv.page_map import MOVING, PINNED
from octavo.kv.page_pool import CACHED, FREE, IN_USE
from octavo.server.stats import Limits, ModelStats, ServerStats
from octavo.terminal import printable

_BAR = 16  # characters


@dataclass(frozen=True)
class Mark:
    """How to draw a KV page. Marks differ in shape and in color."""

    glyph: str
    style: str
    name: str


_MARKS = {
    IN_USE: Mark("█", "green", "in use"),
    CACHED: Mark("▒", "blue", "cached"),
    FREE: Mark("·", "bright_black", "free"),
    PINNED: Mark("◆", "yellow", "pinned by KV states"),
    MOVING: Mark("↑", "magenta", "being fetched from a lower tier"),
}


def frame(now: ServerStats, before: ServerStats | None, model: str | None = None) -> RenderableType:
    """Return a frame. Rates are measured between `before` and `now`; without `before` they are shown as –.

    Args:
        model: the model of which all statistics are shown; by default the first one that is loaded. If the server has
            several models or engines, a table of them is shown above.
    """
    version = printable(now.version, lines=False)
    parts: list[RenderableType] = []
    several = len(now.models) > 1 or len(now.models[0].replicas) > 1
    if several:
        parts += [_overview(now, before), Text()]
    shown = _shown(now, model)
    names = f"{printable(shown.name, lines=False)} · {printable(shown.policy, lines=False)}"
    title = Text.assemble(("octavo top", "bold cyan"), f"  {names} · version {version}")
    if shown.engine is None or shown.limits is None or shown.frontend is None:
        status = next((replica.status for replica in shown.replicas), shown.error or f"the model is {shown.state}")
        return Group(title, Text(), *parts, Text(printable(status, lines=False), style="yellow"))
    look = _Look(shown.engine, shown.limits, shown.frontend)
    rates = _Rates(now.time, shown.engine, *_earlier(before, shown))
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    for name, text in (
        ("requests", _requests(look)),
        ("queue", _queue(look)),
        ("tenants", _tenants(look.frontend)),
        ("so far", _so_far(look)),
        ("batch", _batch(look)),
        ("steps", _steps(rates)),
        ("tokens", _tokens(rates)),
        ("prefixes", _prefixes(look.engine, rates)),
        ("pages", _pages(look.engine)),
        ("swapped", _swapped(look.engine, rates)),
    ):
        if text:
            rows.add_row(name, text)
    return Group(title, Text(), *parts, rows, Text(), _page_map(look.engine.page_map), _legend())


@dataclass(frozen=True)
class _Look:
    """The statistics of one model that is loaded."""

    engine: EngineStats
    limits: Limits
    frontend: FrontendStats


def _shown(now: ServerStats, model: str | None) -> ModelStats:
    """Return the model to show. Raises ConfigError if the server has no model of that name."""
    if model is None:
        return next((each for each in now.models if each.engine is not None), now.models[0])
    for each in now.models:
        if model in (each.name, *each.aliases):
            return each
    raise ConfigError(f"the server has no model {model!r}; it has {', '.join(each.name for each in now.models)}")


def _earlier(before: ServerStats | None, now: ModelStats) -> tuple[float, EngineStats | None]:
    """Return the statistics of the same engines before, and their time."""
    for model in before.models if before is not None else ():
        if model.name == now.name and _pids(model) == _pids(now) and before is not None:
            return before.time, model.engine
    return 0.0, None


def _pids(model: ModelStats) -> list[int | None]:
    return [replica.pid for replica in model.replicas]


def _overview(now: ServerStats, before: ServerStats | None) -> Table:
    """Return a table with a row for each engine, and one for each model without engines."""
    table = Table("model", "engine", "state", "running", "waiting", "tokens/s", "cached", box=None, pad_edge=False)
    for model in now.models:
        name = printable(model.name, lines=False)
        if not model.replicas:
            state = f"{model.state}: {model.error}" if model.error else model.state
            table.add_row(Text(name), "", Text(printable(state, lines=False)), "", "", "", "")
        for replica in model.replicas:
            engine, earlier = replica.engine, _earlier_replica(before, replica.pid)
            state = ("draining" if model.state == "draining" else "ready") if replica.is_ready else replica.status
            role = "" if replica.role == "both" else f" ({replica.role})"
            cells = [Text(name), Text(f"{replica.name}{role}"), Text(printable(state, lines=False))]
            if engine is not None:
                rates = _Rates(now.time, engine, *earlier)
                hits = f"{engine.cached_tokens / engine.prompt_tokens:.0%}" if engine.prompt_tokens else "–"
                numbers = (f"{engine.running:,}", f"{engine.waiting:,}", rates.per_second("tokens_generated"), hits)
                cells += map(Text, numbers)
            table.add_row(*cells)
    return table


def _earlier_replica(before: ServerStats | None, pid: int | None) -> tuple[float, EngineStats | None]:
    for model in before.models if before is not None else ():
        for replica in model.replicas:
            if replica.pid == pid and before is not None:
                return before.time, replica.engine
    return 0.0, None


class _Rates:
    """Rates and ratios of counters between two statistics of the same engine, or of the same model's engines."""

    def __init__(self, time: float, now: EngineStats, before_time: float, before: EngineStats | None) -> None:
        same = before is not None and before_time < time and before.steps <= now.steps
        self._now, self._before, self._seconds = now, before if same else None, time - before_time

    def grown(self, counter: str) -> float | None:
        """Return a counter's growth since `before`; None without `before` or if the engine has restarted since."""
        if self._before is None:
            return None
        return float(getattr(self._now, counter) - getattr(self._before, counter))

    def per_second(self, counter: str) -> str:
        grown = self.grown(counter)
        return "–" if grown is None else f"{grown / self._seconds:,.0f}"

    def share(self, part: str, whole: str) -> str:
        some, all = self.grown(part), self.grown(whole)
        return "–" if some is None or not all else f"{some / all:.0%}"

    def step_time(self) -> str:
        seconds, steps = self.grown("step_seconds"), self.grown("steps")
        return "–" if seconds is None or not steps else f"{1000 * seconds / steps:.1f} ms"


def _requests(now: _Look) -> Text:
    running, most = now.engine.running, now.limits.max_batch_size
    return Text.assemble(_bar([(running, "green")], most), f" {running:,} of {most:,} running")


def _queue(now: _Look) -> Text:
    engine, most = now.engine, now.limits.max_queue
    of_those = (("for pages", engine.waiting_for_pages), ("for a fork's prefill", engine.waiting_for_prompt))
    return Text.assemble(
        _bar([(engine.waiting, "yellow")], most),
        f" {engine.waiting:,} of {most:,} waiting",
        *(f", {number:,} {why}" for why, number in of_those if number),
    )


def _tenants(frontend: FrontendStats) -> Text:
    """Return the completions that run or wait by tenant, the most first; nothing if requests name no tenants."""
    if not any(frontend.tenants):
        return Text()
    counts = [f"{printable(name or '(none)', lines=False)} {count:,}" for name, count in frontend.tenants.items()]
    return Text(" · ".join(counts))


def _so_far(now: _Look) -> Text:
    refused, timed_out = now.frontend.refused, now.frontend.timed_out
    return Text.assemble(
        (f"{refused:,} refused", "red" if refused else ""),
        " · ",
        (f"{timed_out:,} timed out", "red" if timed_out else ""),
        f" · {now.engine.preemptions:,} preempted",
    )


def _batch(now: _Look) -> Text:
    engine, most = now.engine, now.limits.max_batch_tokens
    parts = [(engine.decode_rows, "green"), (engine.prefill_rows, "cyan"), (engine.draft_rows, "magenta")]
    return Text.assemble(
        _bar(parts, most),
        (f" {engine.decode_rows:,} decode", "green"),
        (f" · {engine.prefill_rows:,} prefill", "cyan"),
        (f" · {engine.draft_rows:,} draft", "magenta"),
        f" of {most:,} rows",
    )


def _steps(rates: _Rates) -> Text:
    backend = rates.share("backend_seconds", "step_seconds")
    return Text(f"{rates.per_second('steps')} /s of {rates.step_time()}, {backend} in the backend")


def _tokens(rates: _Rates) -> Text:
    return Text(f"{rates.per_second('tokens_generated')} /s out · {rates.per_second('tokens_computed')} /s computed")


def _prefixes(engine: EngineStats, rates: _Rates) -> Text:
    hits = f"{engine.cached_tokens / engine.prompt_tokens:.0%}" if engine.prompt_tokens else "–"
    latest = rates.share("cached_tokens", "prompt_tokens")
    return Text(f"{hits} of {engine.prompt_tokens:,} prompt tokens were cached, {latest} in the last second")


def _pages(engine: EngineStats) -> Text:
    held = engine.num_pages - engine.free_pages - engine.cached_pages
    return Text.assemble(
        _bar([(held, "green"), (engine.cached_pages, "blue")], engine.num_pages),
        f" {held:,} held · {engine.cached_pages:,} cached · {engine.free_pages:,} free of {engine.num_pages:,}",
    )


def _swapped(engine: EngineStats, rates: _Rates) -> Text:
    out, into = rates.per_second("pages_saved"), rates.per_second("pages_fetched")
    shared = "".join(
        f" · {name}: {tier.hits:,} hits, {tier.misses:,} misses, {tier.errors:,} errors"
        for name in ("store", "peers")
        if (tier := engine.tiers.get(name))
    )
    return Text(
        f"{out} pages/s out ({engine.pages_saved:,}; {engine.pending_saves:,} pending) · "
        f"{into} in ({engine.pages_fetched:,}; {engine.num_fetching:,} pending){shared}"
    )


def _bar(parts: list[tuple[int, str]], whole: int) -> Text:
    """Return a bar that stands for `whole`, with one segment per part. A part above 0 gets at least one character."""
    bar = Text()
    for part, style in parts:
        left = _BAR - len(bar)
        bar.append("█" * min(left, max(round(_BAR * part / max(whole, 1)), part > 0)), style)
    return bar.append("░" * (_BAR - len(bar)), "bright_black")


def _page_map(states: str) -> Text:
    return Text.assemble(*((_MARKS[state].glyph, _MARKS[state].style) for state in states), overflow="fold")


def _legend() -> Text:
    entries = [part for mark in _MARKS.values() for part in ((mark.glyph, mark.style), f" {mark.name}   ")]
    return Text.assemble(*entries, style="dim")
