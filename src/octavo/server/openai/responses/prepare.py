"""Prepare the generation of a response: check the request, find what it continues, and render its prompt."""

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from octavo.errors import PromptTooLong
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.errors import ApiError
from octavo.server.openai.chat_generation import ChatGeneration
from octavo.server.openai.chat_generation import prepare as prepare_chat
from octavo.server.openai.protocol import ChatRequest, tenant_of

from .body import ResponsesRequest, own_names
from .items import Item, input_items, references, response_of
from .objects import ResponseObject
from .store import ResponseStore

DEFAULT_RESERVED = 1024  # tokens for the output of a truncated conversation
MAX_REFERENCES = 256  # stored responses whose items one request may name


@dataclass
class Prepared:
    """A checked request with its prompt.

    Attributes:
        tenant: the request's tenant.
        input: its own input items.
    """

    body: ResponsesRequest
    tenant: str
    input: list[Item]
    generation: ChatGeneration

    def response(self) -> ResponseObject:
        """Return a new response without output."""
        body, params = self.body, self.generation.params
        reasoning = body.reasoning
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        return ResponseObject(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            status="queued" if body.background else "in_progress",
            background=bool(body.background),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            model=self.generation.model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            prompt_cache_retention=body.prompt_cache_retention,
            reasoning=reasoning.model_dump() if reasoning else {"effort": None, "summary": None},
            safety_identifier=body.safety_identifier,
            store=body.stored,
            temperature=params.temperature,
            text={"verbosity": "medium", "format": {"type": "text"}, **text},
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=params.top_p,
            truncation=body.truncation or "disabled",
            user=body.user,
            metadata=body.metadata or {},
            system_fingerprint=self.generation.fingerprint,
        )


async def prepare(api: Api, store: ResponseStore, request: Request, record: RequestRecord) -> Prepared:
    """Return a request, ready to generate its response. Raises ApiError, OctavoError."""
    content = await api.bodies.read_json(request, admit=api.fleet.check_capacity)
    body = ResponsesRequest.from_json(content, api.config)
    named = body.sampling.get("tenant")
    tenant = tenant_of(request.headers, named if isinstance(named, str) else None)
    before = await _continued(store, body.previous_response_id, tenant)
    own = input_items(body.input, await _referenced(store, body.input, before, tenant))
    with own_names():
        chat = body.chat(before + own, api.config)
        if body.truncation == "auto":
            generation = await _prepare_truncated(api, request, chat, record, body)
        else:
            generation = await prepare_chat(api, request, chat, record)
    record.stream = bool(body.stream)
    return Prepared(body, tenant, own, generation)


async def _continued(store: ResponseStore, id: str | None, tenant: str) -> list[Item]:
    """Return the items of the conversation that a request continues. Raises ApiError 404 or 400."""
    if id is None:
        return []
    turns = await store.conversation(id, tenant)
    if (status := turns[-1].status) not in ("completed", "incomplete"):
        raise ApiError(400, f"a response of status {status} cannot be continued", "previous_response_id")
    return [item for turn in turns for item in turn.items]


async def _referenced(store: ResponseStore, given: Any, before: list[Item], tenant: str) -> dict[str, Item]:
    """Return the stored items that item_reference items of an input name, by id."""
    wanted = references(given)
    found = {item["id"]: item for item in before if item["id"] in wanted}
    responses = {response_of(id) for id in wanted - found.keys()}
    if len(responses) > MAX_REFERENCES:
        raise ApiError(400, f"input has items of more than {MAX_REFERENCES} stored responses", "input")
    for stored in await asyncio.gather(*(store.find(id, tenant) for id in sorted(responses))):
        if stored is not None:
            found |= {item["id"]: item for item in stored.items}
    return found


async def _prepare_truncated(
    api: Api, request: Request, chat: ChatRequest, record: RequestRecord, body: ResponsesRequest
) -> ChatGeneration:
    """Return what prepare_chat does, for a chat without its oldest messages if it is too long.

    A conversation is cut before a message of the user, so that no answer of the model or of a tool loses its question.
    Instructions stay. Tokens for the output are left free if leaving out messages can achieve it.
    """
    messages, keep = chat.messages, int(body.instructions is not None)

    async def prepared(start: int) -> ChatGeneration:
        if record.on_end is not None:  # the attempt before has acquired the model
            record.on_end()
            record.on_end = None
        shorter = chat.model_copy(update={"messages": messages[:keep] + messages[start:]})
        return await prepare_chat(api, request, shorter, record)

    async def fits(start: int) -> bool:
        try:
            generation = await prepared(start)
        except PromptTooLong:
            return False
        context = generation.llm.info.max_model_len
        reserved = min(body.max_output_tokens or DEFAULT_RESERVED, context // 4)
        return len(generation.prompts[0]) <= context - reserved

    starts = [keep, *(i for i in range(keep + 1, len(messages)) if messages[i].role == "user")]
    low, high = 0, len(starts) - 1
    middle = 0  # most conversations fit
    while low < high:
        if await fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
        middle = (low + high) // 2
    return await prepared(starts[low])
