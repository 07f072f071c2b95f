"""Find stop strings in streamed text, in time linear in the text."""

from collections import deque
from functools import lru_cache


class StopStrings:
    """Searches text that comes in pieces for the earliest of several stop strings, which may span pieces.

    Text is held back only while it may be the beginning of a stop string.
    """

    __slots__ = ("_automaton", "_held", "_length", "_state")

    def __init__(self, stops: list[str]):
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._state = 0
        self._held: deque[str] = deque()  # pieces that are held back, and the number of their characters
        self._length = 0

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Add the next piece of the text. Must not be called after a stop string has been found.

        Args:
            text: The next piece.
            armed: Whether to search. If not, a stop string that ends or begins in this piece is plain text.

        Returns:
            The text that cannot be part of a stop string, and the stop string that was found, or None. Of several that
            end in one piece, the one that begins first counts, and of those the longest.
        """
        if self._automaton is None:
            return text, None
        if not armed:
            return self.flush(text), None
        if not self._state and self._automaton.first.isdisjoint(text):
            return text, None
        begin, stop, self._state = self._automaton.search(self._state, text)
        begin += self._length
        self._held.append(text)
        self._length += len(text)
        return self._release(begin), stop

    def flush(self, text: str = "") -> str:
        """Return the text that was held back, followed by `text`. To be called at the end of the text."""
        if not self._held:
            return text
        text = "".join(self._held) + text
        self._held.clear()
        self._length = self._state = 0
        return text

    def _release(self, count: int) -> str:
        """Remove and return the first `count` characters that are held back."""
        self._length -= count
        released = []
        while count:
            piece = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft(piece[count:])
                piece = piece[:count]
            released.append(piece)
            count -= len(piece)
        return "".join(released)


class _Automaton:
    """The automaton of Aho and Corasick (1975, "Efficient string matching: an aid to bibliographic search").

    A state is the longest suffix of the text so far that begins a stop string; state 0 is the empty suffix. Searching
    takes amortized O(1) per character, independent of the stop strings.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.first = frozenset(stop[0] for stop in stops)
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]  # of each state: its number of characters
        self._stop: list[str | None] = [None]  # the longest stop string that ends in the state
        self._shorter = [0]  # the state of the longest proper suffix that begins a stop string
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._stop.append(None)
                self._shorter.append(0)
            state = self._next[state][character]
        self._stop[state] = stop

    def _link(self) -> None:
        """Set `_shorter`, from short states to long ones, and inherit the stop strings of shorter states."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if self._stop[state] is None:
                self._stop[state] = self._stop[self._shorter[state]]
            for character, longer in self._next[state].items():
                self._shorter[longer] = self._step(self._shorter[state], character)
                queue.append(longer)

    def _step(self, state: int, character: str) -> int:
        while (following := self._next[state].get(character)) is None and state:
            state = self._shorter[state]
        return following or 0

    def search(self, state: int, text: str) -> tuple[int, str | None, int]:
        """Search `text`, beginning in `state`.

        Returns:
            The index in `text` at which the found stop string begins, or, if none was found, at which the suffix that
            may begin one does (negative: before `text`); the found stop string or None; and the new state.
        """
        begin, found = len(text), None
        for end, character in enumerate(text, 1):
            state = self._step(state, character)
            if end - self._depth[state] > begin:
                break  # no later match can begin as early
            stop = self._stop[state]
            if stop is not None and end - len(stop) <= begin:
                begin, found = end - len(stop), stop
        return (len(text) - self._depth[state], None, state) if found is None else (begin, found, 0)


@lru_cache(maxsize=32)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)  # shared by the n completions of a request
