"""KVStates: make, pin, save and load the KV states of a frontend's requests, in whichever engines have their pages."""

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import EngineDead, InvalidRequest
from octavo.states import KVState, StateBook
from octavo.states.file import page_cipher, read_saved_tokens
from octavo.states.handle import StateOwner

from .calls import Calls
from .ledger import Ledger
from .links.messages import LoadState, Pin, SaveState, Unpin
from .live import LiveRequest
from .placement import Placement
from .replica import Replica
from .requests import Request, check_length

FILE_PATIENCE = 5.0  # seconds for a new engine to open the files of KV states


class KVStates:
    """The KV states of one model.

    Args:
        placement: its replicas.
        calls: the calls to them.
        living: returns the live requests; raises EngineDead if no request can be served any more.
        status: returns the state of the replicas as text, for errors.
        owner: the object that the methods of KV states call; by default this one.
        kv_key: the key of saved KV states; None if they are not encrypted.

    Attributes:
        book: the states by handle; set by `begin`.
    """

    book: StateBook

    def __init__(
        self,
        placement: Placement,
        calls: Calls,
        living: Callable[[], Ledger],
        status: Callable[[], str],
        owner: StateOwner | None,
        kv_key: str | None,
    ):
        self._placement, self._calls, self._living, self._status = placement, calls, living, status
        self._owner, self._cipher = owner or self, page_cipher(kv_key)

    def begin(self, config: EngineConfig) -> None:
        """Open the book, when the first engine is ready and `placement.info` is known."""
        fingerprint = self._placement.info.fingerprint
        self.book = StateBook(self, self._owner, fingerprint, config.kv_state_quota, config.kv_state_ttl)

    def remember(self, live: LiveRequest) -> None:
        """Remember a request that has finished, so that `keep` can make a state of it."""
        request = live.completions[0].request
        outputs = [completion.token_ids for completion in live.completions]
        self.book.remember(live.id, request.tenant, request.salt, live.prompt_token_ids, outputs, live.state)

    def continued(self, request: Request, tokens: list[int]) -> list[int]:
        """Return the whole prompt of a request: the tokens of the state that it continues, if any, and `tokens`."""
        if request.state is None:
            return tokens
        if request.params.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs does not go with kv_cache_state", "prompt_logprobs")
        whole = self.book.use(request.state, request.terms.tenant, request.terms.cache_salt or "") + tokens
        check_length(len(whole), self._placement.info)
        return whole

    def keep(self, request_id: str, index: int) -> KVState:
        """Make a state of a finished request. Raises InvalidRequest, QuotaExceeded, EngineDead."""
        if request_id in self._living():
            raise InvalidRequest(f"the request {request_id!r} still runs; it has a state after its end", "request_id")
        return self.book.keep(request_id, index)

    async def load(self, path: Path, tenant: str, salt: str) -> KVState:
        """Make a state of a saved file. Raises InvalidKVState, QuotaExceeded, EngineDead."""
        self._living()
        info = self._placement.info
        tokens = await asyncio.to_thread(
            read_saved_tokens, path, info.fingerprint, info.vocab_size, tenant, salt, self._cipher
        )
        state = self.book.adopt(path, tokens, tenant, salt)
        try:
            await self._open_in_all(state)
        except BaseException:
            state.drop()
            raise
        return state

    async def _open_in_all(self, state: KVState) -> None:
        """Make all ready engines open a state's file. Raises the error of one if none of them can, EngineDead."""
        message = LoadState(state.id, str(state.file))
        opening = (self._calls.run(replica, message) for replica in self._ready())
        results = await asyncio.gather(*opening, return_exceptions=True)
        if None not in results:
            raise next(iter(results), None) or EngineDead(self._status())

    async def open_files(self, replica: Replica) -> None:
        """Open the files of loaded states in a new engine, before it gets requests that would recompute their pages."""
        if not (loaded := self.book.loaded()):
            return
        jobs = [
            asyncio.ensure_future(self._calls.run(replica, LoadState(state.id, str(state.file)))) for state in loaded
        ]
        opened, ended = asyncio.ensure_future(asyncio.wait(jobs)), asyncio.ensure_future(replica.ended.wait())
        try:
            await asyncio.wait((opened, ended), timeout=FILE_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            for state, job in zip(loaded, jobs, strict=True):
                if job.done():
                    job.exception()  # marked as retrieved: if a file is gone, its tokens are recomputed
                elif replica.is_ready:
                    state.file = None  # the file may make engines fail or hang, so the next engine does not open it
        finally:
            for task in (opened, ended, *jobs):
                task.cancel()

    async def save_state(self, state: KVState, path: Path) -> None:
        """Write a state to a file. Raises InvalidKVState, RequestFailed, EngineDead."""
        self._living()
        tokens = self.book.use(state, state.tenant, state.salt)
        job = f"save-{uuid.uuid4().hex}"
        message = SaveState(job, str(path.absolute()), tokens, state.tenant, state.salt, state.origin)
        while True:
            replica = self._holder(state)
            try:
                return await self._calls.run(replica, message)
            except EngineDead:
                if replica.is_ready or not self._ready():
                    raise

    def drop_state(self, state: KVState) -> None:
        self.book.drop(state)

    def pin_state(self, state: KVState) -> None:
        if self._ready():
            message = Pin(state.id, state.token_ids, state.tenant, state.salt, state.origin)
            self._holder(state).send(message)

    def unpin_state(self, state: KVState) -> None:
        for replica in self._placement.replicas:
            replica.send(Unpin(state.id))

    def _ready(self) -> list[Replica]:
        return [replica for replica in self._placement.replicas if replica.is_ready]

    def _holder(self, state: KVState) -> Replica:
        """Return the ready replica that has most pages of a state. Raises EngineDead if there is none."""
        if not (ready := self._ready()):
            raise EngineDead(self._status())
        return self._placement.holder(ready, state.token_ids, state.tenant, state.salt, state.origin)
