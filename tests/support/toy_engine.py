"""Toy engines: links to engines without a model, which a test steps, kills, hangs and delays as it likes.

Token `position` of a request is a function of its prompt and seed alone (`toy_token`), so `expected` knows every right
token. A step computes at most MAX_ROWS tokens, in chunks; a prefix cache keeps the pages. No thread, no process.
"""

import asyncio
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo, EngineRequest, EngineStats, TokenOutput
from octavo.engine.work_record import Work
from octavo.errors import DamagedWeights
from octavo.frontend.frontend import Frontend
from octavo.frontend.links.link import Exit
from octavo.frontend.links.messages import (
    HEARTBEAT,
    Abort,
    Alive,
    AskStats,
    Failed,
    FromEngine,
    LoadState,
    Pages,
    Ready,
    SaveState,
    StateDone,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    WatchPages,
)
from octavo.frontend.replica import Replica
from octavo.frontend.requests import make_request
from octavo.kv import Prefix, root_key
from octavo.params import SamplingParams
from octavo.text import Tokenizer

EOS = 0
LETTERS = 8  # tokens 1 to LETTERS, spelled "a" to "h", are all that is generated beside EOS
POISON_ADD, POISON_PROMPT, POISON_UNKNOWN, POISON_DECODE = range(20, 24)
"""First tokens of prompts that make the engine die: when it adds the request; when it computes the prompt, with and
without a record of the step; when it computes the second token."""
POISONS = (POISON_ADD, POISON_PROMPT, POISON_UNKNOWN, POISON_DECODE)
UNSENDABLE = 24  # first token of prompts that `send` refuses
VOCAB_SIZE = 26
PAGE_SIZE, NUM_PAGES = 4, 12
MAX_ROWS = 10  # tokens in a step
MAX_MODEL_LEN = 64


def toy_token(prompt: Sequence[int], seed: int, position: int) -> int:
    """Return token number `position` of the output."""
    number = int.from_bytes(blake2b(repr((list(prompt), seed, position)).encode(), digest_size=4).digest(), "little")
    return EOS if number % 23 == 0 else 1 + number % LETTERS


@dataclass(frozen=True)
class Expected:
    """What a completion delivers in the end."""

    tokens: list[int]
    text: str
    finish_reason: str


def expected(prompt: Sequence[int], params: SamplingParams, index: int = 0) -> Expected:
    """Return the output of completion number `index`. `params` must have a seed."""
    assert params.seed is not None
    limit = min(params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN - len(prompt))
    tokens, text = list[int](), ""
    while len(tokens) < limit:
        token = toy_token(prompt, params.seed + index, len(tokens))
        tokens.append(token)
        if token == EOS:
            return Expected(tokens, text, "stop")
        text += chr(ord("a") + token - 1)
        if found := [stop for stop in params.stop_strings if text.endswith(stop)]:
            return Expected(tokens, text[: -max(map(len, found))], "stop")
    return Expected(tokens, text, "length")


