"""The arguments of `chat`: one conversation or several, and how the chat template renders them."""

import re
from collections.abc import Sequence
from typing import Any, TypedDict, cast

from octavo.errors import InvalidRequest
from octavo.text import Tokenizer

Conversation = list[dict[str, Any]]
"""Messages in OpenAI's format: {"role": ..., "content": ...}, plus any other keys that the model's template reads."""


class ChatOptions(TypedDict, total=False):
    """Keyword arguments of `chat` for the chat template, with vLLM's names.

    Keys:
        chat_template: the source of another template than the model's.
        add_generation_prompt: whether the prompt ends with the header of an answer; by default, unless it ends with a
            message to continue.
        continue_final_message: whether the model continues the last message.
        tools: the functions that the model may call, in OpenAI's format.
        chat_template_kwargs: other variables of the template.
    """

    chat_template: str | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    tools: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any] | None


def conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Return a list of conversations, whether `messages` is one or several."""
    several = isinstance(messages, (list, tuple)) and len(messages) > 0 and isinstance(messages[0], list)
    return cast("list[Conversation]", list(messages) if several else [messages])


def chat_tokens(tokenizer: Tokenizer, messages: Conversation, options: ChatOptions) -> list[int]:
    """Render a conversation with the chat template, and return the prompt's token ids. Raises InvalidRequest."""
    variables = dict(options)
    others = cast("dict[str, Any]", variables.pop("chat_template_kwargs", None) or {})
    if reserved := others.keys() & {"messages", "chat_template"}:
        raise InvalidRequest(f"chat_template_kwargs may not set {min(reserved)}", "chat_template_kwargs")
    variables |= others
    if variables.get("tools"):
        source = cast("str | None", variables.get("chat_template")) or tokenizer.template_source(with_tools=True)
        if not knows_tools(source):
            raise InvalidRequest("this model's chat template does not show tools", "tools")
    text = tokenizer.chat(messages, **variables)
    return tokenizer.encode(text, add_special_tokens=False)


def knows_tools(source: str) -> bool:
    """Return whether a chat template shows the functions of a request."""
    return re.search(r"\btools\b", source) is not None
