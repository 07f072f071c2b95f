"""Request bodies: those of OpenAI with vLLM's extra sampling fields, as strict pydantic models.

null means "not given", as in OpenAI's API. SamplingParams and ServiceTerms check ranges. neutral_fields.py handles all
other fields.
"""

import functools
import json
import operator
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers

from octavo.errors import InvalidRequest
from octavo.params import (
    MAX_INTEGER,
    BeamSearchParams,
    RepetitionDetectionParams,
    SamplingParams,
    ServiceTerms,
    StructuredOutputs,
)
from octavo.server.config import ServerConfig
from octavo.server.errors import MAX_DETAILS, ApiError, invalid_body

from . import functions, neutral_fields
from .response_format import FORMAT_SCHEMA, GUIDED, structured_outputs_of
from .tools import Tools, tools_of

MAX_ENTRIES = 4096  # in a list or map that has no limit of its own
MAX_TEXT = 4096  # characters in a string that has no limit of its own
TENANT_HEADER = "X-Octavo-Tenant"
TENANT_QUERY = {"tenant": Annotated[str, Meta(description=f"The tenant, unless the header {TENANT_HEADER} names it.")]}
"""The query parameter that names the tenant of a request without a body."""

# Fields with the same name and meaning in requests and in SamplingParams.
_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__) - {
    "max_tokens",
    "logprobs",
    "logit_bias",
    "top_p",
    "structured_outputs",
    "output_kind",
}

_BEAM_SEARCH_FIELDS = frozenset(BeamSearchParams.__struct_fields__) | {
    *("n", "logprobs", "truncate_prompt_tokens"),
    *("top_p", "top_k", "min_p", "seed", "speculative_tokens"),  # without effect
}
_TERMS = ServiceTerms.__struct_fields__

Defaults = Mapping[str, float | int]
"""Sampling parameters that the model recommends, by the names of SamplingParams."""


Prompt = str | list[int] | list[str] | list[list[int]]
"""The forms of `prompt` in a body."""


def _whole_number(value: Any) -> Any:
    """Convert 8.0 to 8, since JSON has only one type of numbers. Return other values unchanged."""
    return int(value) if type(value) is float and value.is_integer() else value


def _given_model(name: Any) -> Any:
    """Return None for "unknown", the model that sglang-router writes into chats without one."""
    return None if name == "unknown" else name


def prompt_list(value: Any) -> list[str | list[int]]:
    """Return one entry per prompt for any of the four forms of `prompt`. (A union type would report four errors.)"""
    if isinstance(value, str):
        prompts: Any = [value]
    elif isinstance(value, list) and value and isinstance(value[0], (int, float)):
        prompts = [_tokens(value)]
    else:
        prompts = [_tokens(each) for each in value] if isinstance(value, list) else None
    if prompts is None or not all(isinstance(each, (str, list)) for each in prompts):
        raise PydanticCustomError("prompt", "should be a string, a list of token ids, or a list of either")
    if not prompts or not all(prompts):
        raise PydanticCustomError("prompt", "should not be empty")
    return prompts  # type: ignore[no-any-return]


