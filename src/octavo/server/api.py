"""Api: the objects that all routes share."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.fleet.fleet import Fleet
from octavo.tenants.key import Key

from .config import ServerConfig
from .database import Database
from .edge.access_log import RequestRecord
from .edge.body import BodyReader
from .errors import ApiError

LEAST_TIMEOUT = 0.001  # seconds
LEAST_WAIT = 0.01  # seconds of a wait that are subtracted from a timeout


@dataclass(frozen=True)
class Api:
    """A started `fleet` with the server's settings.

    Args:
        started: Unix time at which the server started, in seconds.
        draining: returns whether the server is shutting down.
        database: what must survive a restart, if there is a data folder.
    """

    fleet: Fleet
    config: ServerConfig
    bodies: BodyReader
    started: int
    draining: Callable[[], bool]
    database: Database

    async def model(
        self,
        record: RequestRecord,
        name: str | None,
        user: str | None,
        terms: dict[str, Any],
        state: bool | str | None = None,
    ) -> AsyncLLM:
        """Return the model for a request, loaded. It is kept until the request's response ends.

        Args:
            name: of a model, an alias or a split; None for the default model.
            user: the user that the request names, for sticky splits.
            terms: the given fields of ServiceTerms. The timeout also limits the wait for a model that is being loaded,
                and is then reduced by it.
            state: the request's `kv_cache_state`. If `name` is a split, the model that has this state is chosen.

        Raises UnknownModel, RequestTimeout, EngineDead; ApiError 403 for what the request's key does not allow, and 429
            beyond its limits.
        """
        if isinstance(state, str):
            name = self._model_of_state(name, state, terms["tenant"])
        began, timeout = time.monotonic(), terms.get("timeout")
        if record.key is not None:
            self._check_terms(record.key, name, terms)
        if record.use is not None:
            await record.use.enter(timeout or self.fleet.default.config.request_timeout)
        model = await self.fleet.acquire(name, {"user": user, "request_id": record.id}, timeout)
        record.on_end = partial(self.fleet.release, model)
        if record.key is not None and not record.key.names_tenants:
            model.llm.set_tenant_weight(record.key.owner, record.key.weight)
        waited, timeout = time.monotonic() - began, timeout or model.config.request_timeout
        if timeout and waited > LEAST_WAIT:
            terms["timeout"] = max(timeout - waited, LEAST_TIMEOUT)
        return model.llm

    def _check_terms(self, key: Key, name: str | None, terms: dict[str, Any]) -> None:
        """Set the priority that follows from the key. Raise ApiError 403 for a model or a priority that it forbids."""
        name = name or self.fleet.default.name
        if not key.allows_model(name):
            raise ApiError(403, f"this API key may not be used for the model {name}", "model", "model_not_allowed")
        least = key.min_priority
        if least is not None and terms.setdefault("priority", max(0, least)) < least:
            message = f"this API key allows values of priority from {least} on"
            raise ApiError(403, message, "priority", "priority_not_allowed")

    def _model_of_state(self, name: str | None, state: str, tenant: str) -> str | None:
        """Return the model of a split that has a KV state; otherwise `name`."""
        models = self.fleet.names()
        if name in models and models[name] is None:
            for each in self.fleet.shares(name):
                model = self.fleet.known(each)
                if model.was_loaded and model.llm.kv_cache_states.find(state, tenant):
                    return each
        return name
