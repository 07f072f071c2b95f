"""Stop strings in a stream: text is held back only while it might be the beginning of one."""


class StopStrings:
    """Watches a text that comes in pieces for the earliest of `stops`, which may span pieces."""

    __slots__ = ("_held", "_longest", "_stops")

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that was found, if one was: the text before it is the last.

        While not `armed`, a stop string is text like any other.
        """
        if not self._longest:
            return text, None
        text = self._held + text
        self._held = ""
        if armed:
            found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
            if found:
                at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
                return text[:at], stop
            for length in range(min(self._longest - 1, len(text)), 0, -1):
                if any(stop.startswith(text[-length:]) for stop in self._stops):
                    self._held = text[-length:]
                    return text[:-length], None
        return text, None

    def flush(self, text: str = "") -> str:
        """What was held back, the text having come to its end with `text`."""
        text, self._held = self._held + text, ""
        return text
