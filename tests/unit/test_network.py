"""Parts of engines over the network that need no second process: addresses, frames, turns, a model's small files."""

import asyncio
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.address import Address, addresses
from octavo.config import EngineConfig
from octavo.curve import Curve
from octavo.engine.messages import EngineInfo, EngineRequest, TokenOutput
from octavo.errors import ConfigError
from octavo.frontend.links.link import Exit
from octavo.frontend.links.messages import (
    Abort,
    FromEngine,
    Load,
    Pages,
    Pin,
    Ready,
    SaveState,
    StateDone,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    Unpin,
    WatchPages,
    decode_from_engine,
)
from octavo.network import discovery, protocol
from octavo.network.host import QUIET, EngineHost
from octavo.network.model_files import ModelFiles
from octavo.network.protocol import NO_TERM, AskFiles, Beat, Ended, Files, Goodbye, Hello, Refused, Welcome, encode
from octavo.params import SamplingParams
from octavo.text import Tokenizer
from octavo.weights import generation_defaults

INFO = EngineInfo(512, 100, 8, 32, "print")


class Recorder:
    """A Link that keeps what it is sent. Its engine is ready as soon as `loads` returns."""

    pid, heartbeats, is_remote, host = None, False, False, ""

    def __init__(self, loads: Callable[[], Awaitable[object]]) -> None:
        self.sent: list[ToEngine] = []
        self._loads = loads

    async def connect(self, on_message: Any, on_end: Any) -> None:
        self.on_message, self.on_end = on_message, on_end
        await self._loads()
        on_message(Ready(INFO))

    def send(self, message: ToEngine) -> None:
        encode(message)
        self.sent.append(message)

    async def close(self) -> None:
        pass

    async def kill(self) -> Exit:
        return self.exit

    exit = Exit("killed by SIGSEGV", is_fault=True)


class Peers:
    """A host whose engine records, and the frontends that talk to it."""

    def __init__(self) -> None:
        self.links: list[Recorder] = []
        self.loads: Callable[[], Awaitable[object]] = partial(asyncio.sleep, 0)
        self.got: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self.host = EngineHost(self.connect, Files("tiny", {}, {}), "digest", self.put)

    def connect(self) -> Recorder:
        self.links.append(Recorder(self.loads))
        return self.links[-1]

    def put(self, frames: Sequence[bytes]) -> bool:
        self.got.setdefault(frames[0], []).append((frames[1], frames[2]))
        return True

    async def start(self) -> None:
        await self.host.start(self.connect())

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    async def until_ready(self) -> None:
        await self.until(lambda: self.host._info is not None)

    def say(self, who: bytes, message: Any, term: bytes = NO_TERM) -> None:
        self.host.receive([who, term, encode(message)])

    def hello(self, who: bytes) -> bytes:
        self.say(who, Hello(digest="digest"))
        [welcome] = [message for message in self.about(who) if isinstance(message, Welcome)]
        return welcome.term

    def about(self, who: bytes) -> list[Any]:
        """What a frontend was told about its session."""
        return [protocol.from_host(payload) for term, payload in self.got.get(who, []) if term == NO_TERM]

    def answers(self, who: bytes) -> list[FromEngine]:
        return [decode_from_engine(payload) for term, payload in self.got.get(who, []) if term != NO_TERM]

    def is_in(self, who: bytes) -> bool:
        """Whether a frontend was told that the engine is ready."""
        return any(isinstance(message, Ready) for message in self.answers(who))


def request(id: str) -> EngineRequest:
    return EngineRequest(id, [1, 2], SamplingParams(max_tokens=5, seed=1))


def with_host(scenario: Any) -> None:
    async def main() -> None:
        peers = Peers()
        await peers.start()
        try:
            await scenario(peers) if asyncio.iscoroutinefunction(scenario) else scenario(peers)
        finally:
            await peers.host.close()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["tcp://a:7000", "tcp://10.0.0.5:1", "tcp://[::1]:65535", "tcp://*:7000"])
def test_addresses(url: str) -> None:
    assert str(Address.of(url)) == url


