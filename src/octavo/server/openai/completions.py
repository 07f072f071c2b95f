"""POST /v1/completions."""

import itertools
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
from .protocol import CompletionRequest


async def completions(llm: AsyncLLM, request: Request) -> Response:
    """Raises ApiError, OctavoError."""
    body = await read_json(request, CompletionRequest)
    check_model(llm, body.model)
    params, terms = body.sampling_params(), body.terms(request.headers)
    llm.check_capacity(len(body.prompt) * params.n)
    going_on = continuation(llm, body.kv_cache_state, len(body.prompt) * params.n, terms)
    prompts = await tokenized(llm.tokenizer, body.prompt, add_special_tokens=not (going_on and going_on.state))
    if going_on:
        terms["kv_cache_state"] = going_on.state
        going_on.check_quota(prompts[0], params)
    echoed = [_text(llm.tokenizer, prompt) if body.echo else "" for prompt in body.prompt]
    generation = Generation(llm, prompts, params, terms, new_id("cmpl"), going_on)
    if body.stream:
        return EventStream(
            EventWriter(generation, _reply(generation), _Choices(generation, echoed), body.include_usage)
        )
    return await reply_while_connected(request.receive, _whole(generation, echoed))


async def _whole(generation: Generation, echoed: list[str]) -> Response:
    outputs = await generation.whole()
    reply = _reply(generation)
    tally = Tally()
    for prompt, output in enumerate(outputs):
        tally.add(output)
        generation.hear(output)
        echo = echoed[prompt]
        reply.choices += [_choice(generation, prompt, new, echo, len(echo)) for new in output.outputs]
    reply.usage = tally.usage
    reply.kv_cache_state = generation.kept_state()
    if len(outputs) == 1:
        reply.seed = outputs[0].seed
    return replies.Json(reply)


class _Choices:
    """What a stream tells of an increment: one choice, if there is something to tell."""

    def __init__(self, generation: Generation, echoed: list[str]):
        self._generation = generation
        self._echoed = echoed
        self._offsets: dict[tuple[int, int], int] = {}  # of the next token in the text of (prompt, completion)

    def __call__(self, prompt: int, new: CompletionOutput) -> Iterator[replies.CompletionChoice]:
        key = (prompt, new.index)
        echo = "" if key in self._offsets else self._echoed[prompt]
        offset = self._offsets.get(key, len(echo))
        self._offsets[key] = offset + sum(map(len, _token_texts(new)))
        if echo or new.text or new.logprobs or new.finish_reason:
            yield _choice(self._generation, prompt, new, echo, offset)


def _reply(generation: Generation) -> replies.Completion:
    return replies.Completion(
        id=generation.id,
        created=generation.created,
        model=generation.model,
        system_fingerprint=generation.fingerprint,
        choices=[],
    )


def _choice(
    generation: Generation, prompt: int, new: CompletionOutput, echo: str, offset: int
) -> replies.CompletionChoice:
    """OpenAI numbers the completions of all prompts through: those of the first prompt, those of the second, ..."""
    return replies.CompletionChoice(
        index=prompt * generation.params.n + new.index,
        text=echo + new.text,
        logprobs=_logprobs(new, offset, bool(generation.params.logprobs)),
        finish_reason=new.finish_reason,
        stop_reason=new.stop_reason,
    )


def _logprobs(new: CompletionOutput, offset: int, with_top: bool) -> replies.CompletionLogprobs | None:
    """`offset`: where in the text the first of the new tokens stands."""
    if new.logprobs is None:
        return None
    tokens = _token_texts(new)
    return replies.CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[entries[token].logprob for token, entries in zip(new.token_ids, new.logprobs, strict=True)],
        top_logprobs=[_by_text(entries) for entries in new.logprobs] if with_top else None,
        text_offset=list(itertools.accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
    )


def _by_text(entries: dict[int, Logprob]) -> dict[str, float]:
    """Tokens that read the same, such as parts of characters, share a key: the likeliest of them is told."""
    return {entry.decoded_token: entry.logprob for entry in sorted(entries.values(), key=lambda entry: -entry.rank)}


def _token_texts(new: CompletionOutput) -> list[str]:
    if not new.logprobs:
        return []  # none asked for
    return [of[token].decoded_token for token, of in zip(new.token_ids, new.logprobs, strict=True)]


def _text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
