"""Import a user's class, which a setting names as package.module:ClassName."""

import importlib
import sys
from pathlib import Path
from typing import TypeVar

from .errors import ConfigError

T = TypeVar("T")

NAME = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # the form of such a name


def import_class(setting: str, name: str, base: type[T], public: str) -> type[T]:
    """Import and return a subclass of `base`.

    Args:
        setting: the name of the setting, for errors.
        name: package.module:ClassName; the module may lie in the current folder.
        public: the name by which users know `base`.

    Raises:
        ConfigError: it cannot be imported, or is something else.
    """
    module_name, class_name = name.split(":")
    _search_current_folder()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        hint = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        cause = f"{type(error).__name__}: {error}{hint}"
        raise ConfigError(f"{setting} {name}: cannot import {module_name}: {cause}") from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, base):
        return found
    what = f"has no {class_name}" if found is None else f"has {class_name}, which is not a subclass of {base.__name__}"
    raise ConfigError(f"{setting} {name}: {module_name} {what} ({public})")


def _search_current_folder() -> None:
    """Add the current folder to the end of the import path, so that its modules shadow no others."""
    try:
        folder = str(Path.cwd())
    except FileNotFoundError:  # it has been deleted
        return
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
