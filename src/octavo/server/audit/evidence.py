"""Evidence: the hashes of one request's body and of the answers to it, computed as they pass by."""

import hmac
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from octavo.outputs import CompletionOutput

from .chain import Keys


class Evidence:
    """The hashes of one HTTP request.

    Args:
        end: writes the request's line.

    Attributes:
        is_deferred: whether the request's work goes on after its response. Who sets it calls `end` in the end.
    """

    def __init__(self, keys: Keys, end: Callable[[], None]):
        self._keys, self.end = keys, end
        self.is_deferred = False
        self._request: str | None = None
        self._answers: dict[tuple[int, int], hmac.HMAC] = {}
        self._finishes: dict[tuple[int, int], str | None] = {}

    def add_body(self, body: bytes | bytearray) -> None:
        """Add the request's body, without its content encoding."""
        self._request = self._keys.hash(body)

    def add_answer(self, prompt: int, completion: CompletionOutput) -> None:
        """Add an increment, or the whole, of a completion of prompt number `prompt`."""
        place = (prompt, completion.index)
        if (answer := self._answers.get(place)) is None:
            answer = self._answers[place] = hmac.new(self._keys.content, digestmod=sha256)
        if completion.text:
            answer.update(completion.text.encode())
        self._finishes[place] = completion.finish_reason

    def fields(self) -> dict[str, Any]:
        """Return the fields of the request's line, in the order of the answers."""
        places = sorted(self._answers)
        return {
            "request_hash": self._request,
            "answer_hashes": [self._answers[place].hexdigest() for place in places] or None,
            "finish_reasons": [self._finishes[place] for place in places] or None,
        }
