"""Finding: the result of one check, as one line for people."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "change", "stop"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: "ok"; "change" if Octavo works, and would work better after a change; "stop" if it does not work.
        subject: what was checked, in a word or two.
        text: what was found; unless the level is "ok", also what to change and how.
    """

    level: Level
    subject: str
    text: str


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def change(subject: str, text: str) -> Finding:
    return Finding("change", subject, text)


def stop(subject: str, text: str) -> Finding:
    return Finding("stop", subject, text)
