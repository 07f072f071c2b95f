"""Logprobs as users read them: maps of token id to Logprob, made from the arrays that the engine sends."""

from collections.abc import Callable, Sequence
from typing import Any, overload

from octavo.engine.messages import TokenLogprobs
from octavo.outputs import Logprob


class LogprobRows:
    """The logprobs at consecutive positions.

    Args:
        given: the arrays.
        text_of: returns the text of a token.
    """

    def __init__(self, given: TokenLogprobs, text_of: Callable[[int], str]):
        self._logprobs, self._ranks = memoryview(given.logprobs).cast("f"), memoryview(given.ranks).cast("i")
        self._top_tokens = memoryview(given.top_tokens).cast("i")
        self._top_logprobs = memoryview(given.top_logprobs).cast("f")
        self._width = len(self._top_tokens) // max(len(self._ranks), 1)
        self._text_of = text_of

    def entry(self, row: int, token: int) -> dict[int, Logprob]:
        """Return the map for one position: `token`, which is there, first, and then the likeliest tokens."""
        text_of, part = self._text_of, slice(row * self._width, (row + 1) * self._width)
        entry = {token: Logprob(self._logprobs[row], self._ranks[row], text_of(token))}
        likeliest = zip(self._top_tokens[part].tolist(), self._top_logprobs[part].tolist(), strict=True)
        for rank, (other, logprob) in enumerate(likeliest, 1):
            if other != token:
                entry[other] = Logprob(logprob, rank, text_of(other))
        return entry


class PromptLogprobs(Sequence[dict[int, Logprob] | None]):
    """The logprobs of a prompt's tokens; see RequestOutput. A map is made when it is read.

    It equals the list of its entries, and is pickled as this list.

    Args:
        tokens: the prompt.
        rows: the logprobs of its tokens from the second one on.
    """

    def __init__(self, tokens: list[int], rows: LogprobRows):
        self._tokens, self._rows = tokens, rows

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob] | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[int, Logprob] | None]: ...

    def __getitem__(self, index: int | slice) -> Any:
        positions = range(len(self))[index]
        if isinstance(positions, int):
            return self._rows.entry(positions - 1, self._tokens[positions]) if positions else None
        return [self[position] for position in positions]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)
