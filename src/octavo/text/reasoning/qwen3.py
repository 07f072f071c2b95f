"""Qwen3 and models alike: <think>...</think> if the model reasons."""

from .think_tags import ThinkTags


class Qwen3(ThinkTags):
    """Parser of reasoning that an answer, or the end of the prompt, begins with <think>."""
