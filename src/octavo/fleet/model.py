"""Model: one model of a fleet, loaded or not, and the requests that use it."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Coroutine, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from octavo.async_llm import AsyncLLM
from octavo.daemon_thread import in_daemon_thread
from octavo.frontend.links.process import EngineProcess
from octavo.frontend.meter import Meter
from octavo.params import SamplingParams
from octavo.process_guard import hide_memory, lock_memory
from octavo.weights import model_files, resolve

from .memory import needs
from .specs import ModelSpec

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from octavo.network.discovery import FoundModel

log = logging.getLogger("octavo")

State = Literal["unloaded", "loading", "loaded", "draining", "failed"]
Result = TypeVar("Result")


class Model:
    """A model with its engines, while they are loaded. Use it on one event loop.

    The tokenizer and the KV states of a model that has been loaded once are kept when it is unloaded.

    Attributes:
        spec: its settings, as given.
        config: the engine's settings; within a memory budget, with a bounded KV cache.
        state: "draining" while its last requests finish; "failed" if the latest load has failed.
        error, failed_at: why and when the latest load failed; "" after a successful one.
        is_off: whether an operator has unloaded it, so that requests do not load it again.
        size: bytes that its engines may take, once `measure` has estimated them; otherwise 0.
        num_wanting: requests and changes that wait until the model is loaded.
        loaded_at: time of the latest load, in seconds of time.monotonic().
        last_used: time at which the latest request ended, in seconds of time.monotonic().
        meter: measures the requests, if it is set.
        tracer: makes spans of the requests, if it is set.
        waits_for: why engines that others run cannot be used yet; "" if they can, or were not looked for.
    """

    def __init__(self, spec: ModelSpec):
        self.spec, self.name, self.config = spec, spec.name, spec.config
        self.state: State = "unloaded"
        self.error, self.failed_at = "", 0.0
        self.is_off = False
        self.size = 0
        self.num_wanting = 0
        self.loaded_at = self.last_used = time.monotonic()
        self.meter: Meter | None = None
        self.tracer: Tracer | None = None
        self.waits_for = ""
        self._llm: AsyncLLM | None = None
        self._was_started = False
        self._users = 0  # requests that use the model, from before they are tokenized until their response ends
        self._idle, self._changed = asyncio.Event(), asyncio.Event()
        self._idle.set()

    @classmethod
    def of(cls, llm: AsyncLLM) -> "Model":
        """Return the model of an AsyncLLM that is already started."""
        model = cls(ModelSpec(config=llm.config))
        model._llm, model._was_started, model.state = llm, True, "loaded"
        return model

    @property
    def llm(self) -> AsyncLLM:
        """Return the model's API. The model must have been loaded."""
        assert self._llm is not None
        return self._llm

    @property
    def was_loaded(self) -> bool:
        """Return whether `llm` can be used."""
        return self._was_started

    @property
    def is_remote(self) -> bool:
        """Return whether others run the engines."""
        return self.config.engines is not None

    @property
    def is_idle(self) -> bool:
        """Return whether no request uses the model or waits for it."""
        return self._users == 0 and not self.num_wanting

    @property
    def stays(self) -> bool:
        """Return whether the model must not be unloaded to make memory free."""
        return self.spec.handling.keep_loaded and self.state != "draining"

    @contextlib.contextmanager
    def wanted(self) -> Generator[None]:
        """Count, in a `with` block, a caller that waits for the model to be loaded."""
        self.num_wanting += 1
        try:
            yield
        finally:
            self.num_wanting -= 1

    def acquire(self) -> None:
        """Count a request that uses the model. Until `release`, the model is not unloaded."""
        self._users += 1
        self._idle.clear()

    def release(self) -> None:
        """Note that a request has ended."""
        self._users -= 1
        self.last_used = time.monotonic()
        if not self._users:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request uses the model."""
        await self._idle.wait()

    def set_state(self, state: State) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait until the state changes."""
        await self._changed.wait()

    def failed(self, error: BaseException) -> None:
        """Note that a load has failed."""
        self.error, self.failed_at = " ".join(str(error).split()) or type(error).__name__, time.monotonic()
        self.set_state("failed")

    def measure(self) -> None:
        """Estimate `size`, and bound the KV cache accordingly. Reads the headers of the model's files, once.

        Raises ModelNotFound, DamagedWeights, UnsupportedModel.
        """
        if not self.size and not self.is_remote:
            needed = needs(self.config, model_files(self.config))
            self.size, self.config = needed.bytes, needed.config

    def begin(self, process: EngineProcess | None = None, found: "FoundModel | None" = None) -> None:
        """Begin to load in the background, so that `load` takes less time. Blocks while the tokenizer is read.

        Args:
            process: see AsyncLLM.from_config.
            found: what the engines of others serve.

        Raises any error from reading the model's files.
        """
        self.state = "loading"
        if self.config.model_identity is not None or self.config.kv_key is not None:
            hide_memory()
            lock_memory()  # where it is allowed; the engine says if it is not
        self._llm = AsyncLLM.from_config(self.config, process, found)
        if self.meter is not None:
            self._llm.set_meter(self.meter)
        if self.tracer is not None:
            self._llm.set_tracer(self.tracer)

    def set_tracer(self, tracer: "Tracer") -> None:
        """Make OpenTelemetry spans of all requests from now on, also after later loads."""
        self.tracer = tracer
        if self._llm is not None:
            self._llm.set_tracer(tracer)

    def set_meter(self, meter: Meter) -> None:
        """Measure all requests with `meter` from now on, also after later loads."""
        self.meter = meter
        if self._llm is not None:
            self._llm.set_meter(meter)

    def discard(self) -> None:
        """End engines that `begin` has started. Needs no event loop."""
        if self._llm is not None:
            self._llm.discard()

    async def measure_in_thread(self) -> None:
        """Do what `measure` does without blocking the event loop: the model may have to be downloaded first."""
        if not self.size:
            await in_daemon_thread(self.measure)

    async def load(self) -> None:
        """Load the engines. Raises any error from loading; then they have ended."""
        try:
            if self._llm is None and self.is_remote:
                found = await self._find()
                await to_the_end(asyncio.to_thread(self.begin, None, found))
                self.config = self.llm.config
            elif self._llm is None:
                await in_daemon_thread(partial(resolve, self.config.model, self.config.revision))
                await to_the_end(asyncio.to_thread(self.begin))
            await (self.llm.load() if self._was_started else self.llm.start())
        except BaseException:
            if self._was_started:
                await self.llm.unload()
            elif self._llm is not None:
                await self._llm.close()
                self._llm = None
            raise
        self._was_started, self.error = True, ""
        self.loaded_at = self.last_used = time.monotonic()
        self.set_state("loaded")

    async def _find(self) -> "FoundModel":
        """Wait until an engine of others tells what it serves. Raises ConfigError if all of them refuse."""
        from octavo.curve import Curve
        from octavo.network.discovery import find_model

        is_wanted = True

        def report(reason: str) -> None:
            self.waits_for = reason
            log.warning("%s waits for an engine: %s", self.name, reason)

        def find() -> "FoundModel":
            curve = Curve.read(self.config.secret_file)
            return find_model(self.config.engine_addresses, curve, report, lambda: is_wanted)

        try:
            return await in_daemon_thread(find)
        finally:
            is_wanted, self.waits_for = False, ""

    async def unload(self) -> None:
        """Wait until no request uses the model, then end its engines."""
        self.set_state("draining")
        await self.idle()
        if self._llm is not None:
            await to_the_end(self._llm.unload())
        self.set_state("unloaded")

    async def scale(self, replicas: int) -> None:
        """Change the number of engines, now or for the next load. Raises ConfigError, and any error from loading."""
        config = dataclasses.replace(self.config, data_parallel_size=replicas)
        if self._llm is not None and self.state == "loaded":
            await self._llm.scale(replicas)
        elif self._llm is not None:
            self._llm.config = config
        self.size = self.size * replicas // self.config.data_parallel_size
        self.config = config
        given = dataclasses.replace(self.spec.config, data_parallel_size=replicas)
        self.spec = dataclasses.replace(self.spec, config=given)

    async def close(self) -> None:
        """End the engines at once. Requests fail with EngineDead."""
        if self._llm is not None:
            await to_the_end(self._llm.close())
        self.set_state("unloaded")

    async def warm_up(self) -> None:
        """Compute one token, so that the first request finds everything in place."""
        await self.llm.agenerate([[0]], SamplingParams(max_tokens=1))


async def to_the_end(work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns. If the caller is cancelled, wait for the end of `work` before raising that."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
