"""Placement: send each live request to a replica, move it to another one, or let it wait until one is open."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from octavo.config import ROLES
from octavo.engine.messages import EngineInfo, PageSource
from octavo.kv import page_keys, root_key

from .links.messages import Abort
from .live import LiveRequest
from .replica import Replica
from .router import Load, Router

PREFILL, DECODE, _ = ROLES
SECONDS_TO_MOVE = 0.02  # that a move takes besides its pages


class Placement:
    """The replicas of a model, and the requests for which none is open.

    Args:
        max_batch_tokens: maximum number of tokens that an engine computes in a step.

    Attributes:
        replicas: those that serve or are loading.
        info: properties of their engines; set before the first request.
        waiting: requests that wait for an open replica, the first to be sent first.
    """

    info: EngineInfo

    def __init__(self, max_batch_tokens: int):
        self.replicas: list[Replica] = []
        self.router = Router()
        self.waiting: OrderedDict[LiveRequest, None] = OrderedDict()
        self._max_batch_tokens = max_batch_tokens

    @property
    def has_open_replica(self) -> bool:
        return any(replica.is_open for replica in self.replicas)

    def place(self, live: LiveRequest, computed_by: Replica | None = None) -> None:
        """Send a request to the best open replica. Without an open one, it waits.

        Args:
            computed_by: the replica that has just computed all of its tokens.
        """
        candidates = self._candidates(live, computed_by)
        if not candidates:
            live.replica = None
            self.waiting[live] = None
            return
        loads, best, pages = [replica.load for replica in candidates], 0, [0]
        length, page_size = live.num_sequence_tokens, self.info.page_size
        live.tokens_to_compute, live.source = length, None
        if len(candidates) > 1:
            best, pages = self.router.choose(loads, length, self._keys_of(live), page_size)
            live.tokens_to_compute -= pages[best] * page_size
        if computed_by is not None:  # its last pages are not published yet
            live.source = _source([computed_by.load], [(length - 1) // page_size], pages[best])
        elif len(self.replicas) > 1:
            if others := self._others(candidates):
                pages += self.router.cached_pages(others, length, self._keys_of(live), page_size)
            live.source = _source(loads + others, pages, pages[best])
        candidates[best].readmission.add(live)

    def move(self, live: LiveRequest) -> None:
        """Send a request that a replica has to another one, if one is open."""
        computed_by = live.replica if live.progress else None
        self.take_back(live)
        self.place(live, computed_by)

    def hand_over(self, live: LiveRequest) -> None:
        """Move a request away from a replica for prompts if all completions have begun, and another one is open."""
        replica = live.replica
        if replica is None or not live.sent or replica.readmission.is_on_trial(live):
            return
        if not all(completion.token_ids for completion in live.unfinished):
            return
        if any(other.is_open and not is_for_prompts(other) for other in self.replicas):
            self.move(live)

    def _candidates(self, live: LiveRequest, computed_by: Replica | None) -> list[Replica]:
        """Return the open replicas that may get a request.

        As long as one of role prefill and another one are open, a prompt goes to the former, or to one that does both,
        if that pays; what is computed goes on elsewhere. Otherwise, roles do not count.
        """
        candidates = [replica for replica in self.replicas if replica.is_open]
        decoding = [replica for replica in candidates if not is_for_prompts(replica)]
        if not decoding or len(decoding) == len(candidates):
            return candidates
        if computed_by is None and self._pays(live, candidates, decoding):
            return [replica for replica in candidates if replica.load.role != DECODE]
        return decoding

    def _others(self, candidates: Sequence[Replica]) -> list[Load]:
        """Return the loads of the replicas that serve pages and are not among `candidates`."""
        if len(candidates) == len(self.replicas):
            return []
        known = {replica.load.bit for replica in candidates}
        return [other.load for other in self.replicas if other.load.address and other.load.bit not in known]

    def _pays(self, live: LiveRequest, candidates: Sequence[Replica], decoding: Sequence[Replica]) -> bool:
        """Return whether to compute a prompt elsewhere and fetch its pages is cheaper than to compute it in `decoding`.

        The cost is the time that their steps lose. What they have cached is neither computed nor fetched. If no speed
        is known yet, moving pays for prompts of more than a page.
        """
        length, page_size = live.num_sequence_tokens, self.info.page_size
        loads = [replica.load for replica in decoding]
        left = length - max(self.router.cached_pages(loads, length, self._keys_of(live), page_size)) * page_size
        speeds = [replica.load.seconds_per_token for replica in candidates if replica.load.seconds_per_token]
        fetched = max(load.seconds_per_fetched_token for load in loads)
        return left > page_size if not speeds else left * min(speeds) > left * fetched + SECONDS_TO_MOVE

    def place_waiting(self) -> None:
        """Send the requests that wait, as long as a replica is open."""
        while self.waiting and self.has_open_replica:
            self.place(self.waiting.popitem(last=False)[0])

    def wait_first(self, lives: Sequence[LiveRequest]) -> None:
        """Queue requests, in this order, before all that wait for an open replica."""
        for live in reversed(lives):
            live.replica = None
            self.waiting[live] = None
            self.waiting.move_to_end(live, last=False)

    def place_interrupted(self, replica: Replica) -> bool:
        """Return whether requests that were interrupted can continue only here, since all replicas are being drained.

        Send these requests, if the replica is ready for them.
        """
        if not all(other.is_leaving for other in self.replicas):
            return False
        interrupted = [live for live in self.waiting if live.was_sent]
        if replica.readmission.is_open:
            for live in interrupted:
                del self.waiting[live]
                live.tokens_to_compute = live.num_sequence_tokens
                replica.readmission.add(live)
        return bool(interrupted)

    def take_back(self, live: LiveRequest) -> None:
        """Abort a request in its replica's engine, and forget its place."""
        replica, live.replica = live.replica, None
        if replica is None:
            self.waiting.pop(live, None)
            return
        if live.sent:
            unfinished = live.unfinished
            replica.send(Abort([completion.request.id for completion in unfinished]))
            replica.load.remove(live, len(unfinished))
        replica.readmission.ended(live)
        live.sent, live.progress = False, 0

    def relieve_others(self, replica: Replica) -> None:
        """Move a request here that another replica would begin later than in its next step, if that is sooner here."""
        if replica.load.unstarted or not replica.is_open:
            return
        role = replica.load.role
        alike = (other.load for other in self.replicas if other.load.role == role)
        busiest = max(alike, key=lambda load: load.queued_tokens)
        if len(busiest.unstarted) < 2:
            return
        live = next(reversed(busiest.unstarted))
        assert isinstance(live, LiveRequest)
        if live.replica is None or not live.replica.is_open:
            return
        ahead = self.router.work(busiest) - self.router.work(replica.load)
        if ahead > live.num_sequence_tokens + self._max_batch_tokens:
            self.take_back(live)
            live.tokens_to_compute = live.num_sequence_tokens
            replica.readmission.add(live)

    def holder(self, replicas: Sequence[Replica], tokens: list[int], tenant: str, salt: str, origin: str) -> Replica:
        """Return the one of `replicas` whose engine has most pages of a sequence."""
        if len(replicas) == 1:
            return replicas[0]
        loads, keys = [replica.load for replica in replicas], self._keys(tokens, tenant, salt, origin)
        pages = self.router.cached_pages(loads, len(tokens), keys, self.info.page_size)
        return replicas[pages.index(max(pages))]

    def _keys_of(self, live: LiveRequest) -> Iterator[bytes]:
        """Return the keys of the pages with which an engine would continue the first unfinished completion."""
        completion = live.unfinished[0]
        request = completion.request
        tokens = live.prompt_token_ids + completion.token_ids
        return self._keys(tokens, request.tenant, request.salt, request.origin)

    def _keys(self, tokens: list[int], tenant: str, salt: str, origin: str) -> Iterator[bytes]:
        return page_keys(root_key(self.info.fingerprint, tenant, salt, origin), tokens, self.info.page_size)


def is_for_prompts(replica: Replica) -> bool:
    """Return whether requests leave a replica after their first token. Its pages must be there for others."""
    return replica.load.role == PREFILL and bool(replica.load.address)


def _source(loads: Sequence[Load], pages: Sequence[int], enough: int) -> PageSource | None:
    """Return the engine that serves most pages of a sequence to others; None if it has no more than `enough`.

    Args:
        pages: how many each of `loads` has.
    """
    if max(pages) <= enough:
        return None
    served = [(count, load.address) for load, count in zip(loads, pages, strict=True) if load.address]
    most, address = max(served, default=(0, ""))
    return PageSource(address, most) if most > enough else None
