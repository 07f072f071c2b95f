"""A strict reader of Chrome's trace event format, as Perfetto reads it."""

import json
from collections import defaultdict
from typing import Any

Event = dict[str, Any]
FIELDS = {
    "X": {"name", "ph", "pid", "tid", "ts", "dur"},
    "b": {"name", "ph", "pid", "tid", "ts", "cat", "id2"},
    "n": {"name", "ph", "pid", "tid", "ts", "cat", "id2"},
    "e": {"name", "ph", "pid", "tid", "ts", "cat", "id2"},
    "i": {"name", "ph", "pid", "tid", "ts", "s"},
    "M": {"name", "ph", "pid", "args"},
}


def parse(text: str, is_complete: bool = True) -> list[Event]:
    """The events of a file, each of which must be sound.

    Args:
        is_complete: whether all requests must have ended.
    """
    events: list[Event] = json.loads(text + "]")  # the format permits to leave out the bracket
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    processes = {event["pid"] for event in events if event["name"] == "process_name"}
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    lives: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        assert FIELDS[event["ph"]] <= event.keys() <= FIELDS[event["ph"]] | {"args", "cat", "tid"}, event
        assert event["name"] and isinstance(event["pid"], int), event
        if event["ph"] == "M":
            continue
        assert isinstance(event["ts"], int) and event["ts"] > 0, event
        assert event["pid"] in processes, event
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0, event
            assert (event["pid"], event["tid"]) in threads, event
            tracks[event["pid"], event["tid"]].append(event)
        elif event["ph"] == "i":
            assert event["s"] in "gpt", event
        else:
            lives[event["cat"], event["id2"]["global"]].append(event)
    for track in tracks.values():
        check_nesting(track)
    for life in lives.values():
        check_life(life, is_complete)
    return events


def check_nesting(slices: list[Event]) -> None:
    """Slices of a thread must lie beside each other or within one another."""
    ends: list[int] = []
    for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1], event
        ends.append(end)


def check_life(life: list[Event], is_complete: bool) -> None:
    """A request begins once, ends once, and everything else happens in between."""
    phases = [event["ph"] for event in life]
    assert phases[0] == "b" and phases.count("b") == 1, life
    assert phases.count("e") == (phases[-1] == "e"), life
    assert not is_complete or phases[-1] == "e", life
    if phases[-1] == "e":
        assert life[0]["name"] == life[-1]["name"], life
        assert all(life[0]["ts"] <= event["ts"] <= life[-1]["ts"] for event in life), life
