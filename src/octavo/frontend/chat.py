"""The argument of `chat`: one conversation or several."""

from collections.abc import Sequence
from typing import Any, cast

Conversation = list[dict[str, Any]]
"""Messages in OpenAI's format: {"role": ..., "content": ...}, plus any other keys that the model's template reads."""


def conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Return a list of conversations, whether `messages` is one or several."""
    several = isinstance(messages, (list, tuple)) and len(messages) > 0 and isinstance(messages[0], list)
    return cast("list[Conversation]", list(messages) if several else [messages])
