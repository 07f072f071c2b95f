"""What a client may send: OpenAI's request bodies with vLLM's extra sampling fields, as strict pydantic models.

null means "not given", as with OpenAI. Ranges are not checked here but by SamplingParams and ServiceTerms, which know
them.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers

from octavo.errors import InvalidRequest
from octavo.params import MAX_LOGPROBS, SamplingParams, ServiceTerms

MAX_COMPLETIONS = 1024  # of one request, for all its prompts together
TENANT_HEADER = "X-Octavo-Tenant"

# Fields that a request and SamplingParams share, name and meaning.
_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__) - {"max_tokens", "logprobs", "logit_bias"}

_TERMS = ServiceTerms.__struct_fields__


def _refuse(value: Any) -> None:
    if value:  # null, false, [] and {} ask for nothing
        raise PydanticCustomError("unsupported", "is not supported by this server")


def _prompts(value: Any) -> list[str | list[int]]:
    """One entry per prompt, whichever of four shapes `prompt` has. A pydantic union would make four complaints."""

    def is_tokens(value: Any) -> bool:
        return isinstance(value, list) and all(type(token) is int for token in value)

    one = isinstance(value, str) or (bool(value) and is_tokens(value))
    prompts = [value] if one else value
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) or is_tokens(prompt) for prompt in prompts):
        raise PydanticCustomError("prompt", "should be a string, a list of token ids, or a list of either")
    if not prompts or not all(prompts):
        raise PydanticCustomError("prompt", "should not be empty")
    return prompts


def _text(content: Any) -> str | None:
    """Content as text; its parts on lines of their own, as vLLM joins them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PydanticCustomError("content", "should be a string or a list of text parts")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" and isinstance(kind, str):
            raise PydanticCustomError("content", "has a part of type {kind}: only text is supported", {"kind": kind})
        if kind is None or not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "should have parts with a type and a text, unlike part {i}", {"i": i})
    return "\n".join(part["text"] for part in content)


Ignored = Any
"""A field of OpenAI's that changes nothing here: accepted, as many clients always send it."""
Unsupported = Annotated[Any, AfterValidator(_refuse)]
"""A field of OpenAI's that would change the answer: refused unless empty."""


class Strict(BaseModel):
    """No field that is not declared, no number from a string, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationRequest(Strict):
    """What the two kinds of completion have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Any = None  # a string or a list of them, as SamplingParams checks
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    speculative_tokens: int | None = None
    priority: int | None = None
    tenant: str | None = None
    ttft_target: float | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    kv_cache_state: bool | str | None = None  # keep it; go on from the one with this handle, and keep the new one
    user: Ignored = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "has stream_options, which need stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest for a value out of range."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        bias = {_token_id(key): value for key, value in (self.logit_bias or {}).items()}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, logit_bias=bias or None, **given)

    def terms(self, headers: Headers) -> dict[str, Any]:
        """The fields of ServiceTerms that are given, and the tenant."""
        given = {name: value for name in _TERMS if (value := getattr(self, name)) is not None}
        return given | {"tenant": tenant_of(headers, self.tenant)}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Unsupported = None

    def sampling_params(self) -> SamplingParams:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of must be equal to n: this server does not rank completions", "best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("echo with logprobs is not supported: this server has no logprobs of prompts", "echo")
        params = self.params(16 if self.max_tokens is None else self.max_tokens, self.logprobs)
        if len(self.prompt) * params.n > MAX_COMPLETIONS:
            raise InvalidRequest(f"prompt asks for more than {MAX_COMPLETIONS} completions in one request", "prompt")
        return params


class Message(Strict):
    """One turn. The fields that an answer of OpenAI's has beside its content are accepted as long as they are empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, PlainValidator(_text)] = None
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "has no content")
        return self


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    reasoning_effort: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    def sampling_params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.params(limit, (self.top_logprobs or 0) if self.logprobs else None)

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates know them; OpenAI's newer name for the system is not known to any."""
        return [
            {"role": "system" if m.role == "developer" else m.role, "content": m.content or ""} for m in self.messages
        ]

    def template_variables(self) -> dict[str, Any]:
        """Raises InvalidRequest for a name that is no variable of the template."""
        variables = dict(self.chat_template_kwargs or {})
        if taken := variables.keys() & {"messages", "self"}:
            raise InvalidRequest(f"chat_template_kwargs may not set {min(taken)}", "chat_template_kwargs")
        if self.add_generation_prompt is not None:
            variables["add_generation_prompt"] = self.add_generation_prompt
        return variables


def tenant_of(headers: Headers, named: str | None) -> str:
    """Whose a request is that may have `named` somebody. Raises InvalidRequest.

    A proxy that knows who is calling says so in a header, and that wins over what the client says, even if it is empty:
    a client must not put its requests on another's account, or into another's cache.
    """
    match headers.getlist(TENANT_HEADER):
        case []:
            return named or ""
        case [tenant]:
            return tenant
        case _:  # a client's own, and what the proxy added to it: which is which cannot be told
            raise InvalidRequest(f"there is more than one header {TENANT_HEADER}", "tenant")


def _token_id(key: str) -> int:
    # At most 9 digits: int() itself takes "1_0", " 7" and "٣", and raises for thousands of digits.
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise InvalidRequest(f"logit_bias must have token ids as its keys, not {key!r}", "logit_bias")
    return int(key)
