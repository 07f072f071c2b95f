"""Granite 3.2: "Here is my thought process:", then "Here is my response:"."""

from typing import ClassVar

from .think_tags import ThinkTags


class GraniteReasoning(ThinkTags):
    """Parser of reasoning between two phrases."""

    starts: ClassVar[tuple[str, ...]] = ("Here is my thought process:", "Here's my thought process:")
    ends: ClassVar[tuple[str, ...]] = ("Here is my response:", "Here's my response:")
