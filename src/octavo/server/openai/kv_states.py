"""The extension kv_cache_state: an answer's state is kept, and later requests go on from it.

In a request, `true` asks for the state after the answer, and a handle for that too, after going on from the state that
it names. So a conversation sends only what is new, and so does each fork of it.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

from octavo.async_llm import AsyncLLM
from octavo.errors import InvalidRequest, QuotaExceeded
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams
from octavo.server.errors import ApiError
from octavo.states import KVState
from octavo.states.handle import MIN_CHARGE

from .replies import KVCacheState

PARAM = "kv_cache_state"


@dataclass
class Continuation:
    """A request with a kv_cache_state.

    `state`: what it goes on from. `messages`: of a chat, all up to the answer. `kept`: the state after the answer, when
    all of that was heard; None if others have used up the quota meanwhile.
    """

    llm: AsyncLLM
    tenant: str
    state: KVState | None
    messages: list[dict[str, Any]] | None = None
    kept: KVCacheState | None = None
    _text: list[str] = field(default_factory=list)

    def chat(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The whole conversation, `messages` being what is new. Raises InvalidRequest."""
        before: list[dict[str, Any]] = []
        if self.state is not None:
            if self.state.messages is None:
                raise InvalidRequest("this KV state is no chat's: go on from it with /v1/completions", PARAM)
            before = self.state.messages
        self.messages = before + messages
        return self.messages

    def after_state(self, tokens: list[int]) -> list[int]:
        """What of a chat's prompt comes after the state; all of it if the state is not how it begins.

        That happens: a text may be spelled in other tokens than those that the model chose. The prefix cache finds
        what is the same.
        """
        if self.state is None:
            return tokens
        known = self.state.token_ids
        if tokens[: len(known)] != known:
            self.state = None
            return tokens
        return tokens[len(known) :]

    def check_quota(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises QuotaExceeded rather than let it come to an answer whose state cannot be kept."""
        tokens = max(len(prompt) + (params.max_tokens or 0), MIN_CHARGE)
        self.llm.kv_cache_states.check_quota(self.tenant, tokens)

    def hear(self, output: RequestOutput) -> None:
        """An increment, or a whole output."""
        self._text += [completion.text for completion in output.outputs]
        if output.finished:
            with contextlib.suppress(QuotaExceeded):
                state = self.llm.kv_cache_states.keep(output.request_id)
                if self.messages is not None:
                    state.messages = [*self.messages, {"role": "assistant", "content": "".join(self._text)}]
                self.kept = describe(state)


def continuation(llm: AsyncLLM, asked: bool | str | None, n: int, terms: dict[str, Any]) -> Continuation | None:
    """What a request asks for that has `n` completions. Raises InvalidRequest, InvalidKVState, ApiError."""
    if asked is None or asked is False:
        return None
    if n != 1:
        raise InvalidRequest("kv_cache_state is of one prompt and one completion: n must be 1", PARAM)
    tenant, state = terms["tenant"], None
    if isinstance(asked, str):
        state = find_state(llm, asked, tenant)
        llm.kv_cache_states.use(state, tenant, terms.get("cache_salt", ""))
    return Continuation(llm, tenant, state)


def find_state(llm: AsyncLLM, id: str, tenant: str) -> KVState:
    """Raises ApiError 404: the same one whether there is no such state or it is another tenant's."""
    state = llm.kv_cache_states.find(id, tenant)
    if state is None:
        raise ApiError(404, "there is no such KV state, or no more", PARAM, "kv_cache_state_not_found")
    return state


def describe(state: KVState) -> KVCacheState:
    return KVCacheState(state.id, state.num_tokens, int(state.expires_at))
