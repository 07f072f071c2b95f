"""Decides what each step computes. There are no phases: a step is a list of (sequence, number of new tokens)."""

import heapq
from array import array
from dataclasses import dataclass, field

from octavo.kv import KVCache

from .sequence import Sequence
from .speculation import FREE_ROWS, guess


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`chunks[i]`: how many tokens of `sequences[i]` this step computes, from its num_computed on.

    `guesses[i]`: tokens to compute after them, in case they come next; only for a sequence whose chunk ends it.
    """

    sequences: list[Sequence]
    chunks: list[int]
    guesses: dict[int, "array[int]"] = field(default_factory=dict)

    def ends(self, i: int) -> bool:
        """Whether sequence i will be computed to its end, so that its next token can be sampled."""
        return self.chunks[i] == self.sequences[i].num_uncomputed


class Scheduler:
    """First come, first served. Running sequences first, then waiting ones as far as tokens, pages and slots last.

    A sequence that needs a page when there is none takes it from the latest arrival, which goes back to its place in
    the queue and is recomputed later, to the same tokens. So the earliest sequence always advances, and since every
    request fits into the pool alone, everybody is served.
    """

    def __init__(self, kv: KVCache, max_batch_size: int, max_batch_tokens: int):
        self.kv = kv
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_batch_size, max_batch_tokens)  # so that a step has a token for each
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0
        self._waiting: list[tuple[int, Sequence]] = []  # heap; aborted ones are dropped when they surface
        self._num_waiting = 0
        self._held_back: dict[str, list[Sequence]] = {}  # by the id of the request they come after
        self._slots = list(range(self.max_running - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self._num_waiting > 0

    def add(self, seq: Sequence, after: Sequence | None = None) -> None:
        """Queue a sequence; behind the prompt of `after`, if that is yet to be computed."""
        self._num_waiting += 1
        if after is not None and after.num_computed < after.num_prompt:
            self._held_back.setdefault(after.id, []).append(seq)
        else:
            heapq.heappush(self._waiting, (seq.order, seq))

    def let_go(self, seq: Sequence) -> None:
        """The prompt of `seq` is computed, or never will be: queue those that waited for it."""
        for follower in self._held_back.pop(seq.id, ()):
            if not follower.aborted:
                heapq.heappush(self._waiting, (follower.order, follower))

    def finish(self, seq: Sequence) -> None:
        """Take a running sequence out and free its pages and its slot."""
        self.running.remove(seq)
        self._vacate(seq)
        self.let_go(seq)

    def abort(self, seq: Sequence) -> None:
        """Take a sequence out, running or waiting."""
        seq.aborted = True
        if seq.slot >= 0:
            self.finish(seq)
        else:
            self._num_waiting -= 1
            self.let_go(seq)

    def schedule(self) -> StepPlan:
        plan = StepPlan([], [])
        preempted = self._continue_running(plan)
        if not preempted:  # pages are short: what is freed belongs to those that run
            self._admit_waiting(plan)
            self._guess(plan)
        return plan

    def _continue_running(self, plan: StepPlan) -> bool:
        """Plan all running sequences that get their pages. True if one had to be preempted for it."""
        budget = self.max_batch_tokens
        preempted = False
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            left_to_others = len(self.running) - i - 1
            chunk = min(seq.num_uncomputed, budget - left_to_others)
            while not self.kv.grow(seq.held, seq.num_computed + chunk):
                preempted = True
                if self._preempt_latest() is seq:
                    return True
            plan.sequences.append(seq)
            plan.chunks.append(chunk)
            budget -= chunk
            i += 1
        return preempted

    def _admit_waiting(self, plan: StepPlan) -> None:
        budget = self.max_batch_tokens - sum(plan.chunks)
        while self._waiting and budget > 0 and len(self.running) < self.max_running:
            seq = self._waiting[0][1]
            if seq.aborted:
                heapq.heappop(self._waiting)
                continue
            # A spare page for each that runs, or the newcomer would soon be preempted for them.
            admitted = self.kv.admit(seq.prefix, spare=len(self.running))
            if admitted is None:
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            seq.held, seq.num_computed = admitted
            if not seq.num_outputs:
                seq.cached_tokens = seq.num_computed
            seq.slot = self._slots.pop()
            self._insert_running(seq)
            chunk = min(seq.num_uncomputed, budget)
            plan.sequences.append(seq)
            plan.chunks.append(chunk)
            budget -= chunk

    def _guess(self, plan: StepPlan) -> None:
        """Fill what the step has of free rows with guesses, for decoding sequences that are to have them."""
        free = min(FREE_ROWS, self.max_batch_tokens) - sum(plan.chunks)
        for i, seq in enumerate(plan.sequences):
            if free <= 0:
                return
            if not seq.num_guesses or not plan.ends(i):
                continue
            room = min(free, seq.num_guesses, seq.max_tokens - len(seq.tokens) - 1)
            guesses = guess(seq.tokens, room) if room > 0 else None
            if guesses and self.kv.grow(seq.held, len(seq.tokens) + len(guesses)):
                plan.guesses[i] = guesses
                free -= len(guesses)

    def _insert_running(self, seq: Sequence) -> None:
        """Keep order of arrival: a preempted sequence returns to its place."""
        i = len(self.running)
        while i and self.running[i - 1].order > seq.order:
            i -= 1
        self.running.insert(i, seq)

    def _preempt_latest(self) -> Sequence:
        seq = self.running.pop()
        self._vacate(seq)
        self.preemptions += 1
        self._num_waiting += 1
        heapq.heappush(self._waiting, (seq.order, seq))
        return seq

    def _vacate(self, seq: Sequence) -> None:
        self.kv.release(seq.held, seq.num_computed)
        seq.num_computed = 0
        self._slots.append(seq.slot)
        seq.slot = -1
