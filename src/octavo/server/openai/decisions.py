"""POST /v1/decisions: answers to predicates, choices and scores about an input, with their probabilities.

Each question becomes a chat: the input, then the question and its options, each with a letter. The probability of an
option is that of its letter as the first token of the answer, among the letters of all options.
"""

import itertools
import string
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.engine.messages import EngineInfo, Pooling
from octavo.errors import InvalidRequest
from octavo.frontend import requests
from octavo.frontend.pooled import pooled_requests, vector_of
from octavo.frontend.tally import Tally
from octavo.outputs import RequestOutput
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.edge.spending import spending
from octavo.server.openapi.operation import MODEL, Operation
from octavo.text import Tokenizer
from octavo.text.offload import off_loop

from .decision_questions import AnyQuestion, DecisionAnswer, part_text
from .neutral_fields import ANY
from .pooled_requests import PooledRequest
from .replies import Json
from .responses.items import chat_messages, input_items
from .responses.objects import InputTokensDetails, OutputTokensDetails, ResponseUsage

MAX_QUESTIONS = 400
MAX_CHARACTERS = 8 << 20  # of all prompts of a request, which repeat the input

Letter = tuple[str, int]
"""The name of an option, and its token."""


class DecisionRequest(PooledRequest):
    """The body of POST /v1/decisions. `input` is text, or items as in the Responses API."""

    neutral: ClassVar[Mapping[str, Any]] = {
        **PooledRequest.neutral,
        **dict.fromkeys(("prompt_cache_key", "prompt_cache_options", "safety_identifier"), ANY),
    }

    input: str | list[dict[str, Any]]
    questions: Annotated[list[AnyQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)]

    def conversation(self) -> list[dict[str, Any]]:
        """Return the input as messages for the chat template. Raises ApiError 400 for images and unknown items."""
        items: Any = self.input
        if isinstance(items, list):
            items = [
                item | {"content": [part_text(part) for part in item["content"]]}
                if isinstance(item.get("content"), list)
                else item
                for item in items
            ]
        messages = chat_messages(input_items(items, {}))
        return [message | {"role": message["role"].replace("developer", "system")} for message in messages]


class Decision(msgspec.Struct, kw_only=True):
    """The answers, in the order of the questions."""

    answers: list[DecisionAnswer]
    model: str
    usage: ResponseUsage


def routes(api: Api) -> list[Route]:
    """Return the route of this family."""
    operation = Operation(
        tag="OpenAI",
        summary="Answer questions about an input with probabilities.",
        body=DecisionRequest,
        example={
            "model": MODEL,
            "input": "I was charged twice for the same month.",
            "questions": [
                {"type": "predicate", "name": "angry", "instructions": "The customer is angry."},
                {
                    "type": "choice",
                    "name": "topic",
                    "instructions": "What is the message about?",
                    "choices": [{"value": "billing"}, {"value": "technical", "description": "errors and outages"}],
                },
            ],
        },
        reply=Decision,
    )
    return [route("POST", "/v1/decisions", partial(decide, api), operation)]


async def decide(api: Api, request: Request) -> Response:
    """Answer the questions of a request. Raises ApiError, OctavoError."""
    record = RequestRecord.of(request.scope)
    body = DecisionRequest.from_json(await api.bodies.read_json(request, admit=api.fleet.check_capacity))
    terms, messages = body.terms(request.headers), body.conversation()
    llm = await api.model(record, body.model, body.user_id, terms)
    llm.check_capacity(len(body.questions))
    record.model, record.tenant = llm.config.model_name, terms["tenant"]
    if api.config.access_log_prompts:
        record.prompt = messages
    before, after = await _around_the_question(llm, messages)
    length = sum(
        len(before) + len(after) + len(question.instructions) + sum(map(len, question.options))
        for question in body.questions
    )
    if length > MAX_CHARACTERS:
        raise InvalidRequest(f"the prompts of all questions have more than {MAX_CHARACTERS:,} characters", "questions")

    def prompts() -> list[tuple[list[int], list[int]]]:
        letters = _letters(llm.tokenizer, max(len(question.options) for question in body.questions))
        return [_prompt(question, before, after, letters, llm.tokenizer, llm.info) for question in body.questions]

    wanted = await off_loop(llm.tokenizer, length, prompts)
    async with spending(record, llm, terms, sum(len(prompt) for prompt, _ in wanted)) as tally:
        outputs = await _answered(llm, wanted, terms, tally)
    answers = [
        question.answer(_probabilities(output)) for question, output in zip(body.questions, outputs, strict=True)
    ]
    return Json(Decision(answers=answers, model=record.model, usage=_counted(record, outputs)))


