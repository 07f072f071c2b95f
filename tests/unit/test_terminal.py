"""Text on a terminal cannot control it; anywhere else it is exactly what it was."""

import io
import os

import pytest
from rich.console import Console

from octavo.terminal import printable, write_text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain café 日本 👩\u200d💻 שלום", None),
        ("two\n\tlines", None),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),  # control sequences of one byte
        ("back\b\rover", "back\\x08\\rover"),
        ("\u202eevil\u2066\u200f", "\\u202eevil\\u2066\\u200f"),  # direction
        ("\u200bhidden\ufeff\U000e0041", "\\u200bhidden\\ufeff\\U000e0041"),
        ("a\u2028b", "a\\u2028b"),
        ("\udc80", "\\udc80"),
    ],
)
def test_controls_are_shown_as_text(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)


def test_a_line_has_no_newline() -> None:
    assert printable("a\n\tb", lines=False) == "a\\n\\tb"


def test_only_a_terminal_gets_escapes() -> None:
    pipe = io.StringIO()
    write_text("\x1b[2J", pipe)
    assert pipe.getvalue() == "\x1b[2J"
    screen, end = os.openpty()
    with open(end, "w") as terminal:  # noqa: PTH123
        write_text("\x1b[2J", terminal)
        assert os.read(screen, 100) == b"\\x1b[2J"
    os.close(screen)


def test_top_shows_names_as_text() -> None:
    import msgspec

    from octavo.cli.top_screen import frame
    from octavo.engine.messages import EngineStats
    from octavo.server.stats import ServerStats

    lists = {name: list[int]() for name in ("step_tokens", "preempted", "accepted")}
    numbers = dict.fromkeys(set(EngineStats.__struct_fields__) - {"page_map", "tiers", *lists}, 0)
    limits = dict.fromkeys(("max_batch_size", "max_batch_tokens", "max_queue", "max_model_len", "page_size"), 1)
    names = {
        "name": "\x1b]0;x\x07[red]m",
        "policy": "\u202ep",
        "state": "loaded",
        "error": "",
        "aliases": [],
        "memory": 0,
    }
    frontend = dict.fromkeys(("live", "limit", "refused", "timed_out"), 0)
    model = {
        **names,
        "limits": limits,
        "frontend": frontend,
        "engine": {**numbers, **lists, "tiers": {}, "page_map": ""},
    }
    stats = {"time": 1.0, "version": "\x9b0m", "models": [model]}
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(frame(msgspec.convert(stats, ServerStats), None))
    assert "\\x1b]0;x\\x07[red]m · \\u202ep · version \\x9b0m" in capture.get()
    assert "\x1b]" not in capture.get() and "\u202e" not in capture.get()
