"""The page pool against a model of it that is too simple to be wrong."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.kv import PagePool

NUM_PAGES = 6
KEYS = st.sampled_from([bytes([k]) for k in range(8)])


class PoolAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.held: list[int] = []  # a page, once per holder
        self.content: dict[int, bytes] = {}  # what is findable
        self.last_use: list[int] = []  # unheld pages with content, least recently used first

    def available(self) -> int:
        return NUM_PAGES - len(set(self.held))

    @precondition(lambda self: self.available() > 0)
    @rule()
    def allocate(self) -> None:
        blank = self.available() - len(self.last_use)
        page = self.pool.allocate()
        assert page not in self.held, "a page was given to two owners"
        if blank:
            assert page not in self.last_use, "content was forgotten although a free page was there"
        else:
            assert page == self.last_use.pop(0), "it was not the least recently used page that was forgotten"
            del self.content[page]
        self.held.append(page)

    @rule(key=KEYS)
    def find_and_acquire(self, key: bytes) -> None:
        page = self.pool.find(key)
        assert page == next((p for p, k in self.content.items() if k == key), None)
        if page is not None:
            self.pool.acquire(page)
            self.held.append(page)
            if page in self.last_use:
                self.last_use.remove(page)

    @precondition(lambda self: any(page not in self.content for page in self.held))
    @rule(data=st.data(), key=KEYS)
    def publish(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from([page for page in self.held if page not in self.content]))
        self.pool.publish(page, key)
        if key not in self.content.values():
            self.content[page] = key

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.pool.release(page)
        self.held.remove(page)
        if page not in self.held and page in self.content:
            self.last_use.append(page)

    @invariant()
    def no_page_is_lost(self) -> None:
        assert self.pool.num_available == self.available()
        assert self.pool.num_cached == len(self.last_use)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
