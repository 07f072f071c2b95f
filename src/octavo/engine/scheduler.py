"""Scheduler: plans each step as a list of (sequence, number of new tokens), without prefill and decode phases."""

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.kv import KVCache
from octavo.tracing.request_events import ADMITTED, PREEMPTED, RequestEvents

from .policies import Policy
from .policies.guard import PolicyGuard
from .recovery import Recovery
from .sequence import Sequence
from .speculation import FREE_ROWS, propose_draft

MAX_FETCHING = 16  # sequences whose pages are being fetched, or have been while they wait for a slot
SHORT_CHUNK = 2  # pages


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The sequences and tokens that one step computes.

    Attributes:
        sequences: the sequences of the step; the first `num_decoding` have one token to compute each.
        chunks: the number of tokens to compute of each sequence, beginning at its num_computed.
        drafts: the draft tokens to compute after them; none if the chunk does not complete the sequence.
    """

    sequences: list[Sequence]
    chunks: list[int]
    num_decoding: int = 0
    drafts: dict[int, "array[int]"] = field(default_factory=dict)

    def completes(self, i: int) -> bool:
        """Return whether all tokens of sequence i will be computed, so that its next token can be sampled."""
        return i < self.num_decoding or self.chunks[i] == self.sequences[i].num_uncomputed

    def samples(self, i: int) -> bool:
        """Return whether the logits after the last token of sequence i are computed."""
        pooling = self.sequences[i].pooling
        return self.completes(i) and (pooling is None or not pooling.hidden)


class _MustNotPreempt(Exception):
    """The step cannot be planned without a preemption."""


class Scheduler:
    """Plans steps of at most `max_batch_tokens` tokens of at most `max_batch_size` sequences.

    Every running sequence gets a token in every step, unless it is not ready (`Sequence.ready`): then its last token is
    not computed. The remaining tokens go to prompts of running and waiting sequences, in the policy's order. If a
    sequence needs a page and none is available, the policy chooses a victim, which is preempted: it waits again and is
    recomputed later. No sequence is admitted in such a step. A sequence whose next token depends on a result that is
    awaited (`Sequence.awaited`) is left out of the step.

    The next few waiting sequences whose pages are in a lower tier leave the queue while their pages are fetched. They
    release the pages again if running sequences, or the first of the fetching ones, need them. docs/scheduling.md
    proves that every request is served in the end.

    Args:
        kv: allocates pages.
        policy: orders waiting sequences and chooses victims. If it fails, the request that caused it fails.
        recovery: decides between fetching and recomputing pages.
        on_failure: called with a failed sequence, after its removal, and the reason.
        events: takes what happens to the sequences that are traced.
    """

    def __init__(
        self,
        kv: KVCache,
        policy: Policy,
        recovery: Recovery,
        max_batch_size: int,
        max_batch_tokens: int,
        on_failure: Callable[[Sequence, str], None],
        events: RequestEvents | None = None,
    ):
        self.kv = kv
        self.recovery = recovery
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_batch_size, max_batch_tokens)  # so that each gets a token in every step
        self.running: dict[Sequence, None] = {}  # in order of admission
        self.preemptions = 0
        self._policy = PolicyGuard(policy, self._fail)
        self._on_failure = on_failure
        self._events = events or RequestEvents()
        self._fetching: list[Sequence] = []  # pages are being fetched, or have been; in queue order
        self._followers: dict[str, list[Sequence]] = {}  # by the id of the request whose prompt they wait for
        self._short_of_pages = False  # whether pages were too few to admit a sequence in the last step
        self._slots = list(range(self.max_running - 1, -1, -1))
        self._may_preempt = True  # in the step that is planned

    @property
    def policy(self) -> Policy:
        return self._policy.policy

    @property
    def num_waiting(self) -> int:
        """Return the number of sequences that wait for any reason."""
        return len(self._policy) + self.num_waiting_for_pages + self.num_waiting_for_prompt

    @property
    def num_waiting_for_pages(self) -> int:
        """Return the number of waiting sequences whose pages are being fetched from a lower tier, or have been."""
        return len(self._fetching)

    @property
    def num_waiting_for_prompt(self) -> int:
        """Return the number of sequences that wait for another completion's prompt."""
        return sum(map(len, list(self._followers.values())))

    @property
    def is_short_of_pages(self) -> bool:
        """Return whether the next waiting sequence was not admitted in the last step because it lacked pages."""
        return self._short_of_pages

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._policy or self._fetching or self._followers)

    def add(self, seq: Sequence, after: Sequence | None = None) -> None:
        """Queue a sequence. If the prompt of `after` is not computed yet, queue it only when it is."""
        if not self._policy.set_place(seq):
            return
        if after is not None and after.num_computed < after.num_prompt:
            self._followers.setdefault(after.id, []).append(seq)
        else:
            self._begin_to_wait(seq)

    def end_prompt(self, seq: Sequence) -> None:
        """Queue the sequences that waited for the prompt of `seq`, which is computed, or failed or was aborted."""
        for follower in self._followers.pop(seq.id, ()):
            self._begin_to_wait(follower)

    def finish(self, seq: Sequence) -> None:
        """Remove a running sequence."""
        self._stop(seq)
        self.end_prompt(seq)

    def abort(self, seq: Sequence) -> None:
        """Remove a sequence, running or waiting."""
        seq.aborted = True
        if seq.slot >= 0:
            self._stop(seq)
        if seq.prefetch:
            self._end_prefetch(seq)
        if seq in self._policy:
            self._policy.remove(seq)
        leader = seq.request.after or ""
        if seq in (followers := self._followers.get(leader, [])):
            followers.remove(seq)
            if not followers:
                del self._followers[leader]
        self.end_prompt(seq)

    def schedule(self, may_preempt: bool = True) -> StepPlan:
        """Plan the next step. Its sequences have pages for all tokens that it computes.

        Args:
            may_preempt: if False, and the step needs a preemption, the plan is empty. While results are awaited,
                it is not known which sequences end and release their pages, nor all tokens of a victim.
        """
        self._may_preempt = may_preempt
        try:
            self._preempt_for_waiting()
            decoding, prompts, preempted = self._continue_running()
        except _MustNotPreempt:
            return StepPlan([], [])
        if not self._policy.charge(decoding):
            decoding = [seq for seq in decoding if not seq.aborted]
        plan = StepPlan(decoding, [1] * len(decoding), len(decoding))
        self._plan_prompts(plan, prompts, may_admit=not preempted)
        if not preempted:  # after a preemption, pages that become free are for running sequences
            self._add_drafts(plan)
        return plan

    def _preempt_for_waiting(self) -> None:
        """If the next waiting sequence lacks a slot or pages, preempt the sequence that the policy chooses, if any."""
        waiting = self._next_waiting()
        if waiting and (self._short_of_pages or not self._slots) and len(self.running) > 1:
            victim = self._policy.preempt_for(waiting, self.running.keys())
            if victim and not self._may_preempt:
                raise _MustNotPreempt
            if victim:
                self._preempt(victim)

    def _continue_running(self) -> tuple[list[Sequence], list[Sequence], bool]:
        """Return the ready sequences with one token to compute, those with more, and whether pages ran short.

        Pooled sequences always count as those with more. Sequences are admitted with pages for all of their tokens, so
        only those with one token may need a page.
        """
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        need_page: list[Sequence] = []
        page_size = self.kv.page_size
        for seq in self.running:
            if seq.awaited:
                continue
            length = len(seq.tokens)
            if length - seq.num_computed > 1 or seq.pooling is not None:
                prompts.append(seq)
            elif seq.ready:
                decoding.append(seq)
                if length > len(seq.page_table.pages) * page_size:
                    need_page.append(seq)
        running = len(self.running)
        for seq in need_page:
            while seq.slot >= 0 and not self.kv.extend(seq.page_table, len(seq.tokens)):
                if self._give_up_fetching():
                    continue
                if not self._may_preempt:
                    raise _MustNotPreempt
                if victim := self._policy.victim(self.running.keys()):
                    self._preempt(victim)
        if len(self.running) == running:
            return decoding, prompts, False
        return [seq for seq in decoding if seq.slot >= 0], [seq for seq in prompts if seq.slot >= 0], True

    def _plan_prompts(self, plan: StepPlan, prompts: list[Sequence], may_admit: bool) -> None:
        """Distribute the step's remaining tokens among running `prompts` and waiting sequences."""
        self._policy.sort(prompts)
        spare = self.max_batch_tokens - len(self.running)  # one is reserved for each running sequence
        spare_samples = self.max_running - len(self.running)  # the same of rows whose logits are computed
        waiting = self._next_waiting() if may_admit and self._slots else None
        self._short_of_pages = False
        while prompts or (waiting and spare > 0 and spare_samples > 0):
            if waiting is None or spare <= 0 or spare_samples <= 0:
                seq = prompts.pop()
            elif prompts and (prompt_first := self._policy.goes_before(prompts[-1], waiting)) is not False:
                if prompt_first is None:  # one of the two failed
                    prompts = [seq for seq in prompts if not seq.aborted]
                    waiting = self._next_waiting()
                    continue
                seq = prompts.pop()
            elif self._admit(seq := waiting):
                spare -= 1
                spare_samples -= 1
                waiting = self._next_waiting() if self._slots else None
            else:
                self._short_of_pages = not seq.aborted
                waiting = self._next_waiting() if seq.aborted else None
                continue
            if self.kv.sharing is not None:
                self._adopt(seq)
            chunk = min(seq.num_uncomputed if seq.ready else seq.num_uncomputed - 1, 1 + spare)
            if seq.unscored is not None:
                chunk = min(chunk, 1 + spare_samples)
                spare_samples -= chunk - 1
            if self.kv.sharing is not None:
                chunk = self._shortened(seq, chunk)
                self._fetch_behind(seq, chunk)
            plan.sequences.append(seq)
            plan.chunks.append(chunk)
            spare -= chunk - 1

    def _admit(self, seq: Sequence) -> bool:
        """Admit a waiting sequence into a free slot. Return False if it lacks pages or failed."""
        # Reserve a page for each running sequence: otherwise this one would soon be preempted for them.
        allocated = self.kv.allocate(seq.prefix, len(self.running), max_cached=seq.max_cached)
        while allocated is None:
            if not seq.prefetch or not self._give_up_fetching(behind=seq):
                return False
            allocated = self.kv.allocate(seq.prefix, len(self.running), max_cached=seq.max_cached)
        seq.page_table, seq.num_computed = allocated
        if seq.prefetch:
            self._end_prefetch(seq, is_admitted=True)
        elif not self._policy.pop(seq):
            self.kv.release(seq.page_table)
            return False
        if not seq.num_outputs:
            seq.cached_tokens = seq.num_computed
        seq.admitted = True
        seq.slot = self._slots.pop()
        self.running[seq] = None
        if seq.request.is_traced:
            self._events.add(seq.id, ADMITTED, seq.num_computed)
        return True

    def _next_waiting(self) -> Sequence | None:
        """Return the sequence to be admitted next: the first whose pages have been fetched, or the policy's next."""
        for seq in self._fetching:
            if seq.prefetch and not seq.prefetch.pending:
                return seq
        if self.kv.has_tiers:
            self._fetch_ahead()
        first = self._policy.peek() if len(self._fetching) < MAX_FETCHING else None
        return None if first is not None and first.is_looked_up_now else first

    def _begin_to_wait(self, seq: Sequence) -> None:
        """Queue a sequence, and ask others for its pages if that may be faster than to compute them.

        It waits for the answer for reading.PATIENCE at most, so that no other sequence waits for longer behind it.
        """
        self._policy.add(seq)
        sharing = self.kv.sharing
        if sharing is None or seq.aborted or seq.max_cached is not None:
            return
        keys = self.kv.unknown_keys(seq.prefix)
        if not keys or not sharing.may_have(keys[0]):
            return
        if self.recovery.should_fetch(seq, sharing.seconds_per_page(len(keys))):
            seq.lookup = sharing.look_up(keys)

    def _fetch_ahead(self) -> None:
        """Begin to fetch the pages of the next waiting sequences from lower tiers, as far as pages are available."""
        while len(self._fetching) < MAX_FETCHING and (seq := self._policy.peek()):
            if seq.max_cached is not None or seq.is_looked_up_now:
                return
            per_page = self.kv.seconds_per_page
            from_tiers = per_page < math.inf and self.recovery.should_fetch(seq, per_page)
            from_store = self._should_fetch_shared(seq)
            if not from_tiers and not from_store:
                return
            seq.prefetch = self.kv.prefetch(
                seq.prefix,
                reserve=len(self.running),
                from_tiers=from_tiers,
                lookup=seq.lookup if from_store else None,
                seconds_to_compute=self.recovery.seconds_per_page,
            )
            if seq.prefetch is None:
                return
            self._fetching.append(seq)
            seq.num_computed = len(seq.prefetch.pages) * self.kv.page_size  # the value that the policy sees
            if self._policy.pop(seq):
                seq.admitted = True
            seq.num_computed = 0

    def _adopt(self, seq: Sequence) -> None:
        """Skip the tokens of a prompt whose pages have come from the shared store after all."""
        if seq.max_cached is not None:
            return
        before = seq.num_computed
        seq.page_table, seq.num_computed = self.kv.adopt(seq.page_table, before)
        if not seq.num_outputs:
            seq.cached_tokens += seq.num_computed - before

    def _shortened(self, seq: Sequence, chunk: int) -> int:
        """Return a shorter chunk if the shared store is late, so that what comes meanwhile is used sooner."""
        if not seq.awaits_pages or not seq.short_chunks:
            return chunk
        seq.short_chunks -= 1
        return min(chunk, SHORT_CHUNK * self.kv.page_size)

    def _fetch_behind(self, seq: Sequence, chunk: int) -> None:
        """Fetch pages behind the `chunk` tokens that are to be computed, if the shared store was late to have them."""
        if seq.max_cached is not None or (seq.lookup is None and seq.page_table.fetch is None):
            return
        lookup = seq.lookup if self._should_fetch_shared(seq) else None
        if lookup is not None:
            seq.lookup = None
        self.kv.fetch_behind(
            seq.page_table, seq.num_computed + chunk, lookup, len(self.running), self.recovery.seconds_per_page
        )

    def _should_fetch_shared(self, seq: Sequence) -> bool:
        """Return whether the shared store has pages of `seq`, and sends them faster than they are computed."""
        if self.kv.sharing is None or seq.lookup is None or not seq.lookup.found:
            return False
        return self.recovery.should_fetch(seq, self.kv.sharing.seconds_per_page(len(seq.lookup.found)))

    def _give_up_fetching(self, behind: Sequence | None = None) -> bool:
        """Put the last of the fetching sequences back into the queue, and release its pages.

        Returns False if there is none, or if it is `behind`.
        """
        if not self._fetching or self._fetching[-1] is behind:
            return False
        seq = self._fetching[-1]
        self._end_prefetch(seq)
        self._policy.add(seq)
        return True

    def _end_prefetch(self, seq: Sequence, is_admitted: bool = False) -> None:
        assert seq.prefetch is not None
        self.kv.end_prefetch(seq.prefetch, seq.page_table if is_admitted else None)
        seq.prefetch = seq.lookup = None
        self._fetching.remove(seq)

    def _add_drafts(self, plan: StepPlan) -> None:
        """Fill the free rows of the step with draft tokens."""
        free = min(FREE_ROWS, self.max_batch_tokens) - sum(plan.chunks)
        for i, seq in enumerate(plan.sequences):
            if free <= 0:
                return
            if not seq.num_draft_tokens or not plan.completes(i):
                continue
            limit = min(free, seq.num_draft_tokens, seq.max_tokens - len(seq.tokens) - 1)
            if limit <= 0:
                continue
            draft = propose_draft(seq.tokens, limit) if seq.matcher is None else seq.draft[:limit]
            if draft and self.kv.extend(seq.page_table, len(seq.tokens) + len(draft)):
                plan.drafts[i] = draft
                free -= len(draft)

    def _preempt(self, seq: Sequence) -> None:
        """Put a running sequence back into the queue, and release its pages."""
        self._stop(seq)
        seq.num_computed = 0
        self.preemptions += 1
        seq.preemptions += 1
        if seq.request.is_traced:
            self._events.add(seq.id, PREEMPTED)
        self._begin_to_wait(seq)

    def _stop(self, seq: Sequence) -> None:
        """Release the pages and the slot of a running sequence."""
        del self.running[seq]
        self.kv.release(seq.page_table, seq.num_computed if seq.ahead_from is None else seq.ahead_from)
        self._slots.append(seq.slot)
        seq.slot = -1

    def _fail(self, seq: Sequence, reason: str) -> None:
        self.abort(seq)
        self._on_failure(seq, reason)
