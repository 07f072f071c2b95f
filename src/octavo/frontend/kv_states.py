"""KV states: a user's handles on what a model has read and written, to go on from.

A state is tokens. Their K and V are in the engine's cache, where the state pins them; what is lost nevertheless is
computed again when the state is continued, and costs time only. So the truth is here: an engine may crash.
"""

import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from octavo.engine.messages import EngineInfo
from octavo.errors import InvalidKVState, InvalidRequest, QuotaExceeded

from .live import LiveRequest

MAX_REMEMBERED = 4_000_000  # tokens of finished requests


@dataclass(slots=True, eq=False)
class Segment:
    """What a state adds to the one that it continued. States share the segments that they have in common."""

    tokens: "array[int]"
    before: "Segment | None" = None
    holders: int = 0  # states, and segments that are held
    num_tokens: int = field(init=False)  # with all that is before

    def __post_init__(self) -> None:
        self.num_tokens = len(self.tokens) + (self.before.num_tokens if self.before else 0)

    def back(self) -> Iterator["Segment"]:
        """This segment, the one before it, and so on."""
        segment: Segment | None = self
        while segment:
            yield segment
            segment = segment.before


class Keeper(Protocol):
    """The engine that a state belongs to."""

    def pin_state(self, state: "KVState") -> None: ...

    def unpin_state(self, state: "KVState") -> None: ...

    def drop_state(self, state: "KVState") -> None: ...

    def save_state(self, state: "KVState", path: Path) -> Any: ...


@dataclass(eq=False, kw_only=True)
class KVState:
    """A conversation, or any text, up to a point from which it can be continued any number of times.

    From `get_kv_cache_state` and `load_kv_cache_state`; for the `kv_cache_state` of whatever generates, by the same
    tenant with the same cache_salt. It is kept until `drop`, the end of a `with` block, or `expires_at` (in seconds of
    time.time()), which every use puts off by kv_state_ttl.
    """

    id: str
    tenant: str
    salt: str
    fingerprint: str  # of the engine, see EngineInfo
    created_at: float
    expires_at: float
    file: Path | None = None  # where it was loaded from
    messages: list[dict[str, Any]] | None = None  # of a chat, where a server keeps them
    _segment: Segment = field(repr=False)
    _keeper: Keeper = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return self._segment.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output, from the beginning."""
        tokens: list[int] = []
        for segment in reversed([*self._segment.back()]):
            tokens.extend(segment.tokens)
        return tokens

    def drop(self) -> None:
        """Give it up. States that continue it stay what they are."""
        self._keeper.drop_state(self)

    def save(self, path: str | Path) -> Any:
        """Write it to a file, all or nothing: the tokens, and those of their K and V that are at hand.

        Of AsyncLLM: a coroutine, to be awaited. Raises InvalidKVState, RequestFailed if the file cannot be written.
        """
        return self._keeper.save_state(self, Path(path))

    def __enter__(self) -> "KVState":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has ended: what a state of it would be. `outputs`: one for each completion."""

    tenant: str
    salt: str
    outputs: list[Segment]

    @property
    def num_tokens(self) -> int:
        return sum(output.num_tokens for output in self.outputs)


