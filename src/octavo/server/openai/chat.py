"""POST /v1/chat/completions."""

from collections.abc import Iterator
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.outputs import CompletionOutput, Logprob
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.text import Tokenizer

from . import replies
from .events import EventStream
from .generation import Generation, tokenized
from .kv_states import continuation
from .protocol import ChatRequest


def routes(api: Api) -> list[Route]:
    """Return the route of this family."""
    return [route("POST", "/v1/chat/completions", partial(chat_completions, api))]


async def chat_completions(api: Api, request: Request) -> Response:
    """Answer a chat. Raises ApiError, OctavoError."""
    record = RequestRecord.of(request.scope)
    content = await api.bodies.read_json(request, admit=api.fleet.check_capacity)
    body = ChatRequest.from_json(content, api.config)
    terms = body.terms(request.headers)
    llm = await api.model(record, body.model, body.user_id, terms, body.kv_cache_state)
    params = body.sampling_params(llm.generation_defaults)
    llm.check_capacity(params.n)
    messages = body.conversation()
    record.stream = bool(body.stream)
    if api.config.access_log_prompts:
        record.prompt = messages
    if continued := continuation(llm, body.kv_cache_state, params.n, terms):
        messages = continued.whole_chat(messages)
    text = await llm.tokenizer.achat(messages, **body.template_variables())
    [prompt] = await tokenized(llm, [text], add_special_tokens=False)  # the template adds them
    if continued:
        prompt = continued.after_state(prompt)
        terms["kv_cache_state"] = continued.state
        continued.check_quota(prompt, params)
    generation = Generation(llm, [prompt], params, terms, record, "chatcmpl", continued)
    if body.stream:
        choices = _Choices(generation)
        return EventStream(generation, _chunk(generation), choices, body.include_usage, body.continuous_usage)
    return await _whole(generation)


async def _whole(generation: Generation) -> Response:
    [output] = await generation.whole()
    tokenizer, top = generation.llm.tokenizer, generation.params.logprobs
    choices = [
        replies.ChatChoice(
            index=completion.index,
            message=replies.ChatMessage(content=completion.text),
            logprobs=_logprobs(tokenizer, completion, top),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        for completion in output.outputs
    ]
    return replies.Json(
        replies.Chat(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            system_fingerprint=generation.fingerprint,
            choices=choices,
            usage=generation.usage,
            seed=output.seed,
            kv_cache_state=generation.kept_state(),
        )
    )


def _chunk(generation: Generation) -> replies.ChatChunk:
    return replies.ChatChunk(
        id=generation.id,
        created=generation.created,
        model=generation.model,
        system_fingerprint=generation.fingerprint,
        choices=[],
    )


class _Choices:
    """Returns the choices of an increment. As in OpenAI's API, the role, new text and the end get a chunk each."""

    def __init__(self, generation: Generation):
        self._tokenizer, self._top = generation.llm.tokenizer, generation.params.logprobs
        self._begun: set[int] = set()  # indices of completions

    def __call__(self, _: int, new: CompletionOutput) -> Iterator[replies.ChunkChoice]:
        if new.index not in self._begun:
            self._begun.add(new.index)
            yield replies.ChunkChoice(new.index, replies.Delta(role="assistant", content=""))
        if new.text or new.logprobs:
            logprobs = _logprobs(self._tokenizer, new, self._top)
            yield replies.ChunkChoice(new.index, replies.Delta(content=new.text), logprobs)
        if new.finish_reason:
            yield replies.ChunkChoice(
                new.index, replies.Delta(), finish_reason=new.finish_reason, stop_reason=new.stop_reason
            )


def _logprobs(tokenizer: Tokenizer, new: CompletionOutput, top: int | None) -> replies.ChatLogprobs | None:
    if new.logprobs is None:
        return None

    def spelled(token: int, entry: Logprob) -> tuple[str, float, list[int]]:
        return entry.decoded_token, entry.logprob, list(tokenizer.token_bytes(token))

    content = []
    for token, entries in zip(new.token_ids, new.logprobs, strict=True):
        likeliest = sorted(entries.items(), key=lambda item: item[1].rank)[:top]
        best = [replies.TopLogprob(*spelled(*item)) for item in likeliest]
        content.append(replies.TokenLogprob(*spelled(token, entries[token]), best))
    return replies.ChatLogprobs(content)
