"""Open the store that `kv_store` names: a Redis by its URL, or a class."""

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.extension import import_class

from .store import Store


def load_store(config: EngineConfig) -> Store:
    """Return the store. Whether it can be reached is found out later. Raises ConfigError."""
    name = config.kv_store or ""
    if "://" in name:
        from .redis import RedisStore

        return RedisStore(config)
    store = import_class("kv_store", name, Store, "octavo.kv.store.Store")  # type: ignore[type-abstract]
    try:
        return store(config)
    except Exception as error:  # a user's constructor may raise anything
        raise ConfigError(f"kv_store {name}: its constructor raised {type(error).__name__}: {error}") from error
