"""Constraints: threads that compile the grammars of sequences and compute the masks of their next tokens.

A sequence with a grammar is *ready* when the mask of its next token has been computed. A step samples tokens of ready
sequences only, so that nobody waits for a slow grammar but its own request. docs/architecture.md explains the design.
"""

import os
import threading
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from .sequence import Sequence
from .speculation import FREE_ROWS, propose_draft

if TYPE_CHECKING:
    from octavo.text.grammars import Grammars, Matcher

    from .scheduler import StepPlan

QUICK_THREADS = 2
QUICK_SECONDS = 0.005  # for which a step waits at most for the masks of quick grammars,
QUICK_SHARE = 0.1  # or this share of the time that the step before took, if that is longer
NICENESS = 10  # of the thread for slow grammars, which thus gets a tenth of a core that a step's threads use


class Constraints:
    """The grammars of an engine's sequences.

    Args:
        load: loads the vocabulary; called once, in a thread, when the first grammar arrives.
    """

    def __init__(self, load: "Callable[[], Grammars]"):
        self._load = load
        self._grammars: Grammars | None = None
        self._compiler = ThreadPoolExecutor(1, "octavo-grammars")
        self._compiling: dict[str, tuple[Sequence, Future[Matcher]]] = {}
        self._quick = Lane("octavo-masks", QUICK_THREADS)
        self._slow = Lane("octavo-slow-masks", 1, NICENESS)
        self._unawaited: list[Future[None]] = []  # batches of quick masks for which no step has waited yet
        self._batches: list[Future[None]] = []  # batches of masks that are being computed
        self._failed: deque[Sequence] = deque()

    def begin(self, seq: Sequence) -> bool:
        """Return whether the grammar of a sequence is known, so that its matcher is set.

        Otherwise, begin to compile it. `compiled` returns the sequence when that is done.
        """
        outputs = seq.params.structured_outputs
        assert outputs is not None
        if self._grammars is not None and not seq.request.output:
            seq.matcher = self._grammars.find(outputs)
        if seq.matcher is None:
            self._compiling[seq.id] = (seq, self._compiler.submit(self._compile, seq))
            return False
        seq.masks = seq.matcher.masks()
        return True

    def cancel(self, id: str) -> bool:
        """Forget a sequence, and return whether its grammar was being compiled."""
        seq, job = self._compiling.pop(id, (None, None))
        return seq is not None and job is not None and (job.cancel() or True)

    def compiled(self) -> list[tuple[Sequence, str | None]]:
        """Return the sequences whose grammars have been compiled since the last call.

        The second entry is the reason why a sequence cannot be served, or None.
        """
        done = []
        for seq, job in [entry for entry in self._compiling.values() if entry[1].done()]:
            del self._compiling[seq.id]
            error = job.exception()
            if error is None:
                seq.matcher = job.result()
            done.append((seq, None if error is None else _reason(error)))
        return done

    def follow(self, seqs: list[Sequence], num_running: int) -> None:
        """Begin to compute the masks of sequences that have new tokens. Until then, they are not ready.

        Args:
            num_running: number of running sequences; if there are many, a step has no rows for draft tokens.
        """
        quick, slow = list[Callable[[], None]](), list[Callable[[], None]]()
        for seq in seqs:
            assert seq.matcher is not None
            seq.ready = False
            (slow if seq.matcher.is_slow else quick).append(partial(self._look_ahead, seq, FREE_ROWS - num_running))
        self._unawaited = self._quick.submit(quick)
        self._batches += self._unawaited + self._slow.submit(slow)

    def settle(self, step_seconds: float) -> list[Sequence]:
        """Return the sequences whose masks cannot be computed, and which have not been aborted.

        Waits for the latest masks of quick grammars, which are ready soon.

        Args:
            step_seconds: the time that the step before took.
        """
        if self._unawaited:
            wait(self._unawaited, max(QUICK_SECONDS, QUICK_SHARE * step_seconds))
            self._unawaited = []
        self._batches = [batch for batch in self._batches if not batch.done()]
        failed = [self._failed.popleft() for _ in range(len(self._failed))]
        return [seq for seq in failed if not seq.aborted]

    def wait(self, timeout: float) -> None:
        """Wait until a grammar is compiled or masks are computed, for at most `timeout` seconds.

        Returns at once if there is nothing to wait for.
        """
        jobs: list[Future[Any]] = [*self._batches, *(job for _, job in self._compiling.values())]
        wait(jobs, timeout, FIRST_COMPLETED)

    @property
    def is_compiling(self) -> bool:
        """Return whether grammars are being compiled, or `compiled` has sequences to return."""
        return bool(self._compiling)

    def close(self) -> None:
        """End the threads."""
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._quick.close()
        self._slow.close()

    def _compile(self, seq: Sequence) -> "Matcher":
        if self._grammars is None:
            self._grammars = self._load()
        outputs = seq.params.structured_outputs
        assert outputs is not None
        matcher = self._grammars.matcher(outputs, seq.request.output)
        seq.masks = matcher.masks()
        return matcher

    def _look_ahead(self, seq: Sequence, most_drafts: int) -> None:
        """Compute the masks of a sequence's next token and of those after its draft tokens; the sequence is then ready.

        Args:
            most_drafts: maximum number of draft tokens.
        """
        matcher = seq.matcher
        if matcher is None or seq.aborted:
            return
        try:
            limit = min(most_drafts, seq.num_draft_tokens, seq.max_tokens - len(seq.tokens) - 1)
            draft = propose_draft(seq.tokens, limit) if limit > 0 else array("i")
            ends = next((i for i, token in enumerate(draft) if token in seq.stop_tokens), len(draft))
            seq.draft = draft[: matcher.count_allowed(draft[:ends])] if draft else draft
            seq.masks = matcher.masks(seq.draft)
            seq.ready = True
        except BaseException as error:  # a panic of llguidance is not an Exception
            seq.grammar_error = _reason(error)
            self._failed.append(seq)


class Lane:
    """Threads that run short jobs in batches: a future for each mask would cost as much as the mask.

    Args:
        name: the beginning of the threads' names.
        threads: number of threads; they start with the first batch.
        niceness: niceness of the threads, relative to the calling thread.
    """

    def __init__(self, name: str, threads: int, niceness: int = 0):
        self._pool = ThreadPoolExecutor(threads, name, _add_niceness, (niceness,))
        self._threads = threads
        self._jobs: deque[Callable[[], None]] = deque()

    def submit(self, jobs: list[Callable[[], None]]) -> list[Future[None]]:
        """Begin to run jobs, which must not raise. Return futures of which all are done when all jobs are."""
        self._jobs.extend(jobs)
        return [self._pool.submit(self._run) for _ in range(min(self._threads, len(jobs)))]

    def close(self) -> None:
        """End the threads after their current jobs."""
        self._jobs.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while self._jobs:
            try:
                job = self._jobs.popleft()
            except IndexError:  # another thread took the last one
                return
            job()


def masks_of(plan: "StepPlan") -> list[bytes] | None:
    """Return the masks of all rows to be sampled, empty for those without a grammar; None if no row has one."""
    if all(seq.matcher is None for seq in plan.sequences):
        return None
    masks: list[bytes] = []
    for i, seq in enumerate(plan.sequences):
        masks += [b""] * seq.num_scored(plan.chunks[i])
        if plan.samples(i):
            rows = 1 + len(plan.drafts.get(i, ()))
            masks += [b""] * rows if seq.matcher is None else seq.masks[:rows]
    return masks


def _reason(error: BaseException) -> str:
    return str(error) or repr(error)


def _add_niceness(niceness: int) -> None:
    if niceness:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)
