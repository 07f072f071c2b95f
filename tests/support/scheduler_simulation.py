"""A scheduler with its policy and KV cache over a memory that remembers what was written: an engine without a model."""

from array import array
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.loading import load_policy
from octavo.engine.messages import EngineRequest
from octavo.engine.recovery import Recovery
from octavo.engine.scheduler import Scheduler, StepPlan
from octavo.engine.sequence import Sequence
from octavo.kv import KVCache, Prefix, root_key
from octavo.params import SamplingParams

PAGE = 4


class Simulation:
    """Does what an engine does, with a device whose K/V of a token is the prefix that ends in it."""

    def __init__(
        self,
        num_pages: int,
        max_batch_size: int,
        max_batch_tokens: int,
        prefix_caching: bool = True,
        policy: str = "fcfs",
        mask_steps: int = 0,
        **settings: Any,
    ):
        """`mask_steps`: most steps for which a sequence is not ready after a new token."""
        self.kv = KVCache(num_pages, PAGE, prefix_caching, self.copy_page)
        self.policy = load_policy(EngineConfig(scheduling_policy=policy, **settings))
        self.scheduler = Scheduler(
            self.kv, self.policy, Recovery("auto", PAGE), max_batch_size, max_batch_tokens, self.fail
        )
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.memory: list[list[tuple[int, ...] | None]] = [[None] * PAGE for _ in range(num_pages)]
        self.live: dict[str, Sequence] = {}
        self.finished: dict[str, list[int]] = {}
        self.mask_steps = mask_steps
        self.unready: dict[Sequence, int] = {}  # steps that are left
        self.arrivals = 0
        self.now = 0.0  # a step takes a second

    def add(self, prompt: list[int], max_tokens: int, after: str | None = None, **terms: Any) -> str:
        """`terms`: tenant, priority, ttft_target."""
        params = SamplingParams(max_tokens=max_tokens)
        request = EngineRequest(str(self.arrivals), prompt, params, after=after, **terms)
        tokens = array("i", prompt)
        prefix = Prefix(root_key("", "", ""), tokens, PAGE)
        seq = Sequence(request, self.arrivals, frozenset(), tokens, prefix, len(prompt), len(prompt) + max_tokens)
        seq.arrival = self.now
        self.arrivals += 1
        self.live[seq.id] = seq
        self.scheduler.add(seq, after=self.live.get(after or ""))
        return seq.id

    def copy_page(self, source: int, target: int) -> None:
        self.memory[target] = list(self.memory[source])

    def fail(self, seq: Sequence, reason: str) -> None:
        raise AssertionError(reason)

    def abort(self, id: str) -> None:
        self.scheduler.abort(self.live.pop(id))

    def step(self) -> StepPlan:
        self.now += 1
        self.compute_masks()
        plan = self.scheduler.schedule()
        self.check(plan)
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):  # every row writes, then every row reads
            for position in range(seq.num_computed, seq.num_computed + chunk):
                page = seq.page_table.pages[position // PAGE]
                self.memory[page][position % PAGE] = tuple(seq.tokens[: position + 1])
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):
            for position in range(seq.num_computed + chunk):
                seen = self.memory[seq.page_table.pages[position // PAGE]][position % PAGE]
                assert seen == tuple(seq.tokens[: position + 1]), "a sequence reads K and V that are not its own"
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):
            sampled = chunk == seq.num_uncomputed
            if seq.num_computed < seq.num_prompt <= seq.num_computed + chunk:
                self.scheduler.end_prompt(seq)
            seq.num_computed += chunk
            self.kv.commit(seq.page_table, seq.num_computed)
            if sampled:
                seq.tokens.append(sum(seq.tokens) % 3)  # a model whose next token depends on all before it
                self.unready[seq] = (seq.order + len(seq.tokens)) % (self.mask_steps + 1)
                seq.ready = not self.unready[seq]
                if len(seq.tokens) == seq.max_tokens:
                    self.scheduler.finish(seq)
                    self.finished[seq.id] = list(self.live.pop(seq.id).tokens)
        return plan

    def compute_masks(self) -> None:
        for seq in [seq for seq, steps in self.unready.items() if steps == 0]:
            del self.unready[seq]
            seq.ready = True
        for seq in self.unready:
            self.unready[seq] -= 1

    def check(self, plan: StepPlan) -> None:
        assert sum(plan.chunks) <= self.max_batch_tokens
        assert all(chunk >= 1 for chunk in plan.chunks)
        assert len(plan.sequences) <= self.max_batch_size
        assert len({seq.id for seq in plan.sequences}) == len(plan.sequences)
        assert len({seq.slot for seq in plan.sequences}) == len(plan.sequences)
        assert all(not seq.aborted for seq in plan.sequences)
        assert all(seq.ready or not plan.completes(i) for i, seq in enumerate(plan.sequences))
        decoding = plan.sequences[: plan.num_decoding]
        assert all(seq.num_uncomputed == chunk == 1 for seq, chunk in zip(decoding, plan.chunks, strict=False))

    def assert_empty(self) -> None:
        assert self.kv.pool.num_available == self.kv.pool.num_pages, "pages leaked"
        assert not self.scheduler.running and self.scheduler.num_waiting == 0 and not self.scheduler.has_work