@pytest.mark.parametrize(
    "url",
    ["", "a:7000", "http://a:7000", "tcp://a", "tcp://a:0", "tcp://a:65536", "tcp://:7", "tcp://a b:7", "tcp://::1:7"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="give one such as tcp://"):
        Address.of(url)
    with pytest.raises(ConfigError):
        EngineConfig(engines=[url])


def test_a_machine_with_two_kinds_of_numbers_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        four = [(socket.AF_INET, 1, 6, "", (number, port)) for number in ("10.0.0.2", "10.0.0.1")]
        return [(socket.AF_INET6, 1, 6, "", ("fd00::1", port, 0, 0)), *four]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert [str(each) for each in Address.of("tcp://a:7").resolved()] == ["tcp://10.0.0.1:7", "tcp://10.0.0.2:7"]
    assert addresses(["tcp://a:7", "tcp://a:7"]) == [Address("a", 7)]


def test_a_name_that_cannot_be_one() -> None:
    with pytest.raises(OSError, match="no valid name"):
        Address.of(f"tcp://{'a' * 70}.test:7").resolved()


def test_keys_follow_from_the_secret() -> None:
    one, same, other = Curve.of(b"1" * 32), Curve.of(b"1" * 32), Curve.of(b"2" * 32)
    assert one == same
    assert len({*one.engine, *one.frontend, *other.engine, *other.frontend}) == 8
    assert one.engine[1].decode() not in repr(one)


def test_two_frontends_get_their_own_answers() -> None:
    def scenario(peers: Peers) -> None:
        [engine] = peers.links
        a, b = peers.hello(b"a"), peers.hello(b"b")
        peers.say(b"a", Submit([request("1"), request("2")]), a)
        peers.say(b"b", Submit([request("3"), request("1")]), b)  # 1 is taken
        assert [r.id for m in engine.sent if isinstance(m, Submit) for r in m.requests] == ["1", "2", "3"]
        engine.on_message(Tokens([TokenOutput("3", 7), TokenOutput("1", 8, "length"), TokenOutput("9", 9)]))
        tokens = {
            who: [o for m in peers.answers(who) if isinstance(m, Tokens) for o in m.outputs] for who in (b"a", b"b")
        }
        assert [(o.id, o.token) for o in tokens[b"a"]] == [("1", 8)]
        assert [(o.id, o.token, o.finish_reason) for o in tokens[b"b"]] == [("1", -1, "error"), ("3", 7, None)]

        peers.say(b"b", Abort(["2"]), b)  # not its own
        assert not [m for m in engine.sent if isinstance(m, Abort)]
        peers.say(b"a", Pin("state", [1], "", ""), a)
        peers.say(b"b", Unpin("state"), b)
        peers.say(b"a", Submit([request("old")]), b)  # of another term
        assert not [m for m in engine.sent if isinstance(m, Unpin)] and peers.host.num_requests == 2
        peers.say(b"a", Goodbye())
        assert engine.sent[-2:] == [Abort(["2"]), Unpin("state")]
        assert peers.host.num_requests == 1

    with_host(scenario)


def test_each_frontend_gets_all_pages_first() -> None:
    def scenario(peers: Peers) -> None:
        [engine] = peers.links
        a, b = peers.hello(b"a"), peers.hello(b"b")

        def pages(who: bytes) -> list[int]:
            return [message.number for message in peers.answers(who) if isinstance(message, Pages)]

        peers.say(b"a", WatchPages(), a)
        engine.on_message(Pages(0))
        peers.say(b"b", WatchPages(with_content=True), b)
        engine.on_message(Pages(1))
        engine.on_message(Pages(0))
        peers.say(b"a", WatchPages(), a)
        assert pages(b"a") == [0, 1, 0] and pages(b"b") == [0]
        assert engine.sent[-1] == WatchPages(with_content=True)

    with_host(scenario)


def test_files_and_models_are_not_for_frontends() -> None:
    def scenario(peers: Peers) -> None:
        term = peers.hello(b"a")
        peers.say(b"a", SaveState("s", "/etc/passwd", [1], "", ""), term)
        [done] = [message for message in peers.answers(b"a") if isinstance(message, StateDone)]
        assert done.failed is not None and "reads and writes no files" in done.failed.message
        peers.say(b"a", Load({}, "/"), term)
        assert isinstance(peers.about(b"a")[-1], Ended) and not peers.host.sessions
        assert not peers.links[0].sent

    with_host(scenario)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(version="0.0.9", digest="digest"), "runs Octavo .*, and the frontend 0.0.9: install the same version"),
        (Hello(protocol=99, digest="digest"), "with protocol 99: install the same version"),
        (Hello(digest="another"), "serves another model, tiny"),
        (AskFiles(version="0.0.9"), "install the same version"),
    ],
)
def test_who_is_refused(hello: Any, reason: str) -> None:
    def scenario(peers: Peers) -> None:
        peers.say(b"a", hello)
        [refused] = peers.about(b"a")
        assert isinstance(refused, Refused) and re.search(reason, refused.reason)
        assert not peers.host.sessions

    with_host(scenario)


