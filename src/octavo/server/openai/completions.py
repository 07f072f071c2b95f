"""POST /v1/completions."""

import itertools
from collections.abc import Iterator
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.outputs import CompletionOutput, Logprob, RequestOutput
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.text import Tokenizer

from . import replies
from .events import EventStream
from .generation import Generation, infilled, tokenized
from .kv_states import continuation
from .protocol import CompletionRequest


def routes(api: Api) -> list[Route]:
    """Return the route of this family."""
    return [route("POST", "/v1/completions", partial(completions, api))]


async def completions(api: Api, request: Request) -> Response:
    """Complete prompts. Raises ApiError, OctavoError."""
    record = RequestRecord.of(request.scope)
    content = await api.bodies.read_json(request, admit=api.fleet.check_capacity)
    body = CompletionRequest.from_json(content, api.config)
    record.stream = bool(body.stream)
    if api.config.access_log_prompts:
        record.prompt = body.prompt
    terms = body.terms(request.headers)
    llm = await api.model(record, body.model, body.user_id, terms, body.kv_cache_state)
    params = body.sampling_params(llm.generation_defaults)
    count = len(body.prompt) * params.n
    llm.check_capacity(count)
    continued = continuation(llm, body.kv_cache_state, count, terms)
    if body.suffix:
        prompts, ends = await infilled(llm, body)
        params = msgspec.structs.replace(params, stop_token_ids=[*(params.stop_token_ids or ()), *ends] or None)
    else:
        prompts = await tokenized(llm, body.prompt, add_special_tokens=not (continued and continued.state))
    if continued:
        terms["kv_cache_state"] = continued.state
        continued.check_quota(prompts[0], params)
    echoed = [_text(llm.tokenizer, prompt) if body.echo else "" for prompt in body.prompt]
    kind = OnlyEcho if body.only_echo else Generation
    generation = kind(llm, prompts, params, terms, record, "cmpl", continued)
    if body.stream:
        choices = _Choices(generation, echoed)
        return EventStream(generation, _reply(generation), choices, body.include_usage, body.continuous_usage)
    return await _whole(generation, echoed)


class OnlyEcho(Generation):
    """A generation whose answer is only the prompt. One token is computed and left out."""

    def add(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            completion.text, completion.token_ids = "", []
            if completion.finish_reason == "stop":
                completion.finish_reason, completion.stop_reason = "length", None
        super().add(output)


async def _whole(generation: Generation, echoed: list[str]) -> Response:
    outputs = await generation.whole()
    reply = _reply(generation)
    for prompt, output in enumerate(outputs):
        echo = echoed[prompt]
        reply.choices += [_choice(generation, prompt, new, echo, len(echo)) for new in output.outputs]
    reply.usage = generation.usage
    reply.kv_cache_state = generation.kept_state()
    if len(outputs) == 1:
        reply.seed = outputs[0].seed
    return replies.Json(reply)


class _Choices:
    """Returns the choices of a chunk: none if the increment is of no use to a client, otherwise one."""

    def __init__(self, generation: Generation, echoed: list[str]):
        self._generation = generation
        self._echoed = echoed
        self._offsets: dict[
            tuple[int, int], int
        ] = {}  # by (prompt, completion): where the next token starts in the text

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
    """Return a choice. Its index counts the completions of all prompts, those of the first prompt first."""
    return replies.CompletionChoice(
        index=prompt * generation.params.n + new.index,
        text=echo + new.text,
        logprobs=_logprobs(new, offset, bool(generation.params.logprobs)),
        finish_reason=new.finish_reason,
        stop_reason=new.stop_reason,
    )


def _logprobs(new: CompletionOutput, offset: int, with_top: bool) -> replies.CompletionLogprobs | None:
    """Return the new tokens' logprobs, or None if not requested. The first token starts at `offset` in the text."""
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
    """Return logprobs by text. If tokens have the same text, such as parts of a character, the most likely one wins."""
    return {entry.decoded_token: entry.logprob for entry in sorted(entries.values(), key=lambda entry: -entry.rank)}


def _token_texts(new: CompletionOutput) -> list[str]:
    if not new.logprobs:
        return []
    return [of[token].decoded_token for token, of in zip(new.token_ids, new.logprobs, strict=True)]


def _text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
