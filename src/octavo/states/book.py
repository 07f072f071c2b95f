"""StateBook: all KV states, their owners, and the number of tokens that each tenant holds.

A state consists of its tokens. Their keys and values are pages in the engine's cache, pinned by the state. Lost pages
are computed again when the state is continued. The book is in the frontend, so it survives crashes of the engine.
"""

import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from octavo.errors import InvalidKVState, InvalidRequest, QuotaExceeded

from .handle import KVState, Segment, StateOwner

MAX_REMEMBERED = 4_000_000  # tokens of finished requests
MIN_REMEMBERED = 256  # minimum cost of a finished completion, in tokens


class StatePins(Protocol):
    """The frontend's methods that the book calls: make the engine keep a state's pages, or release them."""

    def pin_state(self, state: KVState) -> None: ...

    def unpin_state(self, state: KVState) -> None: ...


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A finished request, from which states can be made. `outputs` has one segment for each completion."""

    tenant: str
    salt: str
    origin: str  # origin of the state that it continued; see KVState
    outputs: list[Segment]
    cost: int  # tokens


class StateBook:
    """The states that users hold, and the recently finished requests that states can be made of. Not thread-safe.

    Args:
        pins: called when the engine should keep or release a state's pages.
        owner: the object that the methods of a state call.
        fingerprint: the engine's fingerprint (EngineInfo.fingerprint).
        quota: maximum number of tokens in all states of one tenant; tokens that states share count once.
        ttl: seconds after which an unused state is dropped.
        clock: returns monotonic time in seconds.
    """

    def __init__(
        self,
        pins: StatePins,
        owner: StateOwner,
        fingerprint: str,
        quota: int,
        ttl: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._pins, self._owner, self._fingerprint = pins, owner, fingerprint
        self._quota, self._ttl, self._clock = quota, ttl, clock
        self._states: OrderedDict[str, KVState] = OrderedDict()  # least recently used first
        self._charges: dict[str, int] = {}  # tokens by tenant
        self._finished: OrderedDict[str, FinishedRequest] = OrderedDict()  # oldest first
        self._remembered = 0  # tokens of finished requests

    def loaded(self) -> list[KVState]:
        """Return the states that were loaded from files. A new engine must open these files."""
        return [state for state in self._states.values() if state.file]

    def remember(
        self,
        request_id: str,
        tenant: str,
        salt: str,
        prompt: list[int],
        outputs: Sequence[list[int]],
        continued: KVState | None,
    ) -> None:
        """Remember a finished request, so that `keep` can make a state of it.

        Args:
            prompt: all prompt tokens, including those of `continued`.
            outputs: the tokens of each completion.
            continued: the state that the request continued. This counts as a use, and pins the state's pages again.
        """
        before = continued._segment if continued else None
        new = prompt[before.num_tokens :] if before else prompt
        segments = [Segment(array("i", new + output), before) for output in outputs]
        self._forget(request_id)
        cost = sum(max(segment.num_tokens, MIN_REMEMBERED) for segment in segments)
        origin = continued.origin if continued else ""
        self._finished[request_id] = FinishedRequest(tenant, salt, origin, segments, cost)
        self._remembered += cost
        while self._remembered > MAX_REMEMBERED:
            self._forget(next(iter(self._finished)))
        if continued and continued.id in self._states:
            self._touch(continued)
            self._pins.pin_state(continued)

    def keep(self, request_id: str, index: int = 0) -> KVState:
        """Make a state of completion number `index` of a finished request. Raises InvalidRequest, QuotaExceeded."""
        if (finished := self._finished.get(request_id)) is None:
            known = f"only the latest requests, up to {MAX_REMEMBERED:,} tokens together, are remembered"
            raise InvalidRequest(f"there is no finished request {request_id!r}; {known}", "request_id")
        if not 0 <= index < len(finished.outputs):
            raise InvalidRequest(f"index must be from 0 to {len(finished.outputs) - 1}, not {index}", "index")
        return self._open(finished.outputs[index], finished.tenant, finished.salt, finished.origin)

    def adopt(self, file: Path, tokens: list[int], tenant: str, salt: str) -> KVState:
        """Make a state of the tokens of a saved file. Its origin is its own id. Raises QuotaExceeded."""
        return self._open(Segment(array("i", tokens)), tenant, salt, file=file)

    def use(self, state: KVState, tenant: str, salt: str) -> list[int]:
        """Return the tokens of a state that `tenant` continues with `salt`. Raises InvalidKVState."""
        if state.fingerprint != self._fingerprint:
            raise InvalidKVState("this KV state belongs to another model, quantization or layout of the KV cache")
        if (state.tenant, state.salt) != (tenant, salt):
            raise InvalidKVState("this KV state is of another tenant or cache_salt; use those that it was made with")
        self._drop_expired()
        if self._states.get(state.id) is not state:
            raise InvalidKVState("this KV state was dropped, has expired (kv_state_ttl), or belongs to another engine")
        self._touch(state)
        return state.token_ids

    def find(self, id: str, tenant: str) -> KVState | None:
        """Return the tenant's state with this id, or None. Counts as a use of the state."""
        self._drop_expired()
        state = self._states.get(id)
        if state is None or state.tenant != tenant:
            return None
        self._touch(state)
        return state

    def check_quota(self, tenant: str, tokens: int) -> None:
        """Raise QuotaExceeded if `tenant` may not hold `tokens` more."""
        self._drop_expired()
        held = self._charges.get(tenant, 0)
        if held + tokens > self._quota:
            raise QuotaExceeded(
                f"a KV state of {tokens:,} more tokens would exceed the quota of {self._quota:,} (kv_state_quota), "
                f"{held:,} of which are in use; drop states that are no longer needed"
            )

    def drop(self, state: KVState) -> None:
        """Forget a state; do nothing if it is already gone."""
        if self._states.get(state.id) is not state:
            return
        del self._states[state.id]
        for segment in state._segment.back():
            segment.references -= 1
            if segment.references:
                break
            self._charges[state.tenant] -= segment.charge
        if not self._charges[state.tenant]:
            del self._charges[state.tenant]
        self._pins.unpin_state(state)

    def _open(self, segment: Segment, tenant: str, salt: str, origin: str = "", file: Path | None = None) -> KVState:
        self.check_quota(tenant, sum(part.charge for part in segment.back() if not part.references))
        self._charges.setdefault(tenant, 0)
        for part in segment.back():
            part.references += 1
            if part.references > 1:
                break
            self._charges[tenant] += part.charge
        id = f"kv-{secrets.token_hex(16)}"
        state = KVState(
            id=id,
            tenant=tenant,
            salt=salt,
            origin=id if file else origin,
            fingerprint=self._fingerprint,
            created_at=time.time(),
            file=file,
            _segment=segment,
            _owner=self._owner,
            _deadline=self._clock() + self._ttl,
        )
        self._states[state.id] = state
        self._pins.pin_state(state)
        return state

    def _touch(self, state: KVState) -> None:
        state._deadline = self._clock() + self._ttl
        self._states.move_to_end(state.id)

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._states and (oldest := next(iter(self._states.values())))._deadline <= now:
            self.drop(oldest)

    def _forget(self, request_id: str) -> None:
        if finished := self._finished.pop(request_id, None):
            self._remembered -= finished.cost