async def _around_the_question(llm: AsyncLLM, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the prompt of a chat that ends with a question, before and after this question."""
    mark = uuid.uuid4().hex
    chat = [*messages, {"role": "user", "content": mark}]
    parts = (await llm.tokenizer.achat(chat, enable_thinking=False)).split(mark)
    if len(parts) != 2:
        raise InvalidRequest("this model's chat template does not show the last message once", "input")
    return parts[0], parts[1]


def _letters(tokenizer: Tokenizer, count: int) -> list[Letter]:
    """Return names of so many options: letters, or pairs of them, that are one token each. Raises InvalidRequest."""
    upper, lower = string.ascii_uppercase, string.ascii_lowercase
    letters: dict[int, str] = {}
    for name in itertools.chain(upper, lower, map("".join, itertools.product(upper, repeat=2))):
        tokens = tokenizer.encode(name, add_special_tokens=False)
        if len(tokens) == 1:
            letters.setdefault(tokens[0], name)
        if len(letters) == count:
            return [(name, token) for token, name in letters.items()]
    raise InvalidRequest(f"this model's vocabulary can name {len(letters)} options, not {count}", "questions")


def _prompt(
    question: AnyQuestion, before: str, after: str, letters: list[Letter], tokenizer: Tokenizer, info: EngineInfo
) -> tuple[list[int], list[int]]:
    """Return the token ids of a question's prompt, and those of its options. Raises PromptTooLong."""
    options = list(zip(letters, question.options, strict=False))
    lines = [question.instructions, *(f"{name}. {text}" for (name, _), text in options)]
    text = "\n".join([*lines, "Answer with the letter of one option, and nothing else."])
    prompt = requests.encode(f"{before}{text}{after}", tokenizer, info, None, add_special_tokens=False)
    return prompt, [token for (_, token), _ in options]


async def _answered(
    llm: AsyncLLM, prompts: Sequence[tuple[list[int], list[int]]], terms: dict[str, Any], tally: Tally | None
) -> list[RequestOutput]:
    """Return the logits of each question's options. The first question is answered alone: others find its pages."""
    shared: Any = dict(terms)
    priority = shared.pop("priority", 0)
    wanted = [
        request
        for prompt, labels in prompts
        for request in pooled_requests([prompt], Pooling(None, labels), priority, shared)
    ]
    return await llm.generate_in_turn(wanted, tally=tally)


def _probabilities(output: RequestOutput) -> list[float]:
    """Return the softmax of the logits of a question's options."""
    logits = vector_of(output).astype(np.float64)
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()).tolist()  # type: ignore[no-any-return]


def _counted(record: RequestRecord, outputs: list[RequestOutput]) -> ResponseUsage:
    """Return the usage, and note it in the record."""
    count = record.prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    cached = record.cached_tokens = sum(output.num_cached_tokens for output in outputs)
    record.completion_tokens = 0
    return ResponseUsage(
        input_tokens=count,
        input_tokens_details=InputTokensDetails(cached),
        output_tokens=0,
        output_tokens_details=OutputTokensDetails(0),
        total_tokens=count,
    )
