"""Placement: send each live request to a replica, move it to another one, or let it wait until one is open."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import tee

from octavo.engine.messages import EngineInfo, PageSource
from octavo.kv import page_keys, root_key

from .links.messages import Abort
from .live import LiveRequest
from .replica import Replica
from .router import Router


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
        candidates = [replica for replica in self.replicas if replica.is_open]
        if not candidates:
            live.replica = None
            self.waiting[live] = None
            return
        live.tokens_to_compute, live.source, best, cached = live.num_sequence_tokens, None, 0, 0
        if len(self.replicas) > 1:
            request = live.unfinished[0].request
            tokens = live.prompt_token_ids + live.unfinished[0].token_ids
            # Keys are computed as they are needed, and once for both looks at them.
            keys, again = tee(self._keys(tokens, request.tenant, request.salt, request.origin))
            if len(candidates) > 1:
                loads = [replica.load for replica in candidates]
                best, cached = self.router.choose(loads, len(tokens), keys, self.info.page_size)
                live.tokens_to_compute -= cached
            live.source = self._source(candidates[best], len(tokens), again, cached, computed_by)
        candidates[best].readmission.add(live)

    def move(self, live: LiveRequest) -> None:
        """Send a request that a replica has to another one, if one is open."""
        computed_by = live.replica if live.progress else None
        self.take_back(live)
        self.place(live, computed_by)

    def _source(
        self, target: Replica, length: int, keys: Iterator[bytes], cached: int, computed_by: Replica | None
    ) -> PageSource | None:
        """Return the engine that has most pages of a sequence; None if the target has as many.

        Args:
            length: tokens of the sequence.
            cached: those of them whose pages the target has.
        """
        page_size = self.info.page_size
        if computed_by is not None and computed_by.load.address:  # its last pages are not published yet
            return PageSource(computed_by.load.address, (length - 1) // page_size)
        others = [each.load for each in self.replicas if each is not target and each.load.address]
        if not others:
            return None
        pages = self.router.cached_pages(others, length, keys, page_size)
        most = max(pages)
        return PageSource(others[pages.index(most)].address, most) if most * page_size > cached else None

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
        busiest = max(self.replicas, key=lambda other: other.load.queued_tokens).load
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

    def _keys(self, tokens: list[int], tenant: str, salt: str, origin: str) -> Iterator[bytes]:
        return page_keys(root_key(self.info.fingerprint, tenant, salt, origin), tokens, self.info.page_size)
