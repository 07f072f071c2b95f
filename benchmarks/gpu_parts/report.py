"""What a part reports: one line for each measurement, written as soon as it is there."""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """One measurement.

    Attributes:
        part: the part's letter.
        what: what was measured.
        value: the figure in words, with its unit; an error's last lines if it failed.
        number: the figure; 0 or 1 for a check.
        ok: whether a check held, or a target was reached; None if there is none.
    """

    part: str
    what: str
    value: str
    number: float | None = None
    ok: bool | None = None


class Report:
    """Writes the lines of a part to the terminal and to a file of JSON lines."""

    def __init__(self, part: str, path: Path, seconds: float):
        self._part, self._path, self._end = part, path, time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def add(self, what: str, value: str, number: float | None = None, ok: bool | None = None) -> None:
        line = Line(self._part, what, value, number, ok)
        print(text(line), flush=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    def check(self, what: str, ok: bool, value: str = "") -> None:
        """Report whether something holds."""
        self.add(what, value or ("equal" if ok else "DIFFERENT"), float(ok), ok)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Report an error of the block as a line, and go on."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            self.add(what, short(error), None, False)
            if "CUDA error" in str(error) or "Error [CUDA]" in str(error):
                print(f"! {self._part}  stopped: after such an error the process cannot use the GPU", flush=True)
                os._exit(1)  # quietly: destructors would report it again
        took = time.monotonic() - started
        if took > 15:
            print(f"  ({what}: {took:.0f} s)", flush=True)


def text(line: Line) -> str:
    """Return a line of the table."""
    mark = {True: "+", False: "!", None: " "}[line.ok]
    return f"{mark} {line.part}  {line.what:<58} {line.value}"


def short(error: BaseException) -> str:
    """Return an error's type and message, and where in Octavo it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "octavo" in frame.filename or "gpu_parts" in frame.filename] or list(frames)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-3:]))
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:160]} [{where}]"


def read(path: Path) -> list[Line]:
    """Return the lines of a file."""
    if not path.exists():
        return []
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()]
