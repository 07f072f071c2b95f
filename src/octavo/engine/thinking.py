"""ThinkingBudget: ends the reasoning of a model after so many tokens."""

from array import array

from .messages import Thinking


class ThinkingBudget:
    """Decides which token must come next in a sequence so that its reasoning ends within the budget.

    Reasoning begins after the tokens `start`, in the prompt or in the output, and ends with the tokens `end`. After
    `budget` tokens of reasoning, `end` is forced token by token, or as soon as a grammar allows it. This depends on the
    sequence's tokens only, so it is the same after a preemption and on another engine.

    Args:
        tokens: prompt and output. Call `advance` after each token that is appended to it.
    """

    def __init__(self, thinking: Thinking, tokens: "array[int]", num_prompt: int):
        self._thinking, self._tokens, self._num_prompt = thinking, tokens, num_prompt
        end = _find_last(tokens, thinking.end)
        self._outside_since = 0 if end is None else end + len(thinking.end)
        start = _find(tokens, thinking.start, self._outside_since)
        self._inside_since = None if start is None else start + len(thinking.start)

    def advance(self) -> None:
        """Take the last token into account."""
        tokens, start = self._tokens, self._thinking.start
        if _ends_with(tokens, self._thinking.end):
            self._outside_since, self._inside_since = len(tokens), None
        elif self._inside_since is None and len(tokens) - self._outside_since >= len(start):
            self._inside_since = len(tokens) if _ends_with(tokens, start) else None

    @property
    def forced_token(self) -> int | None:
        """Return the token that must come next; None if any may."""
        if self._inside_since is None:
            return None
        end, first = self._thinking.end, max(self._inside_since + self._thinking.budget, self._num_prompt)
        past = len(self._tokens) - first
        if past < 0:
            return None
        begun = next(size for size in range(min(past, len(end) - 1), -1, -1) if _ends_with(self._tokens, end[:size]))
        return end[begun]


def _find(tokens: "array[int]", part: list[int], begin: int) -> int | None:
    """Return the first position from `begin` on where the tokens `part` occur; None if there is none."""
    text, wanted, size = tokens.tobytes(), array("i", part).tobytes(), tokens.itemsize
    at = text.find(wanted, begin * size)
    while at >= 0 and at % size:
        at = text.find(wanted, at + 1)
    return at // size if at >= 0 else None


def _find_last(tokens: "array[int]", part: list[int]) -> int | None:
    """Return the last position where the tokens `part` occur; None if there is none."""
    text, wanted, size = tokens.tobytes(), array("i", part).tobytes(), tokens.itemsize
    at = text.rfind(wanted)
    while at >= 0 and at % size:
        at = text.rfind(wanted, 0, at + len(wanted) - 1)
    return at // size if at >= 0 else None


def _ends_with(tokens: "array[int]", part: list[int]) -> bool:
    return len(tokens) >= len(part) and tokens[len(tokens) - len(part) :].tolist() == part