def toy_tokenizer() -> Tokenizer:
    """Return a real tokenizer of VOCAB_SIZE tokens: EOS and letters."""
    special = "<|endoftext|>"
    vocabulary = {special: EOS} | {chr(ord("a") + i): 1 + i for i in range(VOCAB_SIZE - 1)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([special])
    return Tokenizer(backend, frozenset([EOS]))


@dataclass
class ToySequence:
    """A completion in a toy engine."""

    request: EngineRequest
    prefix: Prefix
    computed: int = -1  # tokens whose K and V are there; -1 before its first step
    emitted: int = 0  # tokens that this engine has sent

    @property
    def is_computed(self) -> bool:
        """Whether the prompt, with the output of earlier engines, is computed."""
        return self.emitted > 0


class ToyEngine:
    """A Link whose engine does one thing after the other, as the test says.

    Args:
        number: of the replica.
        load_seconds: time until it is ready.
        refuses: whether it fails to load.
        fingerprint: of its pages.
        role: in the fleet.

    Attributes:
        hangs: whether it does nothing, not even send heartbeats.
        is_stuck: whether its step does not end; heartbeats go on.
        holds_back: whether messages are kept in `outbox` until `release`.
        is_ended: whether it handles and sends no more messages.
        is_gone: whether `close` or `kill` has returned.
        loses_pages: number of the next Pages messages that are lost on their way.
        has_gap: whether a Pages message was lost since the one with all pages.
        pages: keys in the cache, least recently used first.
    """

    pid: int | None = None
    heartbeats = True
    is_remote = False

    def __init__(
        self,
        number: int,
        load_seconds: float = 0.5,
        refuses: bool = False,
        fingerprint: str = "toy",
        role: str = "both",
    ):
        self.number, self.load_seconds, self.refuses, self.fingerprint = number, load_seconds, refuses, fingerprint
        self.role, self.host = role, f"10.0.0.{number}"
        self.sequences: dict[str, ToySequence] = {}
        self.inbox: deque[ToEngine] = deque()
        self.outbox: deque[FromEngine] = deque()
        self.pages: OrderedDict[bytes, None] = OrderedDict()
        self.holds_back = self.hangs = self.is_stuck = self.is_ended = self.is_ready = False
        self.is_gone = False
        self.loses_pages, self.has_gap = 0, False
        self.fault: EngineRequest | None = None  # the request that made this engine die
        self._changes: dict[bytes, bool] | None = None
        self._page_number = 0
        self._step: list[tuple[ToySequence, int]] | None = None  # what the current step computes: tokens by sequence
        self._exit = Exit("killed by SIGKILL", is_fault=False)
        self._work = Work()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[FromEngine], None] | None = None
        self._on_end: Callable[[], None] | None = None

    # The link

    async def connect(self, on_message: Callable[[FromEngine], None], on_end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_end = on_message, on_end
        self._loop.call_later(self.load_seconds, lambda: self._load())
        self._loop.call_later(HEARTBEAT, self._beat)

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Submit) and any(request.prompt[0] == UNSENDABLE for request in message.requests):
            raise TypeError("a toy cannot encode this")
        if not self.is_ended:
            self.inbox.append(message)

    async def close(self) -> None:
        self._detach()
        await asyncio.sleep(0.01)
        self.is_gone = True

    async def kill(self) -> Exit:
        self._detach()
        await asyncio.sleep(0.01)
        self.is_gone = True
        return Exit(self._exit.reason, self._exit.is_fault, self._work)

    def _detach(self) -> None:
        """End the engine; no message is delivered any more."""
        self.is_ended, self.is_ready = True, False
        self._on_message = self._on_end = None

    # What a test does

    def step(self) -> None:
        """Do a whole step."""
        self.begin()
        self.finish()

    def begin(self) -> None:
        """Begin a step: handle all messages, and choose what is computed."""
        if self.hangs or self.is_stuck or self.is_ended or not self.is_ready or self._step is not None:
            return
        while self.inbox and not self.is_ended:
            self._handle(self.inbox.popleft())
        if not self.is_ended:
            self._step = self._schedule()
            self._work = Work(prompts=tuple(each.request.id for each, _ in self._step if not each.is_computed))

    def finish(self) -> None:
        """End the step, and send its results. A poisonous request in it makes the engine die."""
        step, self._step = self._step, None
        if step is None or self.hangs or self.is_stuck or self.is_ended:
            return
        for sequence, _ in step:
            poison = sequence.request.prompt[0]
            if poison == POISON_UNKNOWN:
                self._work = Work()
            if poison in (POISON_PROMPT, POISON_UNKNOWN) or (poison == POISON_DECODE and sequence.emitted):
                self._die_of(sequence.request)
                return
        outputs = [output for sequence, rows in step if (output := self._compute(sequence, rows))]
        self._work = Work()
        if outputs:
            self._deliver(Tokens(outputs))
        if self._changes:
            gained = b"".join(key for key, there in self._changes.items() if there)
            lost = b"".join(key for key, there in self._changes.items() if not there)
            self._changes = {}
            self._deliver(Pages(self._page_number, gained, lost))
            self._page_number += 1

    def die(self, reason: str = "killed by SIGKILL", is_fault: bool = False, loses_messages: bool = False) -> None:
        """End, after the messages that were held back, or without them."""
        if self.is_ended:
            return
        self._exit = Exit(reason, is_fault)
        if loses_messages:
            self.outbox.clear()
        self.release()
        self.is_ended, self.is_ready = True, False
        if self._loop is not None:
            self._loop.call_soon(lambda: self._on_end and self._on_end())

    def release(self) -> None:
        """Deliver the messages that were held back."""
        self.holds_back = False
        while self.outbox and self._on_message is not None:
            self._on_message(self.outbox.popleft())

    @property
    def published(self) -> set[bytes] | None:
        """Return the keys that the frontend must know; None if a message that it needs to know them was lost."""
        return None if self.has_gap else set() if self._changes is None else set(self.pages)

    @property
    def is_settled(self) -> bool:
        """Return whether it has handled all messages, and all of its own have been delivered."""
        return not (self.inbox or self.outbox or self._changes or self._step is not None)

    # Inside

    def _load(self) -> None:
        if self.is_ended or self.hangs:
            return
        if self.refuses:
            self._deliver(Failed.of(DamagedWeights("a toy model is damaged")))
            return
        self.is_ready = True
        info = EngineInfo(MAX_MODEL_LEN, VOCAB_SIZE, NUM_PAGES, PAGE_SIZE, self.fingerprint, role=self.role)
        self._deliver(Ready(info))

    def _beat(self) -> None:
        if self.is_ended or self._loop is None:
            return
        if not self.hangs and self._on_message is not None:
            self._on_message(Alive(step_seconds=60.0 if self.is_stuck else 0.0))
        self._loop.call_later(HEARTBEAT, self._beat)

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, Pages) and message.number and self.loses_pages:
            self.loses_pages -= 1
            self.has_gap = True
        elif self.holds_back:
            self.outbox.append(message)
        elif self._on_message is not None:
            self._on_message(message)

    def _die_of(self, request: EngineRequest) -> None:
        self.fault = request
        self.die("killed by SIGSEGV", is_fault=True)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                for request in message.requests:
                    self._add(request)
            case Abort():
                for id in message.ids:
                    self.sequences.pop(id, None)
            case WatchPages():
                self._changes, self.has_gap = {}, False
                self._deliver(Pages(0, b"".join(self.pages), port=7000 if message.with_serving else 0))
                self._page_number = 1
            case AskStats():
                self._deliver(Stats(message.id, toy_stats()))
            case SaveState() | LoadState():
                self._deliver(StateDone(message.id))

    def _add(self, request: EngineRequest) -> None:
        if self.is_ended:
            return
        if request.prompt[0] == POISON_ADD:
            self._work = Work(alone=request.id)
            self._die_of(request)
            return
        assert request.id not in self.sequences
        if (source := request.source) is not None:
            assert source.address != f"tcp://{self.host}:7000", "it is told to fetch pages from itself"
            assert source.pages > 0
        root = root_key(self.fingerprint, request.tenant, request.salt, request.origin)
        self.sequences[request.id] = ToySequence(
            request, Prefix(root, array("i", request.prompt + request.output), PAGE_SIZE)
        )

    def _schedule(self) -> list[tuple[ToySequence, int]]:
        left, step = MAX_ROWS, []
        for sequence in self.sequences.values():
            first = self.sequences.get(sequence.request.after or "")
            if not left or (first is not None and not first.is_computed):
                continue
            if sequence.computed < 0:
                sequence.computed = self._cached(sequence.prefix)
            rows = min(len(sequence.prefix.tokens) - sequence.computed, left)
            left -= rows
            step.append((sequence, rows))
        return step

    def _cached(self, prefix: Prefix) -> int:
        pages = 0
        while (pages + 1) * PAGE_SIZE < len(prefix.tokens) and prefix.key(pages) in self.pages:
            self.pages.move_to_end(prefix.key(pages))
            pages += 1
        return pages * PAGE_SIZE

    def _compute(self, sequence: ToySequence, rows: int) -> TokenOutput | None:
        """Compute tokens of a sequence; return the next one if these were the last."""
        before = sequence.computed // PAGE_SIZE
        sequence.computed += rows
        for page in range(before, sequence.computed // PAGE_SIZE):
            self._publish(sequence.prefix.key(page))
        if sequence.computed < len(sequence.prefix.tokens) or sequence.request.id not in self.sequences:
            return None
        request = sequence.request
        position = len(request.output) + sequence.emitted
        token = toy_token(request.prompt, request.params.seed or 0, position)
        sequence.prefix.tokens.append(token)
        sequence.emitted += 1
        assert request.params.max_tokens is not None
        reason = "stop" if token in request.eos else "length" if position + 1 >= request.params.max_tokens else None
        if reason:
            del self.sequences[request.id]
        return TokenOutput(request.id, token, reason)

    def _publish(self, key: bytes) -> None:
        if key in self.pages:
            self.pages.move_to_end(key)
            return
        if len(self.pages) == NUM_PAGES:
            lost, _ = self.pages.popitem(last=False)
            self._note(lost, False)
        self.pages[key] = None
        self._note(key, True)

    def _note(self, key: bytes, is_there: bool) -> None:
        if self._changes is not None:
            self._changes[key] = is_there


@dataclass
class Toys:
    """A frontend over toy engines, and all engines that it ever started.

    Attributes:
        plans: keywords of the next engines to be connected, for each replica.
        roles: of the engines, in turns.
    """

    replicas: int = 1
    roles: Sequence[str] = ("both",)
    engines: list[ToyEngine] = field(default_factory=list)
    plans: dict[int, list[dict[str, object]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = EngineConfig(max_batch_tokens=MAX_ROWS, data_parallel_size=self.replicas)
        self.tokenizer = toy_tokenizer()
        self.frontend = Frontend(config, self.tokenizer, self.connect, has_queue_limit=True)

    def connect(self, number: int) -> ToyEngine:
        plans = self.plans.get(number)
        role = self.roles[number % len(self.roles)]
        engine = ToyEngine(number, role=role, **(plans.pop(0) if plans else {}))  # type: ignore[arg-type]
        self.engines.append(engine)
        return engine

    async def start(self) -> EngineInfo:
        return await self.frontend.start([self.connect(number) for number in range(self.replicas)])

    def engine(self, replica: Replica | int) -> ToyEngine:
        """Return the current engine of a replica of the frontend."""
        if isinstance(replica, int):
            replica = self.frontend.replicas[replica]
        assert isinstance(replica.link, ToyEngine)
        return replica.link

    @property
    def running(self) -> list[ToyEngine]:
        return [engine for engine in self.engines if not engine.is_ended]

    async def finish(self, rounds: int = 2000) -> None:
        """Step all engines until no request is live and no call is unanswered."""
        for _ in range(rounds):
            for engine in self.running:
                engine.release()
                engine.step()
                await asyncio.sleep(0)  # the frontend notes its end before another one sends tokens
            await asyncio.sleep(0.05)
            if not self.frontend._ledger and all(engine.is_settled for engine in self.running):
                return
        raise AssertionError("requests do not end")


def toy_request(prompt: list[int], params: SamplingParams, **terms: object):  # type: ignore[no-untyped-def]
    """Return a request of token ids."""
    return make_request(prompt, params, terms=terms)  # type: ignore[arg-type]


def toy_stats() -> EngineStats:
    zeros = {name: "" if name == "page_map" else 0 for name in EngineStats.__struct_fields__}
    return EngineStats(**zeros | {"tiers": {}})