def _tokens(value: Any) -> Any:
    """Return a text prompt unchanged, a prompt of token ids as integers, and None for anything else."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    if all(type(token) is int for token in value):
        return value
    whole = [_whole_number(token) for token in value]
    return whole if all(type(token) is int for token in whole) else None


def _content(content: Any) -> str | list[dict[str, str]] | None:
    """Return the content of a message: text, or a list of text parts. Other parts are refused."""
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
    return [{"type": "text", "text": part["text"]} for part in content]  # without cache_control, a hint


Whole = Annotated[int, BeforeValidator(_whole_number)]


class Strict(BaseModel):
    """Base of bodies and their parts. Refuses undeclared fields, numbers written as strings, and NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """Options of a stream. `continuous_usage_stats` adds the usage so far to every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# Schemas in /openapi.json of fields that are not checked by pydantic.
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_CONSTRAINT = msgspec.json.schema(StructuredOutputs)["$defs"]["StructuredOutputs"]
_REPETITION = msgspec.json.schema(RepetitionDetectionParams)["$defs"]["RepetitionDetectionParams"]
_TEXT = WithJsonSchema({"type": "string"})
_OBJECTS = WithJsonSchema({"type": "array", "items": {"type": "object"}})
_NAME_OR_OBJECT = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})

_JSON_TYPES: dict[Any, Any] = {  # of a parameter's type, None left out
    int: Whole,
    float: float,
    bool: bool,
    str: str,
    list[int]: list[Whole],
    list[str]: list[str],
    dict[int, float]: dict[str, float],
    list[str] | str: Annotated[Any, WithJsonSchema(_TEXTS)],  # SamplingParams checks it
    StructuredOutputs: Annotated[Any, WithJsonSchema(_CONSTRAINT)],  # StructuredOutputs checks it
    RepetitionDetectionParams: Annotated[Any, WithJsonSchema(_REPETITION)],  # RepetitionDetectionParams checks it
}


def _json_field(hint: Any) -> tuple[Any, Any]:
    """Return the type of a parameter and the default None ("not given"), in the form that create_model expects."""
    hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    description = next((note.description for note in notes if isinstance(note, Meta)), None)
    types = [kind for kind in get_args(hint) if kind is not NoneType] if isinstance(hint, UnionType) else [hint]
    return _JSON_TYPES[functools.reduce(operator.or_, types)] | None, Field(None, description=description)


_PARAMETERS = {
    **get_type_hints(SamplingParams, include_extras=True),
    **get_type_hints(ServiceTerms, include_extras=True),
}
_FIELDS: dict[str, Any] = {name: _json_field(hint) for name, hint in _PARAMETERS.items() if name != "output_kind"}
Parameters: Any = create_model("Parameters", __base__=Strict, **_FIELDS)


class GenerationRequest(Parameters):  # type: ignore[misc]
    """Base of CompletionRequest and ChatRequest."""

    neutral: ClassVar[dict[str, Any]]

    model: Annotated[str | None, BeforeValidator(_given_model)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    kv_cache_state: bool | str | None = None  # true: keep the state; a handle: also continue that state
    user: Annotated[Any, _TEXT] | None = None
    safety_identifier: Annotated[Any, _TEXT] | None = None  # OpenAI's newer name for it
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: Annotated[Any, WithJsonSchema(FORMAT_SCHEMA)] | None = None
    guided_json: Annotated[Any, _NAME_OR_OBJECT] | None = None
    guided_regex: Annotated[Any, _TEXT] | None = None
    guided_choice: Annotated[Any, WithJsonSchema(_TEXTS["anyOf"][1])] | None = None
    guided_grammar: Annotated[Any, _TEXT] | None = None

    @classmethod
    def from_json(cls, body: Any, config: ServerConfig) -> Self:
        """Make a request of a parsed body. Raises ApiError 400 if the body is invalid or has too many entries."""
        if isinstance(body, dict):
            if len(body) > MAX_DETAILS:
                raise ApiError(400, f"the body has {len(body)} fields", code="invalid_body")
            body = neutral_fields.resolve_aliases(body)
            body = neutral_fields.without_neutral(body, cls.model_fields.keys(), cls.neutral)
            options, known = body.get("stream_options"), StreamOptions.model_fields.keys()
            if isinstance(options, dict):
                neutral = neutral_fields.STREAM_NEUTRAL
                options = neutral_fields.without_neutral(options, known, neutral, "stream_options")
                body = {**body, "stream_options": options}
            body = cls._limited(body, config)
        try:
            return cls.model_validate(body)  # type: ignore[no-any-return]
        except ValidationError as error:
            raise invalid_body(error) from None

    @classmethod
    def _limited(cls, body: dict[str, Any], config: ServerConfig) -> dict[str, Any]:
        """Return `body`. Raises ApiError 400 if a list, map or string in it is too long."""
        for name, value in body.items():
            is_large = isinstance(value, (list, dict)) and len(value) > MAX_ENTRIES
            if is_large and name not in ("prompt", "messages", "allowed_token_ids"):
                raise ApiError(400, f"{name} has {len(value)} entries; the limit is {MAX_ENTRIES}", name)
            has_own_limit = name in ("prompt", "suffix", "stop") or name in _TERMS or name in GUIDED
            has_own_limit = has_own_limit or name == "chat_template"
            if isinstance(value, str) and len(value) > MAX_TEXT and not has_own_limit:
                raise ApiError(400, f"{name} has {len(value)} characters; the limit is {MAX_TEXT}", name)
        stop = body.get("stop")
        for text in stop if isinstance(stop, list) else [stop]:
            if isinstance(text, str) and len(text) > config.max_stop_length:
                message = f"a stop string has {len(text)} characters; the limit is {config.max_stop_length}"
                raise ApiError(400, f"{message} (max_stop_length)", "stop")
        return body

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if not self.stream and self.stream_options and any(dict(self.stream_options).values()):
            raise PydanticCustomError("stream_options", "has stream_options, which need stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Return whether every chunk of a stream has the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def params(self, defaults: Defaults, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return the request's sampling parameters, with `defaults` for missing ones. Raises InvalidRequest."""
        given: dict[str, Any] = {name: value for name, value in defaults.items() if name != "max_tokens"}
        given.update({name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None})
        if self.top_p == 0:  # the smallest set of tokens: the most likely one
            given["top_k"] = 1
        elif self.top_p is not None:
            given["top_p"] = self.top_p
        bias = {_token_id(key): value for key, value in (self.logit_bias or {}).items()}
        guided = {name: value for name in GUIDED if (value := getattr(self, name)) is not None}
        given["structured_outputs"] = structured_outputs_of(self.structured_outputs, self.response_format, guided)
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, logit_bias=bias or None, **given)

    def beam_search(self, params: SamplingParams) -> BeamSearchParams | None:
        """Return the parameters of the beam search that the request wants, None if it wants none.

        Args:
            params: the request's sampling parameters.

        Raises InvalidRequest for parameters that a beam search does not have.
        """
        if not self.use_beam_search:
            if self.length_penalty not in (None, 1.0):
                raise InvalidRequest("length_penalty needs use_beam_search", "length_penalty")
            return None
        given, defaults = self.params({}, None, None), SamplingParams(max_tokens=None)
        for name in sorted(set(SamplingParams.__struct_fields__) - _BEAM_SEARCH_FIELDS):
            if getattr(given, name) and getattr(given, name) != getattr(defaults, name):
                raise InvalidRequest(f"{name} does not go with use_beam_search", name)
        return BeamSearchParams(
            beam_width=params.n,
            max_tokens=MAX_INTEGER if params.max_tokens is None else params.max_tokens,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            ignore_eos=params.ignore_eos,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    @property
    def user_id(self) -> str | None:
        """Return the end user whom the request names, if any, for sticky splits."""
        user = self.safety_identifier if self.user is None else self.user
        return user if isinstance(user, str) and user else None

    def terms(self, headers: Headers) -> dict[str, Any]:
        """Return the given fields of ServiceTerms, and the tenant. Raises InvalidRequest."""
        given = {name: value for name in _TERMS if (value := getattr(self, name)) is not None}
        given["tenant"] = tenant_of(headers, self.tenant)
        ServiceTerms(**given)  # checks them
        return given


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    neutral: ClassVar[dict[str, Any]] = neutral_fields.COMPLETION_NEUTRAL

    prompt: Annotated[list[str | list[int]], PlainValidator(prompt_list, json_schema_input_type=Prompt)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Whole | None = None

    @classmethod
    def _limited(cls, body: dict[str, Any], config: ServerConfig) -> dict[str, Any]:
        prompt, counts = body.get("prompt"), (body.get("n"), body.get("best_of"))
        many = isinstance(prompt, list) and len(prompt) > 0 and isinstance(prompt[0], (str, list))
        prompts = len(prompt) if isinstance(prompt, list) and many else 1
        if many and prompts * max([1, *(n for n in counts if isinstance(n, int))]) > config.max_completions:
            limit = config.max_completions
            raise ApiError(400, f"the prompts times n are more than {limit} completions (max_completions)", "prompt")
        return super()._limited(body, config)

    def sampling_params(self, defaults: Defaults) -> SamplingParams:
        """Return the sampling parameters, see `params`. Raises InvalidRequest."""
        if self.max_tokens == 0 and self.kv_cache_state:
            raise InvalidRequest("kv_cache_state needs max_tokens of at least 1", "kv_cache_state")
        limit = defaults.get("max_tokens", 16) if self.max_tokens is None else self.max_tokens
        params = self.params(defaults, int(limit), self.logprobs)
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            params = msgspec.structs.replace(params, prompt_logprobs=self.logprobs)
        return params


class Message(Strict):
    """One message of a chat, for the template. `reasoning` is a newer name of `reasoning_content`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[dict[str, str]] | None,
        PlainValidator(_content, json_schema_input_type=str | list[dict[str, Any]] | None),
    ] = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "has no content")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message in the form that chat templates expect, which is that of transformers."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content if self.content or self.tool_calls else ""
        if self.tool_calls:
            message["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name:
            message["name"] = self.name
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = message["thinking"] = reasoning  # gpt-oss's template reads "thinking"
        return message


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object. In OpenAI's API they are a string of JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, Any]] = neutral_fields.CHAT_NEUTRAL

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=-1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    functions: Annotated[Any, _OBJECTS] | None = None
    function_call: Annotated[Any, _NAME_OR_OBJECT] | None = None
    tools: Annotated[Any, _OBJECTS] | None = None
    tool_choice: Annotated[Any, _NAME_OR_OBJECT] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None  # SGLang's: false leaves the reasoning in the text

    @classmethod
    def _limited(cls, body: dict[str, Any], config: ServerConfig) -> dict[str, Any]:
        body = functions.with_tools(body)
        if body.get("chat_template") and not config.trust_request_chat_template:
            message = "this server runs only its model's chat template (trust_request_chat_template is false)"
            raise ApiError(400, message, "chat_template")
        messages = body.get("messages")
        if not isinstance(messages, list):
            return super()._limited(body, config)
        if len(messages) > config.max_messages:
            raise ApiError(400, f"messages has more than {config.max_messages} messages (max_messages)", "messages")
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        if sum(len(content) for content in contents if isinstance(content, list)) > config.max_content_parts:
            message = f"messages has more than {config.max_content_parts} content parts (max_content_parts)"
            raise ApiError(400, message, "messages")
        known, neutral = Message.model_fields.keys(), neutral_fields.MESSAGE_NEUTRAL
        messages = [
            neutral_fields.without_neutral(each, known, neutral, f"messages[{i}]") if isinstance(each, dict) else each
            for i, each in enumerate(functions.with_tool_calls(messages))
        ]
        return super()._limited({**body, "messages": messages}, config)

    def sampling_params(self, defaults: Defaults) -> SamplingParams:
        """Return the sampling parameters, see `params`. Raises InvalidRequest."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("the stream of a chat has no prompt_logprobs: set stream to false", "prompt_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit is None and "max_tokens" in defaults:
            limit = int(defaults["max_tokens"])
        return self.params(defaults, limit, (self.top_logprobs or 0) if self.logprobs else None)

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages for a chat template.

        The role "developer", OpenAI's newer name for "system", becomes "system", since templates do not know it.
        """
        return [message.for_template() for message in self.messages]

    def tools_to_call(self) -> Tools | None:
        """Return the functions that the model may call; None if there are none. Raises InvalidRequest."""
        return tools_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def template_variables(self) -> dict[str, Any]:
        """Return the variables for the chat template. Raises InvalidRequest for a name that is reserved."""
        variables = dict(self.chat_template_kwargs or {})
        if taken := variables.keys() & {"messages", "self", "chat_template"}:
            raise InvalidRequest(f"chat_template_kwargs may not set {min(taken)}", "chat_template_kwargs")
        if self.add_generation_prompt is not None:
            variables["add_generation_prompt"] = self.add_generation_prompt
        if self.continue_final_message:
            variables["continue_final_message"] = True
        if self.tools:
            variables["tools"] = self.tools
        if self.documents:
            variables["documents"] = self.documents
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        if self.chat_template is not None:
            variables["chat_template"] = self.chat_template
        return variables


def tenant_of(headers: Headers, named: str | None) -> str:
    """Return the tenant of a request: the header's, or else `named`, which comes from the body or the query.

    A proxy that authenticates clients sets the header. The header wins even if it is empty, so that a client cannot
    use another tenant's quota or cache. Raises InvalidRequest if there is more than one such header.
    """
    match headers.getlist(TENANT_HEADER):
        case []:
            return named or ""
        case [tenant]:
            return tenant
        case _:  # the client may have sent one and the proxy another
            raise InvalidRequest(f"there is more than one header {TENANT_HEADER}", "tenant")


def _token_id(key: str) -> int:
    # At most 9 ASCII digits: int() would also accept "1_0", " 7" and "٣", and raises for thousands of digits.
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise InvalidRequest(f"logit_bias must have token ids as its keys, not {key!r}", "logit_bias")
    return int(key)
