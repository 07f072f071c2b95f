"""POST /v1/completions."""

import itertools
from collections.abc import Iterator
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.outputs import CompletionOutput, Logprob
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.openapi.operation import MODEL, Operation
from octavo.text import Tokenizer

from . import replies
from .events import EventStream
from .generation import Generation, infilled, tokenized
from .kv_states import continuation
from .protocol import CompletionRequest

Scored = tuple[int, dict[int, Logprob] | None]
"""A token and its logprobs; None for the first token of a prompt."""


def routes(api: Api) -> list[Route]:
    """Return the route of this family."""
    operation = Operation(
        tag="OpenAI",
        summary="Complete prompts.",
        body=CompletionRequest,
        example={"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8},
        reply=replies.Completion,
        events=replies.Completion,
    )
    return [route("POST", "/v1/completions", partial(completions, api), operation)]


async def completions(api: Api, request: Request) -> Response:
    """Complete prompts. Raises ApiError, OctavoError."""
    record = RequestRecord.of(request.scope)
    content = await api.bodies.read_json(request, admit=api.fleet.check_capacity)
    body = CompletionRequest.from_json(content, api.config)
    generation = await prepare(api, request, body, record)
    echoed = [_text(generation.llm.tokenizer, prompt) for prompt in body.prompt] if body.echo else []
    if body.stream:
        choices = _Choices(generation, echoed)
        return EventStream(generation, _reply(generation), choices, body.include_usage, body.continuous_usage)
    return await _whole(generation, echoed)


async def prepare(api: Api, request: Request, body: CompletionRequest, record: RequestRecord) -> Generation:
    """Return the generation that completes the prompts of a request. Raises ApiError, OctavoError."""
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
        begins = not (continued and continued.state)
        prompts = await tokenized(llm, body.prompt, add_special_tokens=begins, params=params)
    if continued:
        terms["kv_cache_state"] = continued.state
        continued.check_quota(prompts[0], params)
    return Generation(llm, prompts, params, terms, record, "cmpl", continued)


async def _whole(generation: Generation, echoed: list[str]) -> Response:
    outputs = await generation.whole()
    reply, choice = _reply(generation), _Choices(generation, echoed)
    for prompt, output in enumerate(outputs):
        reply.choices += [choice.of(prompt, new) for new in output.outputs]
    reply.usage = generation.usage
    reply.kv_cache_state = generation.kept_state()
    if len(outputs) == 1:
        reply.seed = outputs[0].seed
    return replies.Json(reply)


class _Choices:
    """Returns the choices of a reply or of a stream.

    Args:
        echoed: the text of each prompt, with which the first choice of each completion begins; empty for none.
    """

    def __init__(self, generation: Generation, echoed: list[str]):
        self._generation, self._echoed = generation, echoed
        self._offsets: dict[tuple[int, int], int] = {}  # by (prompt, completion): where the next token is in the text

    def __call__(self, prompt: int, new: CompletionOutput) -> Iterator[replies.CompletionChoice]:
        """Return the choice of a chunk, if the increment is of any use to a client."""
        is_first = (prompt, new.index) not in self._offsets
        choice = self.of(prompt, new)
        if choice.text or new.logprobs or new.finish_reason or (is_first and choice.prompt_logprobs):
            yield choice

    def of(self, prompt: int, new: CompletionOutput) -> replies.CompletionChoice:
        """Return a choice. Its index counts the completions of all prompts, those of the first prompt first."""
        generation, key = self._generation, (prompt, new.index)
        is_first = key not in self._offsets
        echo = self._echoed[prompt] if is_first and self._echoed else ""
        known = generation.prompt_logprobs.get(prompt) if is_first else None
        logprobs = None
        if new.logprobs is not None:
            scored: list[Scored] = list(zip(new.token_ids, new.logprobs, strict=True))
            offset = self._offsets.get(key, len(echo))
            if known and self._echoed:
                scored, offset = [*zip(generation.prompts[prompt], known, strict=True), *scored], 0
            logprobs = _logprobs(generation.llm.tokenizer, scored, offset, bool(generation.params.logprobs))
            self._offsets[key] = offset + sum(map(len, logprobs.tokens))
        else:
            self._offsets[key] = 0
        return replies.CompletionChoice(
            index=prompt * generation.params.n + new.index,
            text=echo + new.text,
            logprobs=logprobs,
            finish_reason=new.finish_reason,
            stop_reason=new.stop_reason,
            prompt_logprobs=replies.prompt_logprobs(known) if known else msgspec.UNSET,
        )


def _reply(generation: Generation) -> replies.Completion:
    return replies.Completion(
        id=generation.id,
        created=generation.created,
        model=generation.model,
        system_fingerprint=generation.fingerprint,
        choices=[],
    )


def _logprobs(tokenizer: Tokenizer, scored: list[Scored], offset: int, with_top: bool) -> replies.CompletionLogprobs:
    """Return the logprobs of tokens, the first of which starts at `offset` in the text."""
    tokens = [of[token].decoded_token if of else tokenizer.token_text(token) for token, of in scored]
    return replies.CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[of[token].logprob if of else None for token, of in scored],
        top_logprobs=[_by_text(of) if of else None for _, of in scored] if with_top else None,
        text_offset=list(itertools.accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
    )


def _by_text(entries: dict[int, Logprob]) -> dict[str, float]:
    """Return logprobs by text. If tokens have the same text, such as parts of a character, the most likely one wins."""
    return {entry.decoded_token: entry.logprob for entry in sorted(entries.values(), key=lambda entry: -entry.rank)}


def _text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
