"""Chats for all dialects: a ChatRequest becomes a ChatGeneration, whose output each dialect formats in its own way."""

from dataclasses import dataclass, field

from starlette.requests import Request

from octavo.outputs import CompletionOutput
from octavo.server.api import Api
from octavo.server.edge.access_log import RequestRecord
from octavo.text.answer import Answer, AnswerEvent, TextDelta

from .generation import Generation, tokenized
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

    def events(self, new: CompletionOutput) -> list[AnswerEvent]:
        """Return the events of an increment of a completion."""
        return [TextDelta(new.text)] if new.text else []

    def finish_reason(self, new: CompletionOutput) -> str | None:
        """Return the reason why a completion has ended, to be called after `events`; None if it has not ended."""
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
    params = body.sampling_params(llm.generation_defaults)
    llm.check_capacity(params.n)
    messages = body.conversation()
    record.stream = bool(body.stream)
    if api.config.access_log_prompts:
        record.prompt = messages
    if continued := continuation(llm, body.kv_cache_state, params.n, terms):
        messages = continued.whole_chat(messages)
    text = await llm.tokenizer.achat(messages, **body.template_variables())
    # The template adds special tokens.
    [prompt] = await tokenized(llm, [text], add_special_tokens=False, params=params)
    if continued:
        prompt = continued.after_state(prompt)
        terms["kv_cache_state"] = continued.state
        continued.check_quota(prompt, params)
    return ChatGeneration(llm, [prompt], params, terms, record, continuation=continued, body=body)
