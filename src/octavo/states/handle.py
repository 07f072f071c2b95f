"""KVState: a user's handle on a conversation, and the tokens of the conversation."""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

MIN_CHARGE = 32  # minimum charge for a segment, in tokens, as its bookkeeping takes memory too


@dataclass(slots=True, eq=False)
class Segment:
    """The tokens that a state adds to the state it continued. States with a common beginning share its segments."""

    tokens: "array[int]"
    before: "Segment | None" = None
    references: int = 0  # number of states and of referenced segments that end with, or continue, this one
    num_tokens: int = field(init=False)  # including all segments before

    def __post_init__(self) -> None:
        self.num_tokens = len(self.tokens) + (self.before.num_tokens if self.before else 0)

    @property
    def charge(self) -> int:
        """Return the number of tokens that this segment counts toward its tenant's quota."""
        return max(len(self.tokens), MIN_CHARGE)

    def back(self) -> Iterator["Segment"]:
        """Yield this segment, the one before it, and so on."""
        segment: Segment | None = self
        while segment:
            yield segment
            segment = segment.before


class StateOwner(Protocol):
    """The frontend that a state belongs to; `KVState`'s methods call it."""

    def drop_state(self, state: "KVState") -> None: ...

    def save_state(self, state: "KVState", path: Path) -> Any: ...


@dataclass(eq=False, kw_only=True)
class KVState:
    """A point in a conversation, or in any text, from which generation can continue any number of times.

    Get one from `get_kv_cache_state` or `load_kv_cache_state`, and pass it as `kv_cache_state` to any method that
    generates, for the same tenant and cache_salt. It is kept until `drop`, until the end of a `with` block, or until
    it has not been used for kv_state_ttl seconds.

    Attributes:
        id: the handle, also over HTTP.
        tenant, salt: the owner; requests with another tenant or cache_salt cannot use the state.
        fingerprint: identifies the model, the quantization and the layout of the KV cache (EngineInfo.fingerprint).
        created_at: Unix time in seconds.
        origin: if the state was loaded from a file, its own id; if the conversation once continued a loaded state, the
            id of that state; otherwise "". Only requests and states of the same origin share pages, since a file's
            pages may be forged.
        file: the path that the state was loaded from, or None.
        messages: the conversation in OpenAI's format, if a chat server keeps it, or None.
    """

    id: str
    tenant: str
    salt: str = field(repr=False)
    fingerprint: str = field(repr=False)
    created_at: float
    origin: str = field(default="", repr=False)
    file: Path | None = None
    messages: list[dict[str, Any]] | None = field(default=None, repr=False)
    _segment: Segment = field(repr=False)
    _owner: StateOwner = field(repr=False)
    _deadline: float = field(repr=False)  # in seconds of time.monotonic()

    @property
    def expires_at(self) -> float:
        """Return the Unix time, in seconds, at which the state is dropped unless it is used before."""
        return time.time() + self._deadline - time.monotonic()

    @property
    def num_tokens(self) -> int:
        return self._segment.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """Return all tokens of the conversation, prompts and outputs."""
        tokens: list[int] = []
        for segment in reversed([*self._segment.back()]):
            tokens.extend(segment.tokens)
        return tokens

    def drop(self) -> None:
        """Drop the state. States that continue it are not affected."""
        self._owner.drop_state(self)

    def save(self, path: str | Path) -> Any:
        """Write the state to `path`: its tokens, and those of its KV pages that the engine still has.

        The file is written completely or not at all. With AsyncLLM, this returns a coroutine. Raises InvalidKVState if
        the state was dropped or has expired, RequestFailed if the file cannot be written.
        """
        return self._owner.save_state(self, Path(path))

    def __enter__(self) -> "KVState":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