class KVStates:
    """The states that one engine's users hold, and the finished requests that they may still want states of.

    A tenant's states may have `quota` tokens together: those that several of them begin with count once. A state that
    was not used for `ttl` seconds is dropped. Not thread-safe.
    """

    def __init__(
        self, keeper: Keeper, info: EngineInfo, quota: int, ttl: float, clock: Callable[[], float] = time.time
    ):
        self.clock = clock
        self._keeper, self._info, self._quota, self._ttl = keeper, info, quota, ttl
        self._states: OrderedDict[str, KVState] = OrderedDict()  # the least recently used first
        self._held: dict[str, int] = {}  # tokens by tenant
        self._finished: OrderedDict[str, Finished] = OrderedDict()  # the latest last
        self._remembered = 0  # tokens of those

    def loaded(self) -> list[KVState]:
        """Those that came from files, which every engine must be told of."""
        return [state for state in self._states.values() if state.file]

    def remember(self, live: LiveRequest) -> None:
        """A request has finished. What it computed of the state that it continued is pinned again."""
        request, state = live.completions[0].request, live.state
        before = state._segment if state else None
        prompt = live.prompt_token_ids[before.num_tokens :] if before else live.prompt_token_ids
        outputs = [Segment(array("i", prompt + completion.token_ids), before) for completion in live.completions]
        self._forget(live.id)
        self._finished[live.id] = finished = Finished(request.tenant, request.salt, outputs)
        self._remembered += finished.num_tokens
        while self._remembered > MAX_REMEMBERED:
            self._forget(next(iter(self._finished)))
        if state and state.id in self._states:
            self._touch(state)
            self._keeper.pin_state(state)

    def keep(self, request_id: str, index: int = 0) -> KVState:
        """A state of a request that has finished, of its completion number `index`.

        Raises InvalidRequest, QuotaExceeded.
        """
        if (finished := self._finished.get(request_id)) is None:
            known = f"only the latest, of {MAX_REMEMBERED:,} tokens together, are remembered"
            raise InvalidRequest(f"there is no finished request {request_id!r}: {known}", "request_id")
        if not 0 <= index < len(finished.outputs):
            raise InvalidRequest(f"index must be from 0 to {len(finished.outputs) - 1}, not {index}", "index")
        return self._open(finished.outputs[index], finished.tenant, finished.salt)

    def adopt(self, file: Path, tokens: list[int], tenant: str, salt: str) -> KVState:
        """A state that was saved to a file. Raises QuotaExceeded."""
        return self._open(Segment(array("i", tokens)), tenant, salt, file)

    def use(self, state: KVState, tenant: str, salt: str) -> list[int]:
        """The tokens of a state that `tenant` wants to continue with `salt`. Raises InvalidKVState."""
        if state.fingerprint != self._info.fingerprint:
            raise InvalidKVState("this KV state is of another model, quantization or layout of the KV cache")
        if (state.tenant, state.salt) != (tenant, salt):
            raise InvalidKVState("this KV state is of another tenant or cache_salt: name those that it was made with")
        self._drop_expired()
        if self._states.get(state.id) is not state:
            raise InvalidKVState("this KV state was dropped, has expired (see kv_state_ttl), or is another engine's")
        self._touch(state)
        return state.token_ids

    def find(self, id: str, tenant: str) -> KVState | None:
        """The state, if there is one and it is the tenant's. To ask for it is to use it."""
        self._drop_expired()
        state = self._states.get(id)
        if state is None or state.tenant != tenant:
            return None
        self._touch(state)
        return state

    def check_quota(self, tenant: str, tokens: int) -> None:
        """Raises QuotaExceeded if `tenant` may not hold so many more."""
        self._drop_expired()
        held = self._held.get(tenant, 0)
        if held + tokens > self._quota:
            raise QuotaExceeded(
                f"a KV state of {tokens:,} more tokens would exceed the quota of {self._quota:,} (kv_state_quota), "
                f"{held:,} of which are in use: drop states that are not needed any more"
            )

    def drop(self, state: KVState) -> None:
        """Nothing happens if it is not kept any more."""
        if self._states.get(state.id) is not state:
            return
        del self._states[state.id]
        for segment in state._segment.back():
            segment.holders -= 1
            if segment.holders:
                break
            self._held[state.tenant] -= len(segment.tokens)
        if not self._held[state.tenant]:
            del self._held[state.tenant]
        self._keeper.unpin_state(state)

    def _open(self, segment: Segment, tenant: str, salt: str, file: Path | None = None) -> KVState:
        self.check_quota(tenant, sum(len(part.tokens) for part in segment.back() if not part.holders))
        self._held.setdefault(tenant, 0)
        for part in segment.back():
            part.holders += 1
            if part.holders > 1:
                break
            self._held[tenant] += len(part.tokens)
        now = self.clock()
        state = KVState(
            id=f"kv-{secrets.token_hex(16)}",
            tenant=tenant,
            salt=salt,
            fingerprint=self._info.fingerprint,
            created_at=now,
            expires_at=now + self._ttl,
            file=file,
            _segment=segment,
            _keeper=self._keeper,
        )
        self._states[state.id] = state
        self._keeper.pin_state(state)
        return state

    def _touch(self, state: KVState) -> None:
        state.expires_at = self.clock() + self._ttl
        self._states.move_to_end(state.id)

    def _drop_expired(self) -> None:
        now = self.clock()
        while self._states and (oldest := next(iter(self._states.values()))).expires_at <= now:
            self.drop(oldest)

    def _forget(self, request_id: str) -> None:
        if finished := self._finished.pop(request_id, None):
            self._remembered -= finished.num_tokens
