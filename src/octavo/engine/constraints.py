"""Constraints: follow the grammars of the sequences that have one, and compile them outside of the step loop."""

from array import array
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from .sequence import Sequence

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from octavo.text.grammars import Grammars, Matcher

    from .scheduler import StepPlan


class Constraints:
    """The grammars of an engine's sequences.

    Args:
        load: loads the vocabulary; called once, in a thread, when the first grammar arrives.
    """

    def __init__(self, load: "Callable[[], Grammars]"):
        self._load = load
        self._grammars: Grammars | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._compiling: dict[str, tuple[Sequence, Future[Matcher]]] = {}

    def __bool__(self) -> bool:
        """Return whether grammars are being compiled."""
        return bool(self._compiling)

    def begin(self, seq: Sequence) -> None:
        """Begin to compile the grammar of a sequence. `compiled` returns the sequence when that is done."""
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(1, "octavo-grammars")
        self._compiling[seq.id] = (seq, self._threads.submit(self._compile, seq))

    def cancel(self, id: str) -> bool:
        """Forget a sequence, and return whether its grammar was being compiled."""
        seq, job = self._compiling.pop(id, (None, None))
        return seq is not None and job is not None and (job.cancel() or True)

    def compiled(self) -> list[tuple[Sequence, str | None]]:
        """Return the sequences whose grammars have been compiled since the last call, in order of arrival.

        The second entry is the reason why a sequence cannot be served, or None.
        """
        done = []
        for seq, job in list(self._compiling.values()):
            if not job.done():
                break  # one thread compiles them in order; a leader is thus queued before its followers
            del self._compiling[seq.id]
            error = job.exception()
            if error is None:
                seq.matcher = job.result()
            done.append((seq, None if error is None else str(error) or repr(error)))
        return done

    def close(self) -> None:
        """End the thread."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, seq: Sequence) -> "Matcher":
        if self._grammars is None:
            self._grammars = self._load()
        outputs = seq.params.structured_outputs
        assert outputs is not None
        return self._grammars.matcher(outputs, seq.request.output)


def count_allowed(seq: Sequence, draft: "array[int]") -> int:
    """Return how many of the first draft tokens the sequence's grammar allows before the end of the output."""
    if seq.matcher is None:
        return len(draft)
    ends = next((i for i, token in enumerate(draft) if token in seq.stop_tokens), len(draft))
    return seq.matcher.count_allowed(draft[:ends])


def masks_of(plan: "StepPlan") -> list[bytes] | None:
    """Return the masks of all rows to be sampled, empty for those without a grammar; None if no row has one.

    If a grammar fails, its error is stored in the sequence, and its rows have no mask.
    """
    if all(seq.matcher is None for seq in plan.sequences):
        return None
    masks: list[bytes] = []
    for i, seq in enumerate(plan.sequences):
        masks += [b""] * seq.num_scored(plan.chunks[i])
        if not plan.samples(i):
            continue
        draft = plan.drafts.get(i)
        rows = 1 + len(draft or ())
        if seq.matcher is None:
            masks += [b""] * rows
            continue
        try:
            masks += seq.matcher.masks(draft)
        except Exception as error:  # a fault in a grammar ends its own request only
            seq.grammar_error = str(error) or repr(error)
            masks += [b""] * rows
    return masks
