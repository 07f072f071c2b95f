"""Decides what each step computes. There are no phases: a step is a list of (sequence, number of new tokens)."""

import math
from array import array
from dataclasses import dataclass, field

from octavo.kv import KVCache

from .policies import Policy
from .recovery import Recovery
from .sequence import Sequence
from .speculation import FREE_ROWS, propose_draft

AHEAD = 16  # sequences that may wait for their pages to be fetched, or for a slot when they are there


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`chunks[i]`: how many tokens of `sequences[i]` this step computes, from its num_computed on.

    The first `num_decoding` sequences have one token to compute, and so end with this step's chunk of 1.
    `drafts[i]`: tokens to compute after them, in case they come next; only for a sequence whose chunk ends it.
    """

    sequences: list[Sequence]
    chunks: list[int]
    num_decoding: int = 0
    drafts: dict[int, "array[int]"] = field(default_factory=dict)

    def ends(self, i: int) -> bool:
        """Whether sequence i will be computed to its end, so that its next token can be sampled."""
        return i < self.num_decoding or self.chunks[i] == self.sequences[i].num_uncomputed


class Scheduler:
    """Running sequences first, then waiting ones as far as tokens, pages and slots last, in the policy's order.

    Each running sequence is sure of a token in every step. What is left of the step's tokens goes to prompts, those of
    running and of waiting sequences alike, in the policy's order.

    A sequence that needs a page when there is none takes it from the policy's victim, which waits again and is
    recomputed later, to the same tokens. Nobody is admitted in a step that had to do this. The policy sees to it that
    some sequence always advances to its end (see Policy), and since every request fits into the pool alone,
    everybody is served.

    Those next in the queue of which a lower tier has pages leave it to wait for these, while others go on; they give
    the pages up again if those that run, or the first of them, need the room.
    """

    def __init__(self, kv: KVCache, policy: Policy, recovery: Recovery, max_batch_size: int, max_batch_tokens: int):
        self.kv = kv
        self.policy = policy
        self.recovery = recovery
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_batch_size, max_batch_tokens)  # so that a step has a token for each
        self.running: dict[Sequence, None] = {}  # insertion order is order of admission
        self.preemptions = 0
        self._num_waiting = 0
        self._arriving: list[Sequence] = []  # their pages are on the way, or there; in the order of the queue
        self._blocked = False  # in the last step somebody waited for pages
        self._held_back: dict[str, list[Sequence]] = {}  # by the id of the request they come after
        self._slots = list(range(self.max_running - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_arriving(self) -> int:
        """Of those that wait: whose pages are on the way from a lower tier, or there already."""
        return len(self._arriving)

    @property
    def num_held_back(self) -> int:
        """Of those that wait: who waits for the prompt of another."""
        return sum(map(len, list(self._held_back.values())))

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self._num_waiting > 0

    def add(self, seq: Sequence, after: Sequence | None = None) -> None:
        """Queue a sequence; behind the prompt of `after`, if that is yet to be computed.

        Raises what the policy raises, and nothing is queued then.
        """
        rank = self.policy.rank(seq.request)
        if not math.isfinite(rank):
            raise ValueError(f"the rank must be a number of seconds, not {rank}")
        seq.place = (rank, seq.order)
        if after is not None and after.num_computed < after.num_prompt:
            self._held_back.setdefault(after.id, []).append(seq)
        else:
            self.policy.add(seq)
        self._num_waiting += 1

    def end_prompt(self, seq: Sequence) -> None:
        """The prompt of `seq` is computed, or never will be: queue those that waited for it."""
        for follower in self._held_back.pop(seq.id, ()):
            self.policy.add(follower)

    def finish(self, seq: Sequence) -> None:
        """Take a running sequence out and free its pages and its slot."""
        self._vacate(seq)
        self.end_prompt(seq)

    def abort(self, seq: Sequence) -> None:
        """Take a sequence out, running or waiting."""
        seq.aborted = True
        if seq.slot >= 0:
            self._vacate(seq)
        else:
            self._num_waiting -= 1
            held_back = self._held_back.get(seq.request.after or "", [])
            if seq in held_back:
                held_back.remove(seq)
            elif seq.prefetch:
                self._end_prefetch(seq)
            else:
                self.policy.remove(seq)
        self.end_prompt(seq)

    def schedule(self) -> StepPlan:
        self._make_way()
        decoding, prompts, preempted = self._continue_running()
        self.policy.charge(decoding)
        plan = StepPlan(decoding, [1] * len(decoding), len(decoding))
        self._plan_prompts(plan, prompts, may_admit=not preempted)
        if not preempted:  # pages are short: what is freed belongs to those that run
            self._add_drafts(plan)
        return plan

    def _make_way(self) -> None:
        """Preempt whom the policy names for the sake of the next that waits, if that lacks a slot or pages."""
        waiting = self._next_waiting()
        short = self._blocked or not self._slots
        if waiting and short and len(self.running) > 1 and (victim := self.policy.makes_way(waiting, self.running)):
            self._preempt(victim)

    def _continue_running(self) -> tuple[list[Sequence], list[Sequence], bool]:
        """Running sequences with one token to compute, those with more, and whether one had to be preempted for pages.

        A sequence has pages for all of its tokens since it was admitted, so only the former may need one.
        """
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        short: list[Sequence] = []
        page_size = self.kv.page_size
        for seq in self.running:
            length = len(seq.tokens)
            if length - seq.num_computed > 1:
                prompts.append(seq)
            else:
                decoding.append(seq)
                if length > len(seq.held.pages) * page_size:
                    short.append(seq)
        preemptions = self.preemptions
        for seq in short:
            while seq.slot >= 0 and not self.kv.grow(seq.held, len(seq.tokens)):
                if not self._give_up_fetching():
                    self._preempt(self.policy.victim(self.running))
        if self.preemptions == preemptions:
            return decoding, prompts, False
        return [seq for seq in decoding if seq.slot >= 0], [seq for seq in prompts if seq.slot >= 0], True

    def _plan_prompts(self, plan: StepPlan, prompts: list[Sequence], may_admit: bool) -> None:
        """Give what decoding leaves of the step's tokens to `prompts`, which run, and to waiting sequences."""
        key = self.policy.key
        prompts.sort(key=key, reverse=True)  # the last is the next
        spare = self.max_batch_tokens - len(self.running)  # each of them is sure of one
        waiting = self._next_waiting() if may_admit and self._slots else None
        self._blocked = False
        while prompts or (waiting and spare > 0):
            if waiting and spare > 0 and not (prompts and key(prompts[-1]) < key(waiting)):
                seq = waiting
                if not self._admit(seq):
                    self._blocked, waiting = True, None
                    continue
                spare -= 1
                waiting = self._next_waiting() if self._slots else None
            else:
                seq = prompts.pop()
            chunk = min(seq.num_uncomputed, 1 + spare)
            plan.sequences.append(seq)
            plan.chunks.append(chunk)
            spare -= chunk - 1

    def _admit(self, seq: Sequence) -> bool:
        """Let a waiting sequence run, if its pages are to be had. Needs a free slot."""
        # A spare page for each that runs, or the newcomer would soon be preempted for them.
        admitted = self.kv.admit(seq.prefix, spare=len(self.running))
        while admitted is None:
            if not seq.prefetch or not self._give_up_fetching(behind=seq):
                return False
            admitted = self.kv.admit(seq.prefix, spare=len(self.running))
        seq.held, seq.num_computed = admitted
        if not seq.num_outputs:
            seq.cached_tokens = seq.num_computed
        if seq.prefetch:
            self._end_prefetch(seq)
        else:
            self.policy.pop()
        self._num_waiting -= 1
        seq.admitted = True
        seq.slot = self._slots.pop()
        self.running[seq] = None
        return True

    def _next_waiting(self) -> Sequence | None:
        """Who is to be admitted next: the first whose pages have arrived, or whom the policy names."""
        for seq in self._arriving:
            if seq.prefetch and not seq.prefetch.pending:
                return seq
        self._fetch_ahead()
        return self.policy.peek() if len(self._arriving) < AHEAD else None

    def _fetch_ahead(self) -> None:
        """Begin to fetch what lower tiers have of the next in the queue, as far as pages for it are to be had."""
        while len(self._arriving) < AHEAD and (seq := self.policy.peek()):
            if not self.recovery.fetches(seq, self.kv.seconds_per_page):
                return
            seq.prefetch = self.kv.prefetch(seq.prefix, spare=len(self.running))
            if seq.prefetch is None:
                return
            seq.num_computed = len(seq.prefetch.pages) * self.kv.page_size  # as far as the policy is concerned
            self.policy.pop()
            seq.num_computed, seq.admitted = 0, True
            self._arriving.append(seq)

    def _give_up_fetching(self, behind: Sequence | None = None) -> bool:
        """Let the last of those whose pages arrive wait in the queue again, without them.

        False: there is none, or none `behind` a sequence that is one of them.
        """
        if not self._arriving or self._arriving[-1] is behind:
            return False
        seq = self._arriving[-1]
        self._end_prefetch(seq)
        self.policy.add(seq)
        return True

    def _end_prefetch(self, seq: Sequence) -> None:
        assert seq.prefetch is not None
        self.kv.end_prefetch(seq.prefetch)
        seq.prefetch = None
        self._arriving.remove(seq)

    def _add_drafts(self, plan: StepPlan) -> None:
        """Fill what the step has of free rows with guesses, for decoding sequences that are to have them."""
        free = min(FREE_ROWS, self.max_batch_tokens) - sum(plan.chunks)
        for i, seq in enumerate(plan.sequences):
            if free <= 0:
                return
            if not seq.num_draft_tokens or not plan.ends(i):
                continue
            room = min(free, seq.num_draft_tokens, seq.max_tokens - len(seq.tokens) - 1)
            guesses = propose_draft(seq.tokens, room) if room > 0 else None
            if guesses and self.kv.grow(seq.held, len(seq.tokens) + len(guesses)):
                plan.drafts[i] = guesses
                free -= len(guesses)

    def _preempt(self, seq: Sequence) -> None:
        """Take a running sequence's pages; it returns to its place in the queue."""
        self._vacate(seq)
        self.preemptions += 1
        self._num_waiting += 1
        self.policy.add(seq)

    def _vacate(self, seq: Sequence) -> None:
        del self.running[seq]
        self.kv.release(seq.held, seq.num_computed)
        seq.num_computed = 0
        self._slots.append(seq.slot)
        seq.slot = -1
