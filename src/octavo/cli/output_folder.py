"""A folder that a command writes, completely or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from octavo.errors import ConfigError, OctavoError, shortened


def output_folder(path: Path) -> Path:
    """Return the absolute path of a directory to write. Raises ConfigError for one that cannot be a directory."""
    try:
        target = path.expanduser().absolute()
        target.exists()
        if target.name in ("", ".."):
            target = target.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write {shortened(path)}: {shortened(reason)}") from None
    if not target.name:
        raise ConfigError(f"{shortened(path)} cannot be replaced; choose another directory")
    return target


@contextlib.contextmanager
def complete_or_absent(target: Path) -> Iterator[Path]:
    """Yield a directory to fill. It is renamed to `target` at the end, or deleted after an error.

    Raises ConfigError if `target` cannot be written.
    """
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    replaced = folder.with_suffix(".replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    except OctavoError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
