"""Fleet: the models of a server by name. They are loaded, unloaded and swapped while requests go on."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.async_llm import AsyncLLM
from octavo.errors import (
    ConfigError,
    EngineDead,
    ModelBusy,
    OctavoError,
    OutOfMemory,
    RequestTimeout,
    UnknownModel,
)
from octavo.frontend.links.process import EngineProcess
from octavo.frontend.meter import Meter

from .memory import Budget
from .model import Model
from .specs import MAX_NAMES, FleetSpec, ModelSpec, SplitSpec
from .split import Split

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

IDLE_LOOK = 0.5  # seconds between checks for models to unload
TURN = 10.0  # seconds that a busy model may keep another one waiting for its memory
ENGINE_PATIENCE = 2.5  # seconds in which the engines of others should answer at start
RETRY_SECONDS = 5.0  # time after a failed load in which requests do not cause another one

log = logging.getLogger("octavo")


class Fleet:
    """The models of a server, loaded or not, with their aliases and splits.

    Call all methods on one event loop.

    Args:
        models: the default one first.
        memory: budget in bytes; None for no budget.

    Attributes:
        meters: one for each name of a model, past ones included, once `enable_metrics` was called; otherwise None.
    """

    def __init__(self, models: Sequence[Model], splits: Sequence[SplitSpec] = (), memory: int | None = None):
        self._models = {model.name: model for model in models}
        self._aliases = {alias: model.name for model in models for alias in model.spec.handling.aliases}
        self._splits = {split.name: Split(split) for split in splits}
        self._budget = Budget(memory) if memory is not None else None
        self._alive: set[Model] = set(models)  # also those that are being swapped in or out
        self._loads: dict[Model, asyncio.Task[None]] = {}
        self._unloads: dict[Model, asyncio.Task[None]] = {}
        self._in_line: set[Model] = set()  # models whose load waits for memory
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing: set[str] = set()  # names of models that are being loaded, unloaded or swapped on request
        self._making_room = asyncio.Lock()
        self._freed = asyncio.Event()  # a model has become idle, or memory was freed
        self._watches_idle_models = False
        self._closed = self._has_started = False
        self.meters: dict[str, Meter] | None = None
        self._tracer: Tracer | None = None

    @classmethod
    def begin(cls, spec: FleetSpec, process: EngineProcess | None = None) -> "Fleet":
        """Return a fleet, and begin to load the models that are loaded at start.

        Args:
            process: the process for the first engine, if it was started earlier to save time.

        Raises:
            ModelNotFound, DamagedWeights, UnsupportedModel, ConfigError; OutOfMemory if the models exceed the budget.
        """
        fleet = cls([Model(model) for model in spec.models], spec.splits, spec.memory)
        try:
            for model in fleet._at_start(is_remote=False):
                fleet._reserve_at_start(model)
                model.begin(process)
                process = None
        except BaseException:
            for model in fleet.models:
                model.discard()
            raise
        finally:
            if process is not None:
                process.end()
        return fleet

    @classmethod
    def of(cls, llm: AsyncLLM) -> "Fleet":
        """Return a fleet of one model that is already started."""
        return cls([Model.of(llm)])

    async def start(self) -> None:
        """Wait until all models are loaded that are loaded at start. Raises the first error, after ending all.

        Engines that others run may come later: this waits for them for ENGINE_PATIENCE seconds at most.
        """
        try:
            connecting = [self._spawn(self._connect(model)) for model in self._at_start(is_remote=True)]
            local = [model for model in self._at_start(is_remote=False) if model.state != "loaded"]
            await asyncio.gather(*(model.load() for model in local))
            if connecting:
                done, _ = await asyncio.wait(connecting, timeout=ENGINE_PATIENCE)
                for task in done:
                    task.result()
            self._has_started = True
        except BaseException:
            await self.close()
            raise
        self._watch_idle_models()

    async def _connect(self, model: Model) -> None:
        """Load a model of engines that others run, as often as it takes. While the fleet starts, raise any error."""
        while model.state != "loaded" and not model.is_off and self._models.get(model.name) is model:
            try:
                await self._load_once(model)
            except Exception as error:
                if not self._has_started:
                    raise
                log.error("%s cannot be used: %s", model.name, error)
                await asyncio.sleep(RETRY_SECONDS)

    def _take_name(self, model: Model) -> None:
        """Serve a model that was given no name under the name that its engines have for it."""
        name, before = model.config.model_name, model.name
        if name == before or name in self.names() or self._models.get(before) is not model:
            return
        model.name = name
        self._models = {other.name: other for other in self._models.values()}
        if self.meters is not None:
            self.meters[name] = self.meters.pop(before)

    async def close(self) -> None:
        """End all engines. Requests fail with EngineDead."""
        self._closed = True
        if tasks := set(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await asyncio.gather(*(model.close() for model in self._alive))

    # Requests

    async def acquire(
        self, name: str | None, keys: Mapping[str, str | None] | None = None, patience: float | None = None
    ) -> Model:
        """Return the model for a request, loaded; the caller must call its `release` when the request has ended.

        Args:
            name: of a model, an alias or a split; None for the first model.
            keys: for sticky splits: the request's "user" and "request_id".
            patience: seconds to wait for a model that is not loaded yet; by default the model's request_timeout.

        Raises UnknownModel, RequestTimeout, and EngineDead if the model is not and cannot be loaded.
        """
        name = self.resolve(name, keys)
        if patience is None:
            patience = self._models[name].spec.config.request_timeout
        try:
            async with asyncio.timeout(patience):
                while self._living()[name].state != "loaded":
                    await self._until_loaded(self._models[name])
        except TimeoutError:
            raise RequestTimeout(f"the model {name!r} was not loaded within the request's timeout") from None
        model = self._models[name]
        model.acquire()
        return model

    def release(self, model: Model) -> None:
        """Note that a request that acquired the model has ended."""
        model.release()
        if model.is_idle:
            self._freed.set()

    def resolve(self, name: str | None, keys: Mapping[str, str | None] | None = None) -> str:
        """Return the name of the model for a request; see `acquire`. Raises UnknownModel."""
        if name is None:
            return next(iter(self._models))
        if name in self._models:
            return name
        if split := self._splits.get(name):
            return split.choose((keys or {}).get(split.spec.sticky) if split.spec.sticky else None)
        if name in self._aliases:
            return self._aliases[name]
        served = ", ".join(map(repr, list(self._models)[:20]))
        raise UnknownModel(
            f"the model {name!r} is not served here; {served} {'is' if len(self._models) == 1 else 'are'}", "model"
        )

    def check_capacity(self) -> None:
        """Raise QueueFull if no model takes another request."""
        full = [model for model in self._models.values() if model.was_loaded and model.llm.is_full]
        if full and len(full) == len(self._models):
            full[0].llm.check_capacity(1)

    # State

    @property
    def models(self) -> list[Model]:
        """Return the models by which names are served now, the default one first."""
        return list(self._models.values())

    def all_models(self) -> list[Model]:
        """Return all models, with those that were swapped out and still finish requests."""
        return [*self._models.values(), *(self._alive - set(self._models.values()))]

    @property
    def default(self) -> Model:
        return next(iter(self._models.values()))

    def names(self) -> dict[str, Model | None]:
        """Return all names that requests may use: of models, of aliases with their model, and of splits with None."""
        aliases = {alias: self._models[name] for alias, name in self._aliases.items()}
        return {**self._models, **aliases, **dict.fromkeys(self._splits)}

    def known(self, name: str) -> Model:
        """Return the model of this name; no alias or split. Raises UnknownModel."""
        if name not in self._models:
            raise UnknownModel(f"there is no model {name!r}; there are {', '.join(self._models)}", "name")
        return self._models[name]

    def shares(self, split: str) -> Mapping[str, float]:
        """Return the shares of a split in percent, by model."""
        return self._splits[split].spec.shares

    def readiness(self) -> tuple[bool, str]:
        """Return whether all models that should be loaded serve requests, and the status as text."""
        status = [(model, model.llm.readiness()) for model in self._models.values() if model.state == "loaded"]
        if len(self._models) == 1 and status:
            return status[0][1]
        for model, (is_ready, text) in status:
            if not is_ready:
                return False, f"{model.name}: {text}"
        for model in self._at_start():
            if model.is_remote and model.state == "loading":
                reason = model.waits_for or "none is ready yet"
                return False, f"{model.name}: waits for an engine: {reason}"
            if model.state == "failed":
                return False, f"{model.name}: the model cannot be loaded: {model.error}"
        return True, f"{len(status)} of {len(self._models)} models are loaded"

    # Changes while serving. A caller that is cancelled does not end them.

    async def load(self, name: str, spec: ModelSpec | None = None) -> None:
        """Load a model that the fleet has, or add one (`spec`) and load it.

        Raises UnknownModel, ModelBusy, ConfigError, and any error from loading. Then a new model is not added.
        """
        await self._change(name, self._load_known(name) if spec is None else self._add(spec))

    async def unload(self, name: str) -> None:
        """Unload a model after its running requests.

        Later requests load it again if it is loaded on demand; otherwise they are refused until `load`. Raises
        UnknownModel, ModelBusy.
        """
        await self._change(name, self._unload_known(name))

    async def swap(self, spec: ModelSpec) -> None:
        """Replace the model of the same name: load the new one, and send it the requests that arrive from then on.

        The old one finishes the requests that it has, then it is ended. If the new one does not load, the old one
        stays. Raises UnknownModel, ModelBusy, ConfigError, and any error from loading.
        """
        await self._change(spec.name, self._swap(spec))

    async def scale(self, name: str, replicas: int) -> None:
        """Change the number of a model's engines. One that is drained hands its requests to the others.

        Raises UnknownModel, ModelBusy, ConfigError; OutOfMemory if the memory budget does not have more engines.
        """
        await self._change(name, self._scale(name, replicas))

    async def _load_known(self, name: str) -> None:
        model = self.known(name)
        model.is_off = False
        while model.state != "loaded":
            self._living()
            await self._load_once(model)

    async def _add(self, spec: ModelSpec) -> None:
        self._check_names(spec)
        model = self._observed(Model(spec))
        with model.wanted():
            try:
                await self._load(model)
                self._check_names(spec)  # another change may have taken one of them
            except BaseException:
                await self._end(model)
                raise
            self._install(model)

    async def _unload_known(self, name: str) -> None:
        model = self.known(name)
        model.is_off = not model.spec.handling.load_on_demand
        await self._unload(model)

    async def _swap(self, spec: ModelSpec) -> None:
        old, new = self.known(spec.name), self._observed(Model(spec))
        self._check_names(spec, replaced=old)
        with new.wanted():
            try:
                await self._load(new, beside=old)
                await new.warm_up()
                self._check_names(spec, replaced=old)
            except BaseException:
                await self._end(new)
                raise
            self._aliases = {alias: name for alias, name in self._aliases.items() if name != spec.name}
            self._install(new)
        self._spawn(self._retire(old))

    async def _scale(self, name: str, replicas: int) -> None:
        model = self.known(name)
        with model.wanted():
            while model.state not in ("loaded", "unloaded", "failed"):
                await model.changed()
            size, before = model.size * replicas // model.config.data_parallel_size, model.size
            if self._budget is not None and model.state == "loaded":
                if not self._budget.fits(size - before):
                    raise OutOfMemory(
                        f"{replicas} engines of {name!r} need {size / 2**30:.2f} GiB, which the memory budget does not "
                        "have beside the other models; unload one of them, or raise --memory"
                    )
                self._budget.reserve(model, max(size, before))
            try:
                await model.scale(replicas)
            finally:
                if self._budget is not None and model.state == "loaded":
                    self._budget.reserve(model, model.size)

    def _install(self, model: Model) -> None:
        self._models[model.name] = model
        self._aliases.update(dict.fromkeys(model.spec.handling.aliases, model.name))
        self._watch_idle_models()

    async def _retire(self, old: Model) -> None:
        """End a model that was swapped out, after its last request."""
        await self._cancel_load(old)
        await self._finish_unload(old)
        old.set_state("draining")
        await old.idle()
        await self._end(old)

    def enable_metrics(self) -> None:
        """Measure the requests of all models from now on. A model that is swapped in continues the counts."""
        self.meters = {}
        for model in self._models.values():
            self._observed(model)

    def enable_spans(self, tracer: "Tracer") -> None:
        """Make OpenTelemetry spans of the requests of all models from now on."""
        self._tracer = tracer
        for model in self._models.values():
            model.set_tracer(tracer)

    # Inside

    def _observed(self, model: Model) -> Model:
        if self.meters is not None:
            model.set_meter(self.meters.setdefault(model.name, Meter()))
        if self._tracer is not None:
            model.set_tracer(self._tracer)
        return model

    def _living(self) -> Mapping[str, Model]:
        """Return the models by name. Raises EngineDead after `close`."""
        if self._closed:
            raise EngineDead("the engine was shut down")
        return self._models

    def _at_start(self, is_remote: bool | None = None) -> list[Model]:
        """Return the models that are loaded at start.

        Args:
            is_remote: of these, only those whose engines others run, or only those whose engines they do not.
        """
        models = [model for model in self.models if not model.spec.handling.load_on_demand]
        return models if is_remote is None else [model for model in models if model.is_remote == is_remote]

    async def _change(self, name: str, change: Coroutine[Any, Any, None]) -> None:
        """Run a change in a task of its own, one at a time for each name. Raises ModelBusy, and the change's error."""
        try:
            self._living()
            if name in self._changing:
                raise ModelBusy(
                    f"the model {name!r} is being loaded, unloaded or swapped; try again when that has ended"
                )
        except OctavoError:
            change.close()
            raise
        self._changing.add(name)
        task = self._spawn(change)
        task.add_done_callback(lambda _: self._changing.discard(name))
        await asyncio.shield(task)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the caller may be gone
        return task

    def _check_names(self, spec: ModelSpec, replaced: Model | None = None) -> None:
        """Raise ConfigError if a name of a new model is taken."""
        names = self.names()
        if len(names) + len(spec.names) > MAX_NAMES:
            raise ConfigError(f"there are {len(names)} names of models, and no more than {MAX_NAMES} are possible")
        taken = {name for name, model in names.items() if model is None or model is not replaced}
        if len(set(spec.names)) < len(spec.names):
            raise ConfigError(f"two of the names {', '.join(map(repr, spec.names[:20]))} are the same: leave one out")
        if replaced is None and spec.name in self._models:
            raise ConfigError(f"there is a model {spec.name!r} already: swap it, or choose another name")
        if clash := next((name for name in spec.names if name in taken), None):
            raise ConfigError(f"the name {clash!r} is taken by another model, alias or split; choose another one")

    async def _until_loaded(self, model: Model) -> None:
        """Wait for the model to be loaded, and load it if nothing does. It may be unloaded again. Raises EngineDead."""
        if model.is_off:
            raise EngineDead(f"the model {model.name!r} is not loaded; load it with: octavo models load {model.name}")
        if model.state == "draining":
            with model.wanted():
                await model.changed()
        elif model.state == "failed" and time.monotonic() - model.failed_at < RETRY_SECONDS:
            raise EngineDead(f"the model {model.name!r} cannot be loaded: {model.error}")
        else:
            try:
                await self._load_once(model)
            except (OctavoError, OSError) as error:
                raise EngineDead(f"the model {model.name!r} cannot be loaded: {error}") from None

    async def _load_once(self, model: Model) -> None:
        """Load a model, or wait for its load that is under way. Raises any error from loading.

        Returns early if the load is cancelled because the model is to be unloaded or is swapped out. A load that still
        waits for memory when the last caller is cancelled is given up.
        """
        if (task := self._loads.get(model)) is None:
            task = self._loads[model] = self._spawn(self._load(model))
            task.add_done_callback(lambda _: self._loads.pop(model))
        with model.wanted():
            try:
                await asyncio.wait((task,))
            finally:
                if model.num_wanting == 1 and model in self._in_line:
                    task.cancel()
        if not task.cancelled():
            task.result()

    async def _load(self, model: Model, beside: Model | None = None) -> None:
        """Reserve memory for a model and load it.

        Args:
            beside: a model that must not be unloaded to make memory free.
        """
        await self._finish_unload(model)
        self._alive.add(model)
        model.set_state("loading")
        try:
            await self._make_room(model, beside)
            await model.load()
            self._take_name(model)
        except BaseException as error:
            self._free(model)
            if isinstance(error, asyncio.CancelledError):
                model.set_state("unloaded")
            else:
                model.failed(error)
            raise
        self._freed.set()  # if all who waited for it have left, it is idle
        log.warning("the model %s is loaded", model.name)

    async def _cancel_load(self, model: Model) -> None:
        if load := self._loads.get(model):
            load.cancel()
            await asyncio.wait((load,))

    async def _finish_unload(self, model: Model) -> None:
        while unload := self._unloads.get(model):
            await asyncio.wait((unload,))

    def _reserve_at_start(self, model: Model) -> None:
        if self._budget is None:
            return
        model.measure()
        self._budget.check(model.name, model.size)
        if not self._budget.fits(model.size):
            raise OutOfMemory(
                f"the models that are loaded at start exceed the memory budget of {self._budget.total / 2**30:.2f} GiB "
                f"with {model.name!r}: set load_on_demand for some of them, or raise --memory"
            )
        self._budget.reserve(model, model.size)

    async def _make_room(self, model: Model, beside: Model | None) -> None:
        """Reserve memory for a model, which waits in line. Unload others until there is enough; see `_choose_leaving`.

        Raises OutOfMemory if there can never be enough.
        """
        if (budget := self._budget) is None:
            return
        await model.measure_in_thread()
        budget.check(model.name, model.size)
        self._in_line.add(model)
        try:
            async with self._making_room:
                began = time.monotonic()
                while not budget.fits(model.size):
                    self._freed.clear()
                    others = [other for other in self._alive if other not in (model, beside)]
                    leaving = [other for other in others if not other.stays]
                    if budget.used - budget.reserved(leaving) + model.size > budget.total:
                        raise OutOfMemory(
                            f"the model {model.name!r} needs {model.size / 2**30:.2f} GiB, which the memory budget "
                            "does not have beside the models that stay loaded; raise --memory, or unload one of them"
                        )
                    if (other := _choose_leaving(leaving, time.monotonic() - began)) is not None:
                        await self._unload(other)
                    else:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(IDLE_LOOK):
                                await self._freed.wait()
                budget.reserve(model, model.size)
        finally:
            self._in_line.discard(model)

    async def _unload(self, model: Model) -> None:
        """Unload a model after its running requests, or wait for that if it is under way. A load is cancelled."""
        if (task := self._unloads.get(model)) is None:
            task = self._unloads[model] = self._spawn(self._unload_now(model))
            task.add_done_callback(lambda _: self._unloads.pop(model))
        await asyncio.shield(task)

    async def _unload_now(self, model: Model) -> None:
        await self._cancel_load(model)
        if model.state != "loaded":
            model.set_state("unloaded")
            return
        await model.unload()
        self._free(model)
        log.warning("the model %s is unloaded", model.name)

    async def _end(self, model: Model) -> None:
        await model.close()
        self._alive.discard(model)
        self._free(model)

    def _free(self, model: Model) -> None:
        if self._budget is not None:
            self._budget.release(model)
        self._freed.set()

    def _watch_idle_models(self) -> None:
        if not self._watches_idle_models and any(model.spec.handling.idle_unload for model in self.models):
            self._watches_idle_models = True
            self._spawn(self._unload_idle_models())

    async def _unload_idle_models(self) -> None:
        while True:
            await asyncio.sleep(IDLE_LOOK)
            for model in self.models:
                limit, unused = model.spec.handling.idle_unload, time.monotonic() - model.last_used
                if limit and model.state == "loaded" and model.is_idle and unused >= limit:
                    self._spawn(self._unload(model))


def _choose_leaving(models: Sequence[Model], waited: float) -> Model | None:
    """Return the model to unload so that another one, which has waited so many seconds for memory, can be loaded.

    That is the least recently used idle one. If there is none for TURN seconds, it is the one that has been loaded
    longest, but at least TURN seconds: it finishes its requests, and later ones wait until it is loaded again. So
    models that are always busy take turns.
    """
    loaded = [model for model in models if model.state == "loaded"]
    if idle := [model for model in loaded if model.is_idle]:
        return min(idle, key=lambda model: model.last_used)
    now = time.monotonic()
    due = [model for model in loaded if min(waited, now - model.loaded_at) >= TURN]
    return min(due, key=lambda model: model.loaded_at, default=None)
