"""Read files at once, and again in a thread after each change of them."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

from .errors import ConfigError

LOOK_SECONDS = 0.5  # between two looks at whether a file has changed

log = logging.getLogger("octavo.server")


def follow(files: Sequence[Path], read: Callable[[], None], what: str) -> None:
    """Call `read` now, and again whenever one of the files has changed, until the process ends.

    Only errors of the first call are raised. Later ones are logged, and the next change is awaited.

    Args:
        read: reads the files and replaces what was read before, or raises and leaves it as it is.
        what: what the files hold, for the log.
    """
    seen = _versions(files)
    read()
    Thread(target=_look, args=(files, seen, read, what), name="octavo-follow", daemon=True).start()


def _look(files: Sequence[Path], seen: list[object], read: Callable[[], None], what: str) -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        if (now := _versions(files)) == seen:
            continue
        seen = now
        try:
            read()
            log.info("the %s in %s was read again", what, files[0])
        except ConfigError as error:
            log.error("%s; the %s of before applies until this is corrected", error, what)
        except Exception:
            log.exception("the %s of before applies, since %s could not be read", what, files[0])


def _versions(files: Sequence[Path]) -> list[object]:
    return [_version(file) for file in files]


def _version(file: Path) -> object:
    """Return what differs after a change of the file; None if it cannot be found."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
