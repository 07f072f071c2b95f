"""DeepSeek R1: the answer begins with the reasoning, with or without <think>."""

from .think_tags import ThinkTags


class DeepSeekR1(ThinkTags):
    """Parser of reasoning that ends with </think>."""

    begins_inside = True
