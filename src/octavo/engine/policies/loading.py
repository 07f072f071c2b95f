"""Load a scheduling policy by name."""

import importlib
import sys
from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import ConfigError

from .fair import Fair
from .policy import Deadline, Policy, Priority

_BUILT_IN: dict[str, type[Policy]] = {"fcfs": Policy, "priority": Priority, "deadline": Deadline, "fair": Fair}


def load_policy(config: EngineConfig) -> Policy:
    """Return a new instance of the policy that `scheduling_policy` names. Raises ConfigError."""
    name = config.scheduling_policy
    policy = _BUILT_IN.get(name) or _import_policy(name)
    try:
        return policy(config)
    except Exception as error:  # a user's constructor may raise anything
        raise ConfigError(
            f"scheduling_policy {name}: its constructor raised {type(error).__name__}: {error}"
        ) from error


def _import_policy(name: str) -> type[Policy]:
    """Import and return the class package.module:ClassName. Raises ConfigError."""
    module_name, class_name = name.split(":")
    _search_current_folder()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        hint = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        cause = f"{type(error).__name__}: {error}{hint}"
        raise ConfigError(f"scheduling_policy {name}: cannot import {module_name}: {cause}") from error
    policy = getattr(module, class_name, None)
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        what = f"has no {class_name}" if policy is None else f"has {class_name}, which is not a subclass of Policy"
        raise ConfigError(f"scheduling_policy {name}: {module_name} {what} (octavo.engine.policies.Policy)")
    return policy


def _search_current_folder() -> None:
    """Add the current folder to the end of the import path, so that its modules shadow no others."""
    try:
        folder = str(Path.cwd())
    except FileNotFoundError:  # it has been deleted
        return
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
