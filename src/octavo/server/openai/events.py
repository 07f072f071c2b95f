"""A streamed generation as server-sent events."""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from octavo.async_llm import Increment
from octavo.outputs import CompletionOutput

from .generation import Generation, Tally
from .replies import ChatChunk, Completion, encode

DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """One server-sent event: one line, as JSON has no bare newlines."""
    return b"data: %b\n\n" % encode(data)


class EventWriter:
    """What a generation brings, as events: `chunk` once for each of the choices that `choices` makes of an increment.

    `choices` is given the prompt's index and what is new of one of its completions. The first increment of an only
    prompt is told with the seed.
    """

    def __init__(
        self,
        generation: Generation,
        chunk: Completion | ChatChunk,
        choices: Callable[[int, CompletionOutput], Iterable[Any]],
        include_usage: bool,
    ):
        self.generation = generation
        self._chunk = chunk
        self._choices = choices
        self._include_usage = include_usage
        self._tell_seed = len(generation.prompts) == 1
        self._tally = Tally()
        chunk.usage = None if include_usage else msgspec.UNSET

    def tell(self, increments: list[Increment]) -> bytes:
        """The events about what is new; b"" if there is nothing that a client could use."""
        chunk = self._chunk
        told = []
        for prompt, output in increments:
            self._tally.add(output)
            self.generation.hear(output)
            chunk.seed = output.seed if self._tell_seed else msgspec.UNSET
            self._tell_seed = False
            for new in output.outputs:
                for choice in self._choices(prompt, new):
                    chunk.choices = [choice]
                    told.append(event(chunk))
        return b"".join(told)

    def end(self) -> bytes:
        """The last events: usage and the state kept, if the client asked for them, and that it is done."""
        chunk = self._chunk
        chunk.kv_cache_state = self.generation.kept_state()
        if not self._include_usage and chunk.kv_cache_state is msgspec.UNSET:
            return DONE
        chunk.choices = []
        if self._include_usage:
            chunk.usage = self._tally.usage
        return event(chunk) + DONE
