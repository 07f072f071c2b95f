"""Random traffic through the scheduler and the KV cache, over a memory that remembers what was written where."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.messages import EngineRequest
from octavo.engine.scheduler import Scheduler, StepPlan
from octavo.engine.sequence import Sequence
from octavo.kv import KVCache, Prefix, root_key
from octavo.params import SamplingParams

PAGE = 4


class Simulation:
    """Does what an engine does, with a device whose K/V of a token is the prefix that ends in it."""

    def __init__(self, num_pages: int, max_batch_size: int, max_batch_tokens: int, prefix_caching: bool = True):
        self.kv = KVCache(num_pages, PAGE, prefix_caching, self.copy_page)
        self.scheduler = Scheduler(self.kv, max_batch_size, max_batch_tokens)
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.memory: list[list[tuple[int, ...] | None]] = [[None] * PAGE for _ in range(num_pages)]
        self.live: dict[str, Sequence] = {}
        self.finished: dict[str, list[int]] = {}
        self.arrivals = 0

    def add(self, prompt: list[int], max_tokens: int, after: str | None = None) -> str:
        request = EngineRequest(str(self.arrivals), prompt, SamplingParams(max_tokens=max_tokens), 0.0, after=after)
        tokens = array("i", prompt)
        prefix = Prefix(root_key("", "", ""), tokens, PAGE)
        seq = Sequence(request, self.arrivals, frozenset(), tokens, prefix, len(prompt), len(prompt) + max_tokens)
        self.arrivals += 1
        self.live[seq.id] = seq
        self.scheduler.add(seq, after=self.live.get(after or ""))
        return seq.id

    def copy_page(self, source: int, target: int) -> None:
        self.memory[target] = list(self.memory[source])

    def abort(self, id: str) -> None:
        self.scheduler.abort(self.live.pop(id))

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.check(plan)
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):  # every row writes, then every row reads
            for position in range(seq.num_computed, seq.num_computed + chunk):
                page = seq.held.pages[position // PAGE]
                self.memory[page][position % PAGE] = tuple(seq.tokens[: position + 1])
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):
            for position in range(seq.num_computed + chunk):
                seen = self.memory[seq.held.pages[position // PAGE]][position % PAGE]
                assert seen == tuple(seq.tokens[: position + 1]), "a sequence reads K and V that are not its own"
        for seq, chunk in zip(plan.sequences, plan.chunks, strict=True):
            sampled = chunk == seq.num_uncomputed
            if seq.num_computed < seq.num_prompt <= seq.num_computed + chunk:
                self.scheduler.let_go(seq)
            seq.num_computed += chunk
            self.kv.commit(seq.held, seq.num_computed)
            if sampled:
                seq.tokens.append(sum(seq.tokens) % 3)  # a model whose next token depends on all before it
                if len(seq.tokens) == seq.max_tokens:
                    self.scheduler.finish(seq)
                    self.finished[seq.id] = list(self.live.pop(seq.id).tokens)
        return plan

    def check(self, plan: StepPlan) -> None:
        assert sum(plan.chunks) <= self.max_batch_tokens
        assert all(chunk >= 1 for chunk in plan.chunks)
        assert len(plan.sequences) <= self.max_batch_size
        assert len({seq.id for seq in plan.sequences}) == len(plan.sequences)
        assert len({seq.slot for seq in plan.sequences}) == len(plan.sequences)
        assert all(not seq.aborted for seq in plan.sequences)

    def assert_empty(self) -> None:
        assert self.kv.pool.num_available == self.kv.pool.num_pages, "pages leaked"
        assert not self.scheduler.running and self.scheduler.num_waiting == 0 and not self.scheduler.has_work


PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=20)
EVENT = st.one_of(
    st.tuples(st.just("add"), PROMPT, st.integers(1, 12)),
    st.tuples(st.just("fork"), PROMPT, st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 100)),
    st.tuples(st.just("step"), st.integers(1, 5)),
)


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(EVENT, max_size=40),
    num_pages=st.integers(8, 24),  # the longest sequence needs 8
    max_batch_size=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 24),
    prefix_caching=st.booleans(),
)
def test_random_traffic(events, num_pages, max_batch_size, max_batch_tokens, prefix_caching):
    """No page is shared by accident or leaked, the budget is kept, and everybody is served."""
    sim = Simulation(num_pages, max_batch_size, max_batch_tokens, prefix_caching)
    expected: dict[str, list[int]] = {}

    def add(prompt, max_tokens, after=None):
        id = sim.add(prompt, max_tokens, after)
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(sum(tokens) % 3)
        expected[id] = tokens
        return id

    for event in events:
        if event[0] == "add":
            add(event[1], event[2])
        elif event[0] == "fork":
            leader = add(event[1], event[2])
            add(event[1], event[2] + 1, after=leader)
        elif event[0] == "abort" and sim.live:
            id = sorted(sim.live)[event[1] % len(sim.live)]
            sim.abort(id)
            del expected[id]
        elif event[0] == "step":
            for _ in range(event[1]):
                sim.step()
    patience = 40 + sum(len(tokens) for tokens in expected.values()) * 40
    while sim.live:
        sim.step()
        patience -= 1
        assert patience > 0, f"{len(sim.live)} sequences are never served"
    assert sim.finished == expected
    sim.assert_empty()


def test_prompts_are_cut_into_chunks_beside_decoding():
    sim = Simulation(num_pages=32, max_batch_size=4, max_batch_tokens=8)
    sim.add([0], 10)
    sim.step()
    sim.add([1] * 20, 1)
    assert [sim.step().chunks for _ in range(3)] == [[1, 7], [1, 7], [1, 6]]


def test_the_earliest_arrival_is_never_preempted():
    sim = Simulation(num_pages=8, max_batch_size=4, max_batch_tokens=32)
    first = sim.add([0] * 8, 20)
    for prompt in range(1, 4):
        sim.add([prompt] * 4, 24)
    while sim.live:
        before = sim.live.get(first) and len(sim.live[first].tokens)
        sim.step()
        if before and first in sim.live:
            assert len(sim.live[first].tokens) == before + 1
    assert sim.scheduler.preemptions > 0
    sim.assert_empty()


def test_a_fork_computes_its_prompt_once():
    sim = Simulation(num_pages=32, max_batch_size=8, max_batch_tokens=64)
    leader = sim.add([0, 1, 2] * 6, 3)
    for _ in range(3):
        sim.add([0, 1, 2] * 6, 3, after=leader)
    assert sim.step().chunks == [18]
    assert sim.step().chunks == [1, 2, 2, 2]  # four full pages of the leader's are found


def test_a_cached_prefix_survives_until_its_page_is_needed():
    sim = Simulation(num_pages=8, max_batch_size=1, max_batch_tokens=64)
    sim.add([0] * 13, 1)
    sim.step()
    sim.add([0] * 12 + [1], 1)
    assert sim.step().chunks == [1]
    sim.add([2] * 29, 1)  # takes every page
    sim.step()
    sim.add([0] * 13, 1)
    assert sim.step().chunks == [13]


def test_scheduling_does_not_slow_down_with_the_length_of_the_queue():
    """Counted in heap operations, not in seconds: a step looks at the head of the queue only."""
    sim = Simulation(num_pages=8, max_batch_size=2, max_batch_tokens=8)
    for _ in range(5000):
        sim.add([0, 1, 2], 4)
    looked_at = []

    class Watched(list):
        def __getitem__(self, index):
            looked_at.append(index)
            return super().__getitem__(index)

    sim.scheduler._waiting = Watched(sim.scheduler._waiting)
    sim.step()
    assert set(looked_at) <= {0, -1}


def test_a_long_prompt_leaves_a_token_for_each_later_arrival():
    sim = Simulation(num_pages=64, max_batch_size=8, max_batch_tokens=8, prefix_caching=False)
    leader = sim.add([0] * 20, 1)
    sim.add([0] * 20, 1, after=leader)  # enters the batch when the two below already run
    sim.add([1], 20)
    sim.add([2], 20)
    chunks = []
    while leader in sim.live or len(chunks) < 5:
        chunks.append(sim.step().chunks)
    assert chunks == [
        [8],
        [8],
        [
            4,
            1,
            1,
        ],
        [1, 1, 6],
        [6, 1, 1],
    ]
