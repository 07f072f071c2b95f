"""POST /v1/chat/completions."""

from collections.abc import Iterator

from fastapi import Request
from starlette.responses import Response

from octavo.async_llm import AsyncLLM
from octavo.outputs import CompletionOutput, Logprob
from octavo.server.edge.body import read_json
from octavo.server.edge.connection import EventStream, reply_while_connected
from octavo.text import Tokenizer

from . import replies
from .events import EventWriter
from .generation import Generation, Tally, check_model, new_id, tokenized
from .kv_states import continuation
from .protocol import ChatRequest


async def chat_completions(llm: AsyncLLM, request: Request) -> Response:
    """Raises ApiError, OctavoError."""
    body = await read_json(request, ChatRequest)
    check_model(llm, body.model)
    params, terms = body.sampling_params(), body.terms(request.headers)
    llm.check_capacity(params.n)
    messages = body.conversation()
    if going_on := continuation(llm, body.kv_cache_state, params.n, terms):
        messages = going_on.chat(messages)
    text = llm.tokenizer.chat(messages, **body.template_variables())
    [prompt] = await tokenized(llm.tokenizer, [text], add_special_tokens=False)  # the template has them
    if going_on:
        prompt = going_on.after_state(prompt)
        terms["kv_cache_state"] = going_on.state
        going_on.check_quota(prompt, params)
    generation = Generation(llm, [prompt], params, terms, new_id("chatcmpl"), going_on)
    if body.stream:
        return EventStream(EventWriter(generation, _chunk(generation), _Choices(generation), body.include_usage))
    return await reply_while_connected(request.receive, _whole(generation))


async def _whole(generation: Generation) -> Response:
    [output] = await generation.whole()
    tally = Tally()
    tally.add(output)
    generation.hear(output)
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
            usage=tally.usage,
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
    """An increment as OpenAI tells it: the role, new text and the end, each in a chunk of its own."""

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
