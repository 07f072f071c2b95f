"""OpenAI's response objects, as structs that msgspec encodes in about a microsecond."""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_encode = msgspec.json.Encoder().encode
# Characters that end a line for Python's str.splitlines(), and so for httpx's iter_lines(), but not for JSON.
_LINE_ENDS = [("\u0085".encode(), rb"\u0085"), ("\u2028".encode(), rb"\u2028"), ("\u2029".encode(), rb"\u2029")]


def encode(body: Any) -> bytes:
    """Return the JSON of a struct, or of anything that msgspec encodes: one line for every client that reads lines."""
    text = _encode(body)
    if not text.isascii():
        for character, escape in _LINE_ENDS:
            text = text.replace(character, escape)
    return text


class Json(Response):
    """A struct (or anything that msgspec encodes) as a JSON response."""

    media_type = "application/json"

    def __init__(self, body: Any, status_code: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(encode(body), status_code, headers)


@dataclass(frozen=True)
class Elements:
    """Elements of a JSON array that are too many to be encoded at once.

    Attributes:
        pieces: their JSON, separated by commas, in pieces.
        stand_in: an element that takes their place in a reply until it is sent; see JsonInPieces.
    """

    pieces: list[bytes]
    stand_in: msgspec.Raw = field(default_factory=lambda: msgspec.Raw(b'"%b"' % uuid.uuid4().hex.encode()))


class JsonInPieces(Response):
    """A struct as a JSON response, written in pieces, between which other requests are served.

    Args:
        elements: those whose stand-ins `body` has.
    """

    media_type = "application/json"

    def __init__(self, body: Any, elements: Iterable[Elements]):
        self._pieces = [encode(body)]
        for each in elements:
            self._pieces = [part for piece in self._pieces for part in _replaced(piece, each)]
        super().__init__(headers={"content-length": str(sum(map(len, self._pieces)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _replaced(piece: bytes, elements: Elements) -> list[bytes]:
    """Return a piece with elements in place of their stand-ins, in pieces."""
    first, *others = piece.split(bytes(elements.stand_in))
    return [first, *(part for other in others for part in (*elements.pieces, other))]


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct):
    error: ErrorBody


class ModelPermission(msgspec.Struct, kw_only=True):
    """A field of model cards in vLLM and older versions of OpenAI's API. Some clients require it."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, kw_only=True):
    """A name of a served model.

    Attributes:
        root: the name or path by which the model was loaded; None for a split.
        parent: the model's own name if this is an alias of it.
        max_model_len: in tokens; None if the model has not been loaded yet.
        state: of the model: unloaded, loading, loaded, draining or failed; None for a split.
        aliases: other names of the model.
        shares: of a split: percent by model.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octavo"
    root: str | None
    parent: str | None = None
    max_model_len: int | None = None
    state: str | None = None
    aliases: list[str] = []
    shares: dict[str, float] | None = None
    permission: list[ModelPermission]


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class KVCacheState(msgspec.Struct):
    """A kept KV state. `id` is its handle; `expires_at` is a Unix time in seconds, which every use postpones."""

    id: str
    tokens: int
    expires_at: int


class Reply(msgspec.Struct, kw_only=True):
    """Base of completions, chats and the chunks of their streams.

    Attributes:
        usage: in a chunk, present only if requested.
        seed: the request's seed, or the one drawn for it. The same seed gives the same text. Absent for several
            prompts.
        kv_cache_state: the kept state; None if it could not be kept; absent if not requested.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET
    kv_cache_state: KVCacheState | msgspec.UnsetType | None = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | msgspec.Raw | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """A completion, or a chunk of its stream. The last three fields are vLLM's, and only present if requested."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(Reply, kw_only=True):
    """A text completion, or one chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, omit_defaults=True):
    """A function and its arguments as JSON text; in a stream, the name comes first, and then pieces of arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    index: int
    function: FunctionCall
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """An answer. `content` is None if there is nothing but calls. `reasoning` is the newer name of the same text.

    `function_call` is the only call if the request has `functions`, the older form of `tools`.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: FunctionCall | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Chat(Reply, kw_only=True):
    """A chat completion."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionCall | None = None


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(Reply, kw_only=True):
    """One chunk of a streamed chat completion."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
