"""Files that are followed: changes are seen, and no error of reading them ends that."""

import logging
import threading
import time
from pathlib import Path

import pytest

from octavo import follow
from octavo.errors import ConfigError


def test_every_change_is_read_whatever_went_wrong_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "octavo.server")
    one, other, was_read, seen = tmp_path / "one", tmp_path / "other", threading.Event(), list[str]()

    def read() -> None:
        text = "".join(file.read_text() for file in (one, other) if file.exists())
        seen.append(text)
        was_read.set()
        if text == "wrong":
            raise ConfigError("the file is wrong")
        if text == "bad":
            raise RuntimeError("nobody thought of this")

    def change(file: Path, text: str) -> None:
        was_read.clear()
        new = tmp_path / "new"
        new.write_text(text)
        new.replace(file)
        assert was_read.wait(10) and seen[-1] == text

    one.write_text("bad")
    with pytest.raises(RuntimeError):
        follow.follow([one, other], read, "list")
    one.write_text("")
    follow.follow([one, other], read, "list")
    for text in ("wrong", "bad", "right"):
        change(other, text)
    deadline = time.monotonic() + 10
    while len(caplog.messages) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert caplog.messages == [
        "the file is wrong; the list of before applies until this is corrected",
        f"the list of before applies, since {one} could not be read",
        f"the list in {one} was read again",
    ]


def test_a_change_during_the_first_reading_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.01)
    file, seen, both = tmp_path / "file", list[str](), threading.Event()
    file.write_text("old")

    def read() -> None:
        seen.append(file.read_text())
        if len(seen) == 1:
            file.write_text("new text")
        else:
            both.set()

    follow.follow([file], read, "text")
    assert both.wait(10) and seen == ["old", "new text"]
