"""POST /v1/completions."""

from collections.abc import Iterator
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.errors import InvalidRequest
from octavo.outputs import CompletionOutput
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.openapi.operation import MODEL, Operation
from octavo.text import Tokenizer

from . import replies
from .events import EventStream
from .generation import Generation, ReplyOptions, infilled, tokenized
from .kv_states import continuation
from .logprobs import EchoedLogprobs
from .protocol import CompletionRequest


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
    beams = body.beam_search(params)
    if beams and (body.suffix or body.kv_cache_state or params.prompt_logprobs is not None):
        what = "suffix, kv_cache_state, or logprobs of an echoed prompt"
        raise InvalidRequest(f"use_beam_search does not go with {what}", "use_beam_search")
    count = len(body.prompt) * params.num_completions
    llm.check_capacity(count)
    continued = continuation(llm, body.kv_cache_state, count, terms)
    if body.suffix:
        prompts, ends = await infilled(llm, body)
        params = msgspec.structs.replace(params, stop_token_ids=[*(params.stop_token_ids or ()), *ends] or None)
    else:
        begins = not (continued and continued.state)
        prompts = await tokenized(llm, body.prompt, begins, params, terms)
    if continued:
        terms["kv_cache_state"] = continued.state
        continued.check_quota(prompts[0], params)
    options = ReplyOptions.of(body, echo=bool(body.echo))
    return Generation(llm, prompts, params, terms, record, "cmpl", continued, options, beams)


async def _whole(generation: Generation, echoed: list[str]) -> Response:
    outputs = await generation.whole()
    reply, choice = _reply(generation), _Choices(generation, echoed)
    for prompt, output in enumerate(outputs):
        reply.choices += [choice.of(prompt, new) for new in output.outputs]
    reply.usage = generation.usage
    reply.kv_cache_state = generation.kept_state()
    if len(outputs) == 1:
        reply.seed = outputs[0].seed
    return generation.json(reply)


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
        has_ids = self._generation.options.token_ids and new.token_ids
        if choice.text or new.logprobs or new.finish_reason or has_ids or (is_first and choice.prompt_logprobs):
            yield choice

    def of(self, prompt: int, new: CompletionOutput) -> replies.CompletionChoice:
        """Return a choice. Its index counts the completions of all prompts, those of the first prompt first."""
        generation, key = self._generation, (prompt, new.index)
        is_first = key not in self._offsets
        echo = self._echoed[prompt] if is_first and self._echoed else ""
        scored = generation.scored.get(prompt) if is_first else None
        with_ids = generation.options.token_ids
        return replies.CompletionChoice(
            index=prompt * generation.params.n + new.index,
            text=echo + new.text,
            logprobs=self._logprobs(key, new, scored.echoed if scored else None, len(echo)),
            finish_reason=new.finish_reason,
            stop_reason=new.stop_reason,
            prompt_logprobs=generation.placed(scored.known) if scored else msgspec.UNSET,
            token_ids=new.token_ids if with_ids else msgspec.UNSET,
            prompt_token_ids=generation.prompts[prompt] if with_ids and is_first else msgspec.UNSET,
        )

    def _logprobs(
        self, key: tuple[int, int], new: CompletionOutput, echoed: EchoedLogprobs | None, echo_length: int
    ) -> replies.CompletionLogprobs | None:
        """Return the logprobs of a choice, those of the echoed prompt first, and note where the next token is."""
        if new.logprobs is None:
            self._offsets[key] = 0
            return None
        generation = self._generation
        offset = self._offsets.get(key, echo_length) if echoed is None else echoed.length
        logprobs = generation.logprobs.completion(new.token_ids, new.logprobs, offset, generation.params.logprobs != 0)
        self._offsets[key] = offset + sum(len(generation.llm.tokenizer.token_text(token)) for token in new.token_ids)
        if echoed is None:
            return logprobs
        return echoed.followed_by(logprobs, generation.placed(echoed.likeliest) if echoed.likeliest else [])


def _reply(generation: Generation) -> replies.Completion:
    return replies.Completion(
        id=generation.id,
        created=generation.created,
        model=generation.model,
        system_fingerprint=generation.fingerprint,
        choices=[],
    )


def _text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
