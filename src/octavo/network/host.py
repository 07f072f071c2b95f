"""EngineHost: one engine process, and the frontends that use it over the network."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from octavo.engine.messages import EngineInfo, EngineRequest, TokenOutput
from octavo.frontend.links.link import Exit, Link
from octavo.frontend.links.messages import (
    Abort,
    AskPageStates,
    AskStats,
    CacheReset,
    Failed,
    FromEngine,
    Leaving,
    LoadState,
    Pages,
    PageStates,
    Pin,
    Ready,
    ResetCache,
    SaveState,
    StateDone,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    Unpin,
    WatchPages,
    decode_to_engine,
)
from octavo.frontend.live import LiveRequest
from octavo.frontend.replica import Replica
from octavo.frontend.router import Load

from . import protocol
from .protocol import (
    BEAT,
    NO_TERM,
    SILENT_BEATS,
    AskFiles,
    Beat,
    Ended,
    Files,
    Goodbye,
    Hello,
    Malformed,
    Refused,
    Welcome,
)
from .session import Session
from .turns import Turns

QUIET = 10.0  # seconds that an engine must have been ready after a crash until frontends need no turns
FILES_REFUSED = "an engine over the network reads and writes no files for its frontends"

log = logging.getLogger("octavo")


class EngineHost:
    """Serves frontends by one engine, which it supervises as a frontend would; see Replica. To be used on one loop.

    Frontends are peers that have the secret, and may still be wrong: what they send cannot end the host. Their requests
    have ids that are unique among all frontends. Each gets the answers to its own requests only.

    Args:
        connect: starts an engine process, which begins to load.
        files: the answer to those who ask for the model's files; its digest is that of `digest`.
        put: queues the frames of a message to a peer; returns False if there is no such peer, or no room.
        on_times: called with the times of steps, if they are traced.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        files: Files,
        digest: str,
        put: Callable[[Sequence[bytes]], bool],
        on_times: Callable[[bytes], None] | None = None,
    ):
        self._files, self._digest, self._put, self._on_times = files, digest, put, on_times
        self._replica = Replica(connect, self, Load({}, 1))
        self._info: EngineInfo | None = None  # while the engine is ready
        self._sessions: dict[bytes, Session] = {}  # by ZeroMQ's identity of the connection
        self._owners: dict[str, Session] = {}  # of live requests, by their ids
        self._questions: dict[int, tuple[Session, int]] = {}  # the engine's id: who asked, and the frontend's id
        self._question_ids = itertools.count()
        self._turns = Turns(self._admit, self._release)
        self._turns_until = float("-inf")  # infinity from a crash until the next engine is ready
        self._is_leaving = False
        self._beating: asyncio.Task[None] | None = None

    @property
    def num_requests(self) -> int:
        """Return the number of live requests."""
        return len(self._owners)

    @property
    def sessions(self) -> list[Session]:
        """Return the frontends that are connected."""
        return list(self._sessions.values())

    async def start(self, link: Link) -> EngineInfo:
        """Wait until the first engine, which `link` has begun to load, is ready. Raises any error from loading."""
        self._beating = asyncio.create_task(self._beat())
        return await self._replica.start(link)

    def leave(self) -> None:
        """Ask all frontends to continue their requests elsewhere; accept no new ones."""
        self._is_leaving = True
        for session in self.sessions:
            session.send(Leaving())

    async def close(self) -> None:
        """End the sessions and the engine."""
        if self._beating is not None:
            self._beating.cancel()
        for session in self.sessions:
            self._end(session, Ended("it was shut down"))
        await self._replica.close()

    # Frontends

    def receive(self, frames: list[bytes]) -> None:
        """Handle a message of a peer: its identity, the term and the payload."""
        identity, *rest = frames
        session = self._sessions.get(identity)
        try:
            term, payload = protocol.split(rest)
            if term == NO_TERM:
                self._take(identity, session, protocol.to_host(payload))
            elif session is not None and term == session.term:
                session.silent_beats = 0
                self._forward(session, payload)
        except Malformed as error:
            log.warning("a frontend sent a message that cannot be read, and is cut off: %s", error)
            if session is not None:
                self._end(session, Ended("the engine could not read a message"))
            else:
                self._refuse(identity, "the engine could not read a message; install the same version on both")

    def _take(self, identity: bytes, session: Session | None, message: protocol.ToHost) -> None:
        match message:
            case AskFiles():
                problem = protocol.version_problem(message.version, message.protocol)
                self._put((identity, NO_TERM, protocol.encode(Refused(problem) if problem else self._files)))
            case Hello() if session is None:
                self._welcome(identity, message)
            case Beat() if session is not None:
                session.silent_beats, session.is_open = 0, message.is_open
                self._turns.beat(session)
            case Goodbye() if session is not None:
                self._forget(session)

    def _welcome(self, identity: bytes, hello: Hello) -> None:
        problem = protocol.version_problem(hello.version, hello.protocol)
        if problem is None and hello.digest not in ("", self._digest):
            problem = f"it serves another model, {self._files.name}, or its tokenizer was changed"
        if problem is None and self._is_leaving:
            problem = "it is shutting down"
        if problem is not None:
            self._refuse(identity, problem)
            return
        session = self._sessions[identity] = Session(identity, protocol.new_term(), self._put)
        session.tell(Welcome(session.term))
        if self._info is not None:
            self._enter(session)

    def _refuse(self, identity: bytes, reason: str) -> None:
        if not self._is_leaving:
            log.warning("a frontend was refused: %s", reason)
        self._put((identity, NO_TERM, protocol.encode(Refused(reason))))

    def _enter(self, session: Session) -> None:
        self._turns.enter(session, alone=time.monotonic() < self._turns_until)

    def _admit(self, session: Session) -> None:
        assert self._info is not None
        session.is_ready = True
        session.send(Ready(self._info))

    def _release(self, session: Session) -> None:
        held, session.held = session.held, []
        if held:
            self._submit(session, held)

    def _forward(self, session: Session, payload: bytes) -> None:
        """Pass a message of a frontend on to the engine."""
        try:
            message, failures = decode_to_engine(payload)
        except Exception as error:  # whatever a peer may send: too deep, too large, of another type
            raise Malformed(f"{type(error).__name__}: {error}") from None
        if failures:
            session.send(Tokens(failures))
        if message is None or not session.is_ready:
            return
        self._handle(session, message)

    def _handle(self, session: Session, message: ToEngine) -> None:
        match message:
            case Submit():
                if self._turns.must_wait(session):
                    session.held += message.requests
                else:
                    self._submit(session, message.requests)
            case Abort():
                aborted = set(message.ids)
                session.held = [request for request in session.held if request.id not in aborted]
                self._abort(session, [id for id in message.ids if id in session.ids])
            case AskStats() | AskPageStates() | ResetCache():
                number = next(self._question_ids)
                self._questions[number] = (session, message.id)
                self._replica.send(msgspec.structs.replace(message, id=number))
            case Pin():
                session.pins.add(message.id)
                self._replica.send(message)
            case Unpin() if message.id in session.pins:
                session.pins.discard(message.id)
                self._replica.send(message)
            case SaveState() | LoadState():
                session.send(StateDone(message.id, Failed("RequestFailed", FILES_REFUSED)))
            case WatchPages():
                session.wants_pages, session.wants_content = True, message.with_content
                with_content = any(other.wants_content for other in self.sessions)
                self._replica.send(WatchPages(with_content))
            case Unpin():
                pass
            case _:
                raise Malformed(f"{type(message).__name__} is not for engines over the network")

    def _submit(self, session: Session, requests: list[EngineRequest]) -> None:
        fresh = [request for request in requests if request.id not in self._owners]
        if len(fresh) < len(requests):
            message = "another request has the same id"
            taken = [
                TokenOutput(request.id, -1, "error", message=message) for request in requests if request not in fresh
            ]
            session.send(Tokens(taken))
        for request in fresh:
            session.ids.add(request.id)
            self._owners[request.id] = session
        if fresh:
            self._replica.send(Submit(fresh))

    def _abort(self, session: Session, ids: list[str]) -> None:
        for id in ids:
            session.ids.discard(id)
            self._owners.pop(id, None)
        if ids:
            self._replica.send(Abort(ids))

    def _end(self, session: Session, message: Ended) -> None:
        session.tell(message)
        self._forget(session)

    def _forget(self, session: Session) -> None:
        """Abort a frontend's requests and release its states."""
        if self._sessions.pop(session.identity, None) is None:
            return
        self._abort(session, list(session.ids))
        for id in session.pins:
            self._replica.send(Unpin(id))
        self._questions = {number: asked for number, asked in self._questions.items() if asked[0] is not session}
        self._turns.leave(session)

    async def _beat(self) -> None:
        """Send signs of life, and give up frontends that send none."""
        while True:
            # Silence is counted in beats, not seconds: while this process is stopped, so are the beats.
            alive = msgspec.structs.replace(self._replica.alive, step_seconds=0.0)  # the host watches the steps
            payload = protocol.encode(alive)
            for session in self.sessions:
                session.silent_beats += 1
                if session.silent_beats > SILENT_BEATS:
                    log.warning("a frontend is silent: its %d requests are aborted", len(session.ids))
                    self._end(session, Ended(f"it had no message from this frontend for {SILENT_BEATS * BEAT:g} s"))
                elif session.is_lost:
                    log.warning(
                        "a frontend is gone, or reads too slowly: its %d requests are aborted", len(session.ids)
                    )
                    self._end(session, Ended("this frontend read too slowly"))
                else:
                    session.pass_on(payload)
            self._turns.tick()
            await asyncio.sleep(BEAT)

    # Callbacks of the replica (see ReplicaOwner)

    async def replica_ready(self, replica: Replica, info: EngineInfo) -> None:
        self._info = info
        self._turns_until = min(self._turns_until, time.monotonic() + QUIET)
        replica.readmission.engine_ready()
        for session in self.sessions:
            self._enter(session)

    def replica_lost(self, replica: Replica, exit: Exit) -> None:
        self._info = None
        if exit.is_fault or exit.work.alone is not None:
            self._turns_until = float("inf")
        for session in self.sessions:
            session.tell(Ended.of(exit))
        self._sessions.clear()
        self._owners.clear()
        self._questions.clear()
        self._turns.clear()

    def replica_delayed(self, replica: Replica) -> None:
        for session in self.sessions:
            session.tell(Refused(f"the engine {replica.status}"))
        self._sessions.clear()

    def replica_send(self, replica: Replica, live: LiveRequest) -> None:
        pass  # requests are the frontends'

    def replica_opened(self, replica: Replica) -> None:
        pass

    def replica_message(self, replica: Replica, message: FromEngine) -> None:
        match message:
            case Tokens():
                self._deliver(message)
            case Pages():
                self._publish(message)
            case Stats() | PageStates() | CacheReset():
                if (asked := self._questions.pop(message.id, None)) is not None:
                    asked[0].send(msgspec.structs.replace(message, id=asked[1]))

    def _deliver(self, message: Tokens) -> None:
        """Send each frontend what concerns its requests."""
        if message.trace and self._on_times is not None:
            self._on_times(message.trace)
        parts: dict[Session, Tokens] = {}
        owners = self._owners
        for event in message.events:
            if (session := owners.get(event.sequence)) is not None:
                parts.setdefault(session, Tokens([], b"", [])).events.append(event)
        for output in message.outputs:
            if (session := owners.get(output.id)) is None:
                continue
            parts.setdefault(session, Tokens([], b"", [])).outputs.append(output)
            if output.finish_reason:
                del owners[output.id]
                session.ids.discard(output.id)
        for session, part in parts.items():
            if not session.send(part):
                self._replace_large(session, part)

    def _replace_large(self, session: Session, message: Tokens) -> None:
        """Send a message that is too long in parts, and end the requests whose part is too long by itself."""
        if len(message.outputs) > 1:
            session.send(Tokens([], b"", message.events))
            for part in (Tokens([output]) for output in message.outputs):
                if not session.send(part):
                    self._replace_large(session, part)
            return
        limit = f"the answer of a step takes more than {protocol.MAX_MESSAGE >> 20} MiB; ask for fewer logprobs"
        self._abort(session, [output.id for output in message.outputs if output.id in session.ids])
        session.send(Tokens([TokenOutput(output.id, -1, "error", message=limit) for output in message.outputs]))

    def _publish(self, pages: Pages) -> None:
        payload = protocol.encode(pages)
        for session in self.sessions:
            session.is_watching |= session.wants_pages and pages.number == 0
            if session.is_watching:
                session.pass_on(payload)
