"""The tables of octavo trace."""

from rich.table import Table
from rich.text import Text

from octavo.terminal import console as plain_console
from octavo.terminal import printable

from .reading import EngineTime, RequestLife, Trace

SHORT = 1000  # microseconds; shorter parts of requests are left out
PARTS = ("prefill", "decode", "swap", "sampling", "host", "between steps", "idle")


def print_report(trace: Trace) -> None:
    """Print where the engines' time went, and the slowest requests."""
    console = plain_console()
    console.print(_engines(trace.engines))
    for engine in trace.engines:
        for name, microseconds in sorted(engine.transfers.items()):
            console.print(f"{_name(engine)}: {name}, beside the steps, {_seconds(microseconds)}")
    if trace.requests:
        console.print(_requests(trace.requests))
    console.print(f"{trace.num_requests:,} requests, {trace.num_unfinished:,} unfinished")
    if trace.dropped:
        console.print(f"{trace.dropped:,} events were dropped, because they could not be written in time")
    if trace.damaged:
        console.print(f"{trace.damaged:,} damaged lines were left out; a killed server leaves one at the end")


def why(life: RequestLife) -> str:
    """Return what a request spent its time on, the longest part first."""
    descriptions = {
        "no engine": "waited {} for an engine",
        "queued": "queued {}",
        "prefill": f"prefill {{}} ({life.prompt_tokens:,} tokens, {_counted(life.counts['chunk'], 'chunk')})",
        "decode": f"decode {{}} ({life.output_tokens:,} tokens)",
        "preempted": f"preempted {_counted(life.counts['preempted'], 'time')}, {{}}",
        "engine lost": "engine lost, {}",
        "moved": f"moved {_counted(life.counts['moved'], 'time')}, {{}}",
    }
    return "; ".join(
        descriptions[part].format(_seconds(time)) for part, time in life.parts.most_common() if time >= SHORT
    )


def _engines(engines: list[EngineTime]) -> Table:
    table = Table(title="Where the engines' time went", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for engine in engines:
        table.add_column(Text(_name(engine)), justify="right")
    for part in PARTS:
        shares = [engine.parts[part] / max(engine.end - engine.begin, 1) for engine in engines]
        table.add_row(part, *(f"{share:.1%}" for share in shares))
    table.add_row("time (s)", *(f"{(engine.end - engine.begin) / 1e6:,.2f}" for engine in engines))
    for label, name in (
        ("steps", "steps"),
        ("tokens of prompts", "prefill_tokens"),
        ("tokens of decode rows", "decode_tokens"),
        ("draft tokens", "draft_tokens"),
    ):
        table.add_row(label, *(f"{getattr(engine, name):,}" for engine in engines))
    table.add_row("ended by", *(Text(printable(engine.exit or "", lines=False)) for engine in engines))
    return table


def _requests(lives: list[RequestLife]) -> Table:
    table = Table(title="The slowest requests", title_justify="left", box=None, pad_edge=False)
    for heading in ("request", "model", "time", "first token", "end", "why"):
        table.add_column(heading, justify="right" if heading in ("time", "first token") else "left", overflow="fold")
    for life in lives:
        first = "" if life.first_token is None else _seconds(life.first_token - life.begin)
        end = "unfinished" if life.end is None else life.reason
        cells = (life.id, life.model, _seconds(life.parts.total()), first, end, why(life))
        table.add_row(*(Text(printable(cell, lines=False)) for cell in cells))
    return table


def _name(engine: EngineTime) -> str:
    return printable(f"{engine.model} engine {engine.number} ({engine.pid})", lines=False)


def _seconds(microseconds: float) -> str:
    return f"{microseconds / 1e6:,.3f} s"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
