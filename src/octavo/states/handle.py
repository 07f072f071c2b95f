"""KVState: a user's handle on a conversation, and the tokens that it stands for."""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

MIN_CHARGE = 32  # tokens that a segment counts as at least: bookkeeping takes memory, too


@dataclass(slots=True, eq=False)
class Segment:
    """The tokens that a state adds to the one it continued. States share the segments that they have in common."""

    tokens: "array[int]"
    before: "Segment | None" = None
    references: int = 0  # number of states, and of referenced segments, that build on this one
    num_tokens: int = field(init=False)  # including all segments before

    def __post_init__(self) -> None:
        self.num_tokens = len(self.tokens) + (self.before.num_tokens if self.before else 0)

    @property
    def charge(self) -> int:
        """The tokens that count toward the tenant's quota for this segment."""
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
    it was not used for kv_state_ttl seconds.

    Attributes:
        id: the handle, also over HTTP.
        tenant, salt: whose it is; requests with another tenant or cache_salt cannot use it.
        fingerprint: names the model, the quantization and the layout of the KV cache (EngineInfo.fingerprint).
        created_at: Unix time in seconds.
        origin: the id of the loaded state that it is, or that the conversation once continued; "" if it comes from no
            file. Pages are shared between requests and states of one origin only, since a file's pages may be forged.
        file: the path that it was loaded from, or None.
        messages: the conversation in OpenAI's format, where a chat server keeps it, or None.
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
        """The Unix time, in seconds, at which it is dropped unless it is used before."""
        return time.time() + self._deadline - time.monotonic()

    @property
    def num_tokens(self) -> int:
        return self._segment.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output tokens, from the beginning."""
        tokens: list[int] = []
        for segment in reversed([*self._segment.back()]):
            tokens.extend(segment.tokens)
        return tokens

    def drop(self) -> None:
        """Give the state up. States that continue it are not affected."""
        self._owner.drop_state(self)

    def save(self, path: str | Path) -> Any:
        """Write the state to `path`: its tokens, and those of their KV pages that the engine has at hand.

        The file appears whole or not at all. With AsyncLLM this returns a coroutine to await. Raises InvalidKVState if
        the state is gone, RequestFailed if the file cannot be written.
        """
        return self._owner.save_state(self, Path(path))

    def __enter__(self) -> "KVState":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
