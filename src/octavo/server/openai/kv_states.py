"""The extension `kv_cache_state`: keep the KV state after an answer, and continue it in later requests.

In a request, `true` keeps the state after the answer. The handle of a state continues that state and also keeps the
state after the new answer. So each turn of a conversation, or of a branch of it, sends only its new messages.
"""

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.errors import InvalidRequest, QuotaExceeded
from octavo.outputs import RequestOutput
from octavo.params import SamplingParams
from octavo.server.api import Api
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError
from octavo.server.openapi.operation import Operation
from octavo.states import KVState
from octavo.states.handle import MIN_CHARGE

from .protocol import TENANT_QUERY, tenant_of
from .replies import Json, KVCacheState

PARAM = "kv_cache_state"


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    path = "/v1/kv_cache_states/{id}"
    described = Operation(tag="Octavo", summary="Describe a kept KV state.", query=TENANT_QUERY, reply=KVCacheState)
    dropped = Operation(tag="Octavo", summary="Drop a kept KV state.", query=TENANT_QUERY, status=204)
    return [
        route("GET", path, partial(get_state, api), described),
        route("DELETE", path, partial(delete_state, api), dropped),
    ]


async def get_state(api: Api, request: Request) -> Response:
    """Answer with a state's size and expiry time. Counts as a use of the state. Raises ApiError 404."""
    return Json(describe(_requested_state(api, request)))


async def delete_state(api: Api, request: Request) -> Response:
    """Drop a state. Raises ApiError 404."""
    _requested_state(api, request).drop()
    return Response(status_code=204)


@dataclass
class Continuation:
    """A request's use of KV states.

    Args:
        state: the state that the prompt continues, if any.
        messages: in a chat, all messages before the answer.
        kept: the state after the answer, once that is complete; None if the quota was used up in the meantime.
    """

    llm: AsyncLLM
    tenant: str
    state: KVState | None
    messages: list[dict[str, Any]] | None = None
    kept: KVCacheState | None = None
    _text: list[str] = field(default_factory=list)

    def whole_chat(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages of the continued state followed by the new `messages`. Raises InvalidRequest."""
        before: list[dict[str, Any]] = []
        if self.state is not None:
            if self.state.messages is None:
                raise InvalidRequest("this KV state is not from a chat; continue it with /v1/completions", PARAM)
            before = self.state.messages
        self.messages = before + messages
        return self.messages

    def after_state(self, tokens: list[int]) -> list[int]:
        """Return the part of a chat's prompt after the state, or all of it if the prompt does not begin with the state.

        The prompt may differ from the state because the tokenizer may split the answer's text into other tokens than
        the model generated. The prefix cache still finds the pages before the difference.
        """
        if self.state is None:
            return tokens
        known = self.state.token_ids
        if tokens[: len(known)] != known:
            self.state = None
            return tokens
        return tokens[len(known) :]

    def check_quota(self, prompt: list[int], params: SamplingParams) -> None:
        """Raise QuotaExceeded, before anything is computed, if the state after the answer would exceed the quota."""
        tokens = max(len(prompt) + (params.max_tokens or 0), MIN_CHARGE)
        self.llm.kv_cache_states.check_quota(self.tenant, tokens)

    def add(self, output: RequestOutput) -> None:
        """Add an increment, or a whole output. After the last one, keep the state."""
        self._text += [completion.text for completion in output.outputs]
        if output.finished:
            with contextlib.suppress(QuotaExceeded):
                state = self.llm.kv_cache_states.keep(output.request_id)
                if self.messages is not None:
                    state.messages = [*self.messages, {"role": "assistant", "content": "".join(self._text)}]
                self.kept = describe(state)


def continuation(llm: AsyncLLM, given: bool | str | None, n: int, terms: dict[str, Any]) -> Continuation | None:
    """Return the Continuation of a request with `n` completions; None if the request does not use KV states.

    Args:
        given: the request's `kv_cache_state`.
        terms: the given fields of ServiceTerms, and the tenant.

    Raises InvalidRequest, InvalidKVState, and ApiError for an unknown handle.
    """
    if given is None or given is False:
        return None
    if n != 1:
        raise InvalidRequest("kv_cache_state needs one prompt and one completion: n must be 1", PARAM)
    tenant, state = terms["tenant"], None
    if isinstance(given, str):
        state = find_state(llm, given, tenant)
        llm.kv_cache_states.use(state, tenant, terms.get("cache_salt", ""))
    return Continuation(llm, tenant, state)


def find_state(llm: AsyncLLM, id: str, tenant: str) -> KVState:
    """Return a tenant's state. Raises ApiError 404 if it does not exist or belongs to another tenant."""
    return _found(llm.kv_cache_states.find(id, tenant))


def _found(state: KVState | None) -> KVState:
    if state is None:
        raise ApiError(404, "this KV state does not exist or has expired", PARAM, "kv_cache_state_not_found")
    return state


def describe(state: KVState) -> KVCacheState:
    """Return the description of a state for replies."""
    return KVCacheState(state.id, state.num_tokens, int(state.expires_at))


def _requested_state(api: Api, request: Request) -> KVState:
    tenant, id = tenant_of(request.headers, request.query_params.get("tenant")), request.path_params["id"]
    books = (model.llm.kv_cache_states for model in api.fleet.all_models() if model.was_loaded)
    return _found(next(filter(None, (book.find(id, tenant) for book in books)), None))