def test_after_a_crash_frontends_take_turns() -> None:
    """The second one is let in, and the first one's new requests are sent, when nothing is on trial."""

    async def scenario(peers: Peers) -> None:
        for who in (b"a", b"b"):
            peers.hello(who)
        peers.links[0].on_end()
        await peers.until(lambda: len(peers.links) == 2)
        await peers.until_ready()
        assert [message.is_fault for message in peers.about(b"a") if isinstance(message, Ended)] == [True]
        peers.got.clear()
        a, b = peers.hello(b"a"), peers.hello(b"b")

        def sent() -> list[str]:
            return [r.id for m in peers.links[1].sent if isinstance(m, Submit) for r in m.requests]

        assert peers.is_in(b"a") and not peers.is_in(b"b")
        peers.say(b"a", Beat(is_open=False))
        peers.say(b"a", Submit([request("suspect")]), a)
        assert sent() == ["suspect"] and not peers.is_in(b"b")
        peers.say(b"a", Beat(is_open=True))
        assert peers.is_in(b"b")
        peers.say(b"a", Submit([request("new")]), a)
        assert sent() == ["suspect"]
        peers.say(b"b", Submit([request("other")]), b)
        peers.say(b"b", Goodbye())
        assert sent() == ["suspect", "other", "new"]

    with_host(scenario)


def test_turns_after_a_crash_last_however_long_the_next_engine_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has been ready for QUIET seconds."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("octavo.network.host.time", clock)

    async def scenario(peers: Peers) -> None:
        loaded = asyncio.Event()
        peers.loads = loaded.wait
        peers.links[0].on_end()
        await peers.until(lambda: len(peers.links) == 2)
        clock.now += 2 * QUIET
        loaded.set()
        await peers.until_ready()
        for who in (b"a", b"b"):
            peers.hello(who)
        assert [peers.is_in(who) for who in (b"a", b"b")] == [True, False]
        clock.now += QUIET
        peers.say(b"a", Goodbye())
        peers.say(b"b", Goodbye())
        for who in (b"c", b"d"):
            peers.hello(who)
        assert [peers.is_in(who) for who in (b"c", b"d")] == [True, True]

    with_host(scenario)


def test_an_answer_that_is_too_long_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a request ends whose own part is too long; the others of its frontend go on."""
    monkeypatch.setattr("octavo.network.session.MAX_MESSAGE", 400)

    def scenario(peers: Peers) -> None:
        [engine] = peers.links
        term = peers.hello(b"a")
        peers.say(b"a", Submit([request(id) for id in ("1", "2", "3")]), term)
        texts = {"1": "x" * 150, "2": "x" * 500, "3": "x" * 150}
        engine.on_message(Tokens([TokenOutput(id, 7, message=text) for id, text in texts.items()]))
        outputs = [output for each in peers.answers(b"a") if isinstance(each, Tokens) for output in each.outputs]
        assert [(each.id, each.token, each.finish_reason) for each in outputs] == [
            ("1", 7, None),
            ("2", -1, "error"),
            ("3", 7, None),
        ]
        assert "ask for fewer logprobs" in (outputs[1].message or "")
        assert engine.sent[-1] == Abort(["2"]) and peers.host.num_requests == 2

    with_host(scenario)


def test_one_refusal_is_not_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two engines behind a name, one refuses, and the other may still be starting."""
    monkeypatch.setattr(discovery, "PATIENCE", 0.2)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    numbers = ["127.0.0.1", "127.0.0.2"]

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, 1, 6, "", (number, port)) for number in numbers]

    def refuse() -> None:
        for _ in range(2):
            identity, *_ = router.recv_multipart()
            router.send_multipart([identity, NO_TERM, encode(Refused("no"))])

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    refusing = threading.Thread(target=refuse, daemon=True)
    refusing.start()
    reasons: list[str] = []
    engines = [Address("engines.test", port)]
    try:
        with pytest.raises(TimeoutError):
            discovery.find_model(engines, None, reasons.append, is_wanted=lambda: not reasons)
        assert reasons == [f"tcp://127.0.0.1:{port}: no; tcp://127.0.0.2:{port} does not answer"]
        numbers.remove("127.0.0.2")
        with pytest.raises(ConfigError, match=f"^tcp://127.0.0.1:{port}: no$"):
            discovery.find_model(engines, None)
        refusing.join(10)
    finally:
        context.destroy(linger=0)


