"""Load a scheduling policy by name."""

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.extension import import_class

from .fair import Fair
from .policy import Deadline, Policy, Priority

_BUILT_IN: dict[str, type[Policy]] = {"fcfs": Policy, "priority": Priority, "deadline": Deadline, "fair": Fair}


def load_policy(config: EngineConfig) -> Policy:
    """Return a new instance of the policy that `scheduling_policy` names. Raises ConfigError."""
    name = config.scheduling_policy
    policy = _BUILT_IN.get(name) or import_class("scheduling_policy", name, Policy, "octavo.engine.policies.Policy")
    try:
        return policy(config)
    except Exception as error:  # a user's constructor may raise anything
        raise ConfigError(
            f"scheduling_policy {name}: its constructor raised {type(error).__name__}: {error}"
        ) from error
