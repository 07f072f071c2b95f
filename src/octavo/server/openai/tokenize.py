"""POST /tokenize and /detokenize: token ids of a prompt or a chat, and the text of token ids. Routes of vLLM."""

from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.async_llm import AsyncLLM
from octavo.errors import InvalidRequest
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError
from octavo.server.openapi.operation import MODEL, Operation
from octavo.text.offload import off_loop

from .chat_generation import rendered
from .generation import tokenized
from .protocol import ChatRequest, CompletionRequest
from .replies import Json


class Tokenized(msgspec.Struct, kw_only=True):
    """The answer of /tokenize.

    Attributes:
        max_model_len: maximum of tokens of prompt and output together.
        token_strs: the text of each token, if return_token_strs was true.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Tokens(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of /detokenize."""

    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str | None = None


class Text(msgspec.Struct, kw_only=True):
    """The answer of /detokenize, with special tokens."""

    prompt: str


TEXT_OR_CHAT = {
    "type": "object",
    "properties": {
        "model": {"type": ["string", "null"]},
        "prompt": {"type": "string", "minLength": 1},
        "messages": {
            "type": "array",
            "items": {"type": "object"},
            "minItems": 1,
            "description": "Instead of a prompt.",
        },
        "add_special_tokens": {"type": ["boolean", "null"]},
        "return_token_strs": {"type": ["boolean", "null"]},
    },
}
"""The schema of the body of /tokenize. With `messages`, it may have the other fields of a chat."""


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    tokenized = Operation(
        tag="vLLM",
        summary="Return the token ids of a text or a chat.",
        body=TEXT_OR_CHAT,
        example={"model": MODEL, "prompt": "Hello"},
        reply=Tokenized,
    )
    detokenized = Operation(
        tag="vLLM",
        summary="Return the text of token ids.",
        body=Tokens,
        example={"model": MODEL, "tokens": [1, 2, 3]},
        reply=Text,
    )
    return [
        route("POST", "/tokenize", partial(tokenize, api), tokenized),
        route("POST", "/detokenize", partial(detokenize, api), detokenized),
    ]


async def tokenize(api: Api, request: Request) -> Response:
    """Answer with the token ids of `prompt`, or of `messages` in the chat template. Raises ApiError, OctavoError.

    `add_special_tokens` (BOS, and EOS if the model has it) is true by default for a prompt, and false for a chat, whose
    template adds them.
    """
    content = await api.bodies.read_json(request)
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be an object with a prompt, or with messages", code="invalid_body")
    is_chat = "messages" in content
    add_special_tokens = _flag(content, "add_special_tokens", not is_chat)
    return_strings = _flag(content, "return_token_strs", False)
    body: Any = (ChatRequest if is_chat else CompletionRequest).from_json(content, api.config)
    llm = await _model(api, request, body.model)
    prompts: list[Any] = body.prompt if not is_chat else []
    if is_chat:
        prompts.append(await rendered(llm, body, body.conversation()))
    if len(prompts) != 1 or not isinstance(prompts[0], str) or (not is_chat and body.suffix):
        raise InvalidRequest("/tokenize takes one text as its prompt, without suffix", "prompt")
    [tokens] = await tokenized(llm, prompts, add_special_tokens)
    strings = [llm.tokenizer.token_text(token) for token in tokens] if return_strings else None
    return Json(Tokenized(count=len(tokens), max_model_len=llm.info.max_model_len, tokens=tokens, token_strs=strings))


async def detokenize(api: Api, request: Request) -> Response:
    """Answer with the text of `tokens`. Raises ApiError, OctavoError."""
    try:
        body = msgspec.convert(await api.bodies.read_json(request), Tokens)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"the body is not valid: {error}", code="invalid_body") from None
    llm = await _model(api, request, body.model)
    if max(body.tokens, default=0) >= llm.info.vocab_size:
        raise InvalidRequest(f"tokens must be below {llm.info.vocab_size}, the size of the vocabulary", "tokens")
    text = await off_loop(llm.tokenizer, len(body.tokens), lambda: llm.tokenizer.decode(body.tokens, False))
    return Json(Text(prompt=text))


async def _model(api: Api, request: Request, name: str | None) -> AsyncLLM:
    return await api.model(RequestRecord.of(request.scope), name, None, {})


def _flag(content: dict[str, Any], name: str, default: bool) -> bool:
    """Take a boolean field out of a body. Raises ApiError 400 for another type."""
    value = content.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", name)
    return default if value is None else value
