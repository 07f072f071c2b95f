"""Fleet under random concurrent requests, loads, unloads, swaps and failures, with engines that are simulated."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

import octavo.fleet.fleet as fleet_module
import octavo.fleet.model as model_module
from octavo.config import EngineConfig
from octavo.errors import ConfigError, DamagedWeights, EngineDead, ModelBusy, OctavoError, OutOfMemory, RequestTimeout
from octavo.fleet.fleet import Fleet
from octavo.fleet.memory import SERVER, Needs
from octavo.fleet.model import Model
from octavo.fleet.specs import FleetSpec, ModelSpec, SplitSpec, model_spec
from octavo.frontend.links.process import EngineProcess

UNIT = 100
BUDGET = SERVER + 2 * UNIT  # two models


class Machine:
    """What the simulated engines take of a machine."""

    def __init__(self, seed: int = 0):
        self.chance = random.Random(seed)
        self.engines: set[Engines] = set()
        self.peak = 0
        self.loads = 0
        self.gate: asyncio.Event | None = None

    def begin(self, engines: "Engines") -> None:
        self.engines.add(engines)
        self.peak = max(self.peak, self.used)

    @property
    def used(self) -> int:
        return SERVER + UNIT * len(self.engines)


class Engines:
    """Stands for an AsyncLLM: its engines take UNIT bytes from the moment that it is made until they have ended.

    A model whose name begins with "bad" does not load; one whose name begins with "odd" fails at times.
    """

    machine: Machine

    def __init__(self, config: EngineConfig):
        self.config, self.term, self.is_full = config, 0, False
        self.machine.begin(self)

    @classmethod
    def from_config(cls, config: EngineConfig, process: EngineProcess | None = None, found: object = None) -> "Engines":
        return cls(config)

    async def pause(self, most: float = 0.004) -> None:
        await asyncio.sleep(self.machine.chance.uniform(0, most))

    async def start(self) -> None:
        self.machine.loads += 1
        try:
            if self.machine.gate is not None:
                await self.machine.gate.wait()
            await self.pause()
            name = self.config.model
            if name.startswith("bad") or (name.startswith("odd") and self.machine.chance.random() < 0.5):
                raise DamagedWeights("damaged")
        except BaseException:
            await self.unload()
            raise

    async def load(self) -> None:
        assert self not in self.machine.engines
        self.machine.begin(self)
        await self.start()

    async def unload(self) -> None:
        self.term += 1
        await self.pause()
        self.machine.engines.discard(self)

    async def close(self) -> None:
        await self.unload()

    def discard(self) -> None:
        self.machine.engines.discard(self)

    def readiness(self) -> tuple[bool, str]:
        return True, "ready"

    async def agenerate(self, *_: Any) -> None:
        assert self in self.machine.engines
        await self.pause()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(Engines, "machine", machine, raising=False)
    monkeypatch.setattr(model_module, "AsyncLLM", Engines)
    monkeypatch.setattr(model_module, "resolve", lambda model, revision: Path(model))
    monkeypatch.setattr(model_module, "model_files", lambda config: Path(config.model))
    monkeypatch.setattr(model_module, "needs", lambda config, path: Needs(UNIT, config))
    for name, seconds in (("IDLE_LOOK", 0.01), ("TURN", 0.05), ("RETRY_SECONDS", 0.02)):
        monkeypatch.setattr(fleet_module, name, seconds)
    return machine


def spec(name: str, model: str = "good", **settings: Any) -> ModelSpec:
    return model_spec(name, {"model": model, **settings})


def on_demand(*names: str, **settings: Any) -> list[ModelSpec]:
    return [spec(name, load_on_demand=True, **settings) for name in names]


async def begun(models: list[ModelSpec], memory: int | None = BUDGET, *splits: SplitSpec) -> Fleet:
    fleet = Fleet.begin(FleetSpec(models, splits, memory))
    await fleet.start()
    return fleet


async def use(fleet: Fleet, name: str, seconds: float = 0.0, patience: float = 5.0) -> Model:
    """A request: the engines of its model must not end while it runs."""
    model = await fleet.acquire(name, None, patience)
    try:
        engines: Any = model.llm
        term = engines.term
        await asyncio.sleep(seconds)
        assert engines in engines.machine.engines and engines.term == term
    finally:
        fleet.release(model)
    return model


def states(fleet: Fleet) -> list[str]:
    return [model.state for model in fleet.models]


@pytest.mark.parametrize("seed", range(100))
def test_anything_at_any_time(machine: Machine, seed: int, many: bool) -> None:
    if seed >= 6 and not many:
        pytest.skip("one of many seeds: --many")
    chance = machine.chance = random.Random(seed)
    ends: list[str] = []

    async def request(fleet: Fleet, names: list[str]) -> None:
        try:
            patience = chance.choice((0.005, 5.0))
            await use(fleet, chance.choice(names), chance.uniform(0, 0.02), patience)
            ends.append("served")
        except (RequestTimeout, EngineDead) as error:
            ends.append(type(error).__name__)

    async def change(fleet: Fleet) -> None:
        name, model = chance.choice("abcd"), chance.choice(("good", "bad", "odd", "good2"))
        demand, keep = chance.random() < 0.7, chance.random() < 0.1
        settings: dict[str, Any] = {"load_on_demand": demand, "keep_loaded": keep}
        if not keep and chance.random() < 0.5:
            settings["idle_unload"] = 0.03
        try:
            match chance.randrange(4):
                case 0:
                    await fleet.load(name)
                case 1:
                    await fleet.unload(name)
                case 2:
                    await fleet.swap(spec(name, model, **settings))
                case 3:
                    await fleet.load(name, spec(chance.choice("ef"), model, aliases=["g"]))
        except (ModelBusy, OutOfMemory, DamagedWeights, ConfigError, EngineDead):
            pass

    async def main() -> None:
        fleet = await begun(on_demand(*"abcd"), BUDGET, SplitSpec("split", {"a": 50, "b": 50}))
        tasks: list[asyncio.Task[None]] = []
        cancelled = 0
        for _ in range(120):
            names = [*fleet.names()]
            work = change(fleet) if chance.random() < 0.3 else request(fleet, names)
            tasks.append(asyncio.create_task(work))
            if chance.random() < 0.15:
                cancelled += chance.choice(tasks).cancel()
            await asyncio.sleep(chance.uniform(0, 0.003))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        faults = [one for one in results if isinstance(one, Exception)]
        assert not faults, faults
        async with asyncio.timeout(10):
            while not {model.state for model in fleet.all_models()} <= {"loaded", "unloaded", "failed"}:
                await asyncio.sleep(0.005)
        budget = fleet._budget
        assert budget is not None and budget.used == machine.used
        assert all(model.is_idle for model in fleet.all_models())
        assert fleet.all_models() == fleet.models
        await fleet.close()
        assert not machine.engines

    asyncio.run(main())
    assert machine.peak <= BUDGET
    assert ends.count("served") > 10 and machine.loads > 3


def test_closing_at_any_time(machine: Machine) -> None:
    async def main(seed: int) -> None:
        chance = random.Random(seed)
        fleet = await begun([spec("a"), *on_demand("b", "c")])
        works = [use(fleet, chance.choice("abc"), 0.01) for _ in range(6)]
        works += [fleet.swap(spec("a", "good2")), fleet.unload("b"), fleet.load("c")]  # type: ignore[list-item]
        tasks = [asyncio.create_task(work) for work in works]
        await asyncio.sleep(chance.uniform(0, 0.012))
        await fleet.close()
        assert not machine.engines
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not machine.engines
        for result in results:
            assert isinstance(result, Model | OctavoError | asyncio.CancelledError | AssertionError | None)
        with pytest.raises(EngineDead):
            await fleet.acquire("a")

    for seed in range(40):
        asyncio.run(main(seed))


def test_a_load_that_nobody_waits_for_is_given_up(machine: Machine) -> None:
    """Otherwise it would take the memory of a model that is used."""

    async def main() -> None:
        fleet = await begun(on_demand(*"abc", keep_loaded=False))
        using = [await fleet.acquire(name) for name in "ab"]
        with pytest.raises(RequestTimeout):
            await fleet.acquire("c", None, 0.01)
        await asyncio.sleep(0.01)
        assert states(fleet) == ["loaded", "loaded", "unloaded"]
        for model in using:
            fleet.release(model)
        await asyncio.sleep(0.03)
        assert states(fleet) == ["loaded", "loaded", "unloaded"]
        await fleet.close()

    asyncio.run(main())


def test_a_load_whose_requests_have_left_makes_place_for_the_next(machine: Machine) -> None:
    async def main() -> None:
        fleet = await begun(on_demand(*"abc"))
        using = await fleet.acquire("a")
        machine.gate = asyncio.Event()
        with pytest.raises(RequestTimeout):
            await fleet.acquire("b", None, 0.01)
        third = asyncio.create_task(use(fleet, "c"))
        await asyncio.sleep(0.01)
        machine.gate.set()
        await third  # in place of b, which is idle
        fleet.release(using)
        await fleet.close()

    asyncio.run(main())


def test_the_least_recently_used_idle_model_makes_place(machine: Machine) -> None:
    async def main() -> None:
        fleet = await begun(on_demand(*"abcd"))
        await use(fleet, "a")
        await use(fleet, "b")
        await use(fleet, "a")
        await use(fleet, "c")
        assert states(fleet) == ["loaded", "unloaded", "loaded", "unloaded"]
        await use(fleet, "d")
        assert states(fleet) == ["unloaded", "unloaded", "loaded", "loaded"]
        await fleet.close()

    asyncio.run(main())


def test_busy_models_take_turns(machine: Machine) -> None:
    """Three models that are always busy, in memory for two: all are served."""

    async def main() -> None:
        fleet = await begun(on_demand(*"abc"))
        served = dict.fromkeys("abc", 0)

        async def client(name: str) -> None:
            while min(served.values()) < 20:
                await use(fleet, name, 0.01)
                served[name] += 1

        async with asyncio.timeout(30):
            await asyncio.gather(*(client(name) for name in "aaabbbccc"))
        await fleet.close()

    asyncio.run(main())
    assert machine.peak <= BUDGET


def test_models_that_stay(machine: Machine) -> None:
    async def main() -> None:
        fleet = await begun([spec("a", keep_loaded=True), *on_demand("b", "c")])
        for name in "bcbc":
            await use(fleet, name)
        assert states(fleet) == ["loaded", "unloaded", "loaded"]
        with pytest.raises(OutOfMemory, match="beside the models that stay loaded"):
            await fleet.swap(spec("c", keep_loaded=True))  # a swap needs memory for the old and the new one
        await fleet.unload("c")
        await fleet.swap(spec("c", keep_loaded=True))
        with pytest.raises(EngineDead, match="beside the models that stay loaded"):
            await use(fleet, "b")
        with pytest.raises(OutOfMemory, match="beside the models that stay loaded"):
            await fleet.swap(spec("a", "good2"))
        assert states(fleet) == ["loaded", "failed", "loaded"]
        await fleet.close()

    asyncio.run(main())


def test_models_at_start_beyond_the_budget(machine: Machine) -> None:
    with pytest.raises(OutOfMemory, match=r"exceed the memory budget of .* with 'c': set load_on_demand"):
        asyncio.run(begun([spec("a"), spec("b"), spec("c")]))
    assert not machine.engines
    with pytest.raises(OutOfMemory, match="the model 'a' needs"):
        asyncio.run(begun([spec("a")], SERVER + UNIT - 1))
    with pytest.raises(DamagedWeights):
        asyncio.run(begun([spec("a"), spec("b", "bad")]))
    assert not machine.engines


def test_unloading_when_idle(machine: Machine) -> None:
    async def main() -> None:
        fleet = await begun(on_demand("a", "b", idle_unload=0.05))
        async with asyncio.timeout(10):
            long = asyncio.create_task(use(fleet, "a", 0.2))
            await use(fleet, "b")
            while states(fleet) != ["loaded", "unloaded"]:
                await asyncio.sleep(0.005)
            await long
            while "loaded" in states(fleet):
                await asyncio.sleep(0.005)
            await use(fleet, "a")
        await fleet.close()

    asyncio.run(main())


def test_a_failed_load_is_not_tried_again_at_once(machine: Machine) -> None:
    async def main() -> None:
        fleet = await begun([spec("a", "bad", load_on_demand=True)])
        for _ in range(5):
            with pytest.raises(EngineDead, match="the model 'a' cannot be loaded: damaged"):
                await use(fleet, "a")
        assert machine.loads == 1
        await asyncio.sleep(0.03)
        with pytest.raises(EngineDead):
            await use(fleet, "a")
        assert machine.loads == 2
        assert fleet.readiness()[0]  # it is no model that should be loaded
        await fleet.swap(spec("a", "good"))
        await use(fleet, "a")
        await fleet.close()

    asyncio.run(main())


def test_a_remote_model_that_was_swapped_out_is_not_loaded_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engines had not been found yet when others took its place."""
    monkeypatch.setattr(fleet_module, "ENGINE_PATIENCE", 0.01)
    asked: list[str] = []

    async def find(model: Model) -> None:
        [address] = model.config.engine_addresses
        asked.append(address.host)
        if address.host == "absent":
            await asyncio.Event().wait()

    monkeypatch.setattr(Model, "_find", find)

    def remote(host: str) -> ModelSpec:
        return model_spec("far", {"engines": [f"tcp://{host}:7"]})

    async def main() -> None:
        fleet = await begun([remote("absent")])
        await fleet.swap(remote("there"))
        async with asyncio.timeout(10):
            await asyncio.wait(fleet._tasks - {asyncio.current_task()})  # those that retire the model, and connect it
        assert asked == ["absent", "there"] and len(machine.engines) == 1
        assert fleet.all_models() == fleet.models and states(fleet) == ["loaded"]
        await fleet.close()

    asyncio.run(main())


def test_names_that_two_changes_want(machine: Machine) -> None:
    """Both were free when the changes began."""

    async def main() -> None:
        fleet = await begun(on_demand("a"))
        loads = [fleet.load(name, spec(name, aliases=["both"])) for name in "bc"]
        results = await asyncio.gather(*loads, return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["ConfigError", "NoneType"]
        assert len(machine.engines) == 1 and len(fleet.models) == 2
        await fleet.close()

    asyncio.run(main())
