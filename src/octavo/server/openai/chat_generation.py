"""Chats for all dialects: a ChatRequest becomes a ChatGeneration, whose output each dialect formats in its own way."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request

from octavo.async_llm import AsyncLLM
from octavo.errors import InvalidRequest
from octavo.frontend.chat import knows_tools
from octavo.frontend.requests import check_logprobs
from octavo.outputs import CompletionOutput
from octavo.params import SamplingParams
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.text.answer import Answer, AnswerEvent, ReasoningDelta

from .answers import AnswerReader, after_reasoning, answer_reader, tool_parser, with_markers
from .generation import Generation, ReplyOptions, tokenized
from .kv_states import continuation
from .protocol import ChatRequest


@dataclass
class FinishedAnswer(Answer):
    """The whole answer of one completion.

    Attributes:
        index: of the completion.
        finish_reason: as in OpenAI's API.
        stop_reason: the stop string or token id that ended the answer, if any.
    """

    index: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class ChatGeneration(Generation):
    """A chat to answer.

    For a stream, call `events` with every CompletionOutput of `increments`. For a whole answer, call `answers` with
    the outputs of `whole`.
    """

    kind: str = "chatcmpl"
    body: ChatRequest = field(kw_only=True)
    new_reader: Callable[[], AnswerReader] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._readers: defaultdict[int, AnswerReader] = defaultdict(self.new_reader)  # by completion

    def events(self, new: CompletionOutput) -> list[AnswerEvent]:
        """Return the events of an increment of a completion."""
        events = self._readers[new.index].read(new.text, new.finish_reason is not None)
        if self.body.include_reasoning is False:
            events = [event for event in events if not isinstance(event, ReasoningDelta)]
        return events

    def finish_reason(self, new: CompletionOutput) -> str | None:
        """Return the reason why a completion has ended, to be called after `events`; None if it has not ended."""
        if new.finish_reason == "stop" and self._readers[new.index].has_calls:
            return "function_call" if self.body.functions else "tool_calls"
        return new.finish_reason

    def answers(self, outputs: list[CompletionOutput]) -> list[FinishedAnswer]:
        """Return the whole answers of all completions."""
        answers = []
        for output in outputs:
            answer = FinishedAnswer(index=output.index, stop_reason=output.stop_reason)
            answer.add(self.events(output))
            answer.finish_reason = self.finish_reason(output)
            answers.append(answer)
        return answers


async def prepare(api: Api, request: Request, body: ChatRequest, record: RequestRecord) -> ChatGeneration:
    """Return a generation that answers a chat: load the model, render the chat and tokenize it.

    Raises ApiError, OctavoError.
    """
    terms = body.terms(request.headers)
    llm = await api.model(record, body.model, body.user_id, terms, body.kv_cache_state)
    tools = body.tools_to_call()
    params = with_markers(llm, tools, body.sampling_params(llm.generation_defaults))
    constraint = None if tools is None else tools.constraint(tool_parser(llm))
    if tools is not None and constraint and (tools.is_forced or params.structured_outputs is None):
        params = msgspec.structs.replace(params, structured_outputs=constraint)
    check_logprobs(params, llm.config.max_logprobs, llm.info, name="top_logprobs")
    llm.check_capacity(params.num_completions)
    messages = body.conversation()
    record.stream = bool(body.stream)
    if api.config.access_log_prompts:
        record.prompt = messages
    if continued := continuation(llm, body.kv_cache_state, params.num_completions, terms):
        messages = continued.whole_chat(messages)
    beams = body.beam_search(params)
    if beams and (continued or params.structured_outputs is not None):
        what = "functions that must be called, or kv_cache_state"
        raise InvalidRequest(f"use_beam_search does not go with {what}", "use_beam_search")
    text = await rendered(llm, body, messages)
    params = after_reasoning(llm, params, text)
    prompt = await chat_tokens(llm, body, text, params, terms)
    if continued:
        prompt = continued.after_state(prompt)
        terms["kv_cache_state"] = continued.state
        continued.check_quota(prompt, params)
    return ChatGeneration(
        llm,
        [prompt],
        params,
        terms,
        record,
        continuation=continued,
        options=ReplyOptions.of(body),
        beams=beams,
        body=body,
        new_reader=answer_reader(llm, body, tools, text),
    )


async def rendered(llm: AsyncLLM, body: ChatRequest, messages: list[dict[str, Any]]) -> str:
    """Return the prompt of a chat. If the template does not know tools, a system message explains them.

    Raises InvalidRequest.
    """
    variables = body.template_variables()
    tools = body.tools_to_call()
    source = body.chat_template or llm.tokenizer.template_source(with_tools=tools is not None)
    if tools is not None and not knows_tools(source):
        del variables["tools"]
        if tools.mode != "none":
            messages = _instructed(messages, tools.instructions())
    return await llm.tokenizer.achat(messages, **variables)


async def chat_tokens(
    llm: AsyncLLM, body: ChatRequest, text: str, params: SamplingParams, terms: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the tokens of a rendered chat, the last ones if the request truncates it. Raises PromptTooLong."""
    if body.truncate_prompt_tokens is not None and body.kv_cache_state:
        raise InvalidRequest("truncate_prompt_tokens cannot be used with kv_cache_state", "truncate_prompt_tokens")
    # The template adds the special tokens.
    [prompt] = await tokenized(llm, [text], False, params, terms)
    return prompt


def _instructed(messages: list[dict[str, Any]], instructions: str) -> list[dict[str, Any]]:
    """Return a chat whose system message, its first one, ends with `instructions`."""
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    content = first["content"]
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": instructions}]
    else:
        content = f"{content}\n\n{instructions}"
    return [{**first, "content": content}, *messages[1:]]