def test_a_silent_frontend_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.network.host.BEAT", 0.001)

    async def scenario(peers: Peers) -> None:
        term = peers.hello(b"a")
        peers.say(b"a", Submit([request("1")]), term)
        await peers.until(lambda: not peers.host.sessions)
        assert peers.links[0].sent[-1] == Abort(["1"])
        assert isinstance(peers.about(b"a")[-1], Ended)

    with_host(scenario)


VALUES = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [each.__name__ for each in (Submit, Abort, Pin, Unpin, WatchPages, Stats, Hello, Beat, Goodbye, AskFiles, Load)]
MESSAGES = st.one_of(
    st.binary(),
    VALUES.map(msgspec.msgpack.encode),
    st.builds(
        lambda name, fields: msgspec.msgpack.encode({"type": name, **fields}),
        st.sampled_from(NAMES),
        st.dictionaries(st.sampled_from(["ids", "id", "requests", "tokens", "version"]), VALUES, max_size=3),
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(MESSAGES, max_size=3)), max_size=4))
def test_no_message_harms_the_host(messages: list[tuple[bool, list[bytes]]]) -> None:
    """Whatever arrives, a well-behaved frontend is served as before."""

    def scenario(peers: Peers) -> None:
        good = peers.hello(b"good")
        bad = peers.hello(b"bad")
        peers.say(b"good", Submit([request("good")]), good)
        for in_session, frames in messages:
            peers.host.receive([b"bad", bad if in_session else NO_TERM, *frames])
        peers.links[0].on_message(Tokens([TokenOutput("good", 5)]))
        [tokens] = [message for message in peers.answers(b"good") if isinstance(message, Tokens)]
        assert tokens.outputs[0].token == 5

    with_host(scenario)


@pytest.mark.parametrize("depth", [10, 100_000])
def test_nesting_does_not_end_the_host(depth: int) -> None:
    def scenario(peers: Peers) -> None:
        term = peers.hello(b"a")
        peers.host.receive([b"a", term, b"\x91" * depth + b"\xc0"])
        assert isinstance(peers.about(b"a")[-1], Ended)

    with_host(scenario)


def test_the_small_files_make_the_same_tokenizer(tiny_llama: Path, smollm2: Path) -> None:
    """Of a directory, and of a .gguf file, which has none."""
    for path in (tiny_llama, smollm2):
        files = ModelFiles.read(path)
        original = Tokenizer.load(path)
        with files.in_folder() as folder:
            copy = Tokenizer.load(folder)
            assert generation_defaults(folder) == generation_defaults(path)
        text = "Once upon a time, <|im_end|> naïve Ünïcode 12345  \n\tdef f(x): return x"
        assert copy.encode(text) == original.encode(text)
        assert copy.decode(copy.encode(text)) == original.decode(original.encode(text))
        for name in ("eos_token_ids", "bos_token_id", "eos_token_id", "vocab_size", "_template", "_special_tokens"):
            assert getattr(copy, name) == getattr(original, name), name
        assert files.digest == ModelFiles.read(path).digest
        assert not folder.exists()


def test_names_of_files_do_not_leave_the_folder() -> None:
    with ModelFiles({"../evil": b"", "config.json": b"{}"}).in_folder() as folder:
        assert [file.name for file in folder.iterdir()] == ["config.json"]
        assert not (folder.parent / "evil").exists()
