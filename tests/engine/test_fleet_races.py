"""Races between crashes, drains, stops, starts and sinks, each with toy engines and in virtual time."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import EngineDead, InvalidRequest, RequestFailed
from octavo.frontend.live import LiveRequest
from octavo.frontend.readmission import ENOUGH_FAULTS
from octavo.frontend.replica import FIRST_SIGN
from octavo.params import SamplingParams
from toy_engine import (
    POISON_ADD,
    POISON_DECODE,
    POISON_PROMPT,
    POISON_UNKNOWN,
    UNSENDABLE,
    Toys,
    toy_request,
    toy_token,
)
from virtual_time import VirtualLoop, check_no_task_is_left, virtual_loop

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    level = logging.getLogger("octavo").level
    logging.getLogger("octavo").setLevel(logging.CRITICAL + 1)
    with virtual_loop() as loop:
        yield loop
    logging.getLogger("octavo").setLevel(level)


@pytest.fixture
def run(loop: VirtualLoop) -> Run:
    def run(test: Coroutine[Any, Any, None]) -> None:
        loop.run_until_complete(test)
        check_no_task_is_left(loop)

    return run


class Client:
    """A request and what its sink was called with."""

    def __init__(self, toys: Toys, prompt: list[int], max_tokens: int = 12):
        self.toys, self.prompt = toys, prompt
        self.params = SamplingParams(max_tokens=max_tokens, seed=7, ignore_eos=True)
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.on_error: Callable[[], None] = lambda: None
        self.live: LiveRequest

    def submit(self) -> "Client":
        request = toy_request(self.prompt, self.params)
        (self.live,) = self.toys.frontend.submit([request], [self.prompt], self.sink)
        return self

    def sink(self, _: LiveRequest, output: Any) -> None:
        if isinstance(output, Exception):
            self.error = output
            self.on_error()
        else:
            self.tokens += output.outputs[0].token_ids

    @property
    def is_right(self) -> bool:
        return self.tokens == right(self.prompt, self.params)


def right(prompt: list[int], params: SamplingParams) -> list[int]:
    assert params.max_tokens is not None and params.seed is not None
    return [toy_token(prompt, params.seed, position) for position in range(params.max_tokens)]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object], seconds: float = 100.0) -> None:
    for _ in range(round(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come true")


def test_stop_while_loading_ends_start_at_once(run: Run, loop: VirtualLoop) -> None:
    async def main() -> None:
        toys = Toys(2)
        starting = asyncio.ensure_future(toys.start())
        await asyncio.sleep(0.1)
        begun = loop.now
        await toys.frontend.stop()
        with pytest.raises(EngineDead):
            await starting
        assert loop.now - begun < 1.0
        assert not toys.running

    run(main())


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("stop_is_first", [True, False])
def test_stop_at_the_moment_of_loading_starts_no_engine(run: Run, count: int, stop_is_first: bool) -> None:
    async def main() -> None:
        toys = Toys(1)
        starting = asyncio.ensure_future(toys.start())
        await turns()
        engine = toys.engines[0]
        load = engine._load
        stopping: list[asyncio.Task[None]] = []

        async def stop() -> None:
            await turns(count)
            await toys.frontend.stop()

        def loaded() -> None:
            if not stop_is_first:
                load()
            stopping.append(asyncio.ensure_future(stop()))
            if stop_is_first:
                load()

        engine._load = loaded  # type: ignore[method-assign]
        await until(lambda: stopping)
        await stopping[0]
        await asyncio.wait((starting,))
        starting.exception()
        await asyncio.sleep(FIRST_SIGN)
        assert len(toys.engines) == 1 and not toys.running

    run(main())


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("ends", ["stop", "drain"])
def test_stop_at_the_moment_of_a_crash(run: Run, ends: str, count: int) -> None:
    """asyncio.wait_for of Python 3.11 loses a cancellation at the moment at which what it waits for happens."""

    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        frontend = toys.frontend
        toys.engine(0).die()
        await turns(count)
        ending = asyncio.ensure_future(frontend.stop() if ends == "stop" else frontend.drain(frontend.replicas[0]))
        await asyncio.wait((ending,), timeout=5.0)
        assert ending.done()
        await frontend.stop()
        await asyncio.sleep(FIRST_SIGN)
        assert len(toys.engines) <= 3 and not toys.running

    run(main())


def test_a_cancelled_start_leaves_no_engine(run: Run) -> None:
    async def main() -> None:
        toys = Toys(2)
        links = [toys.connect(0), toys.connect(1)]
        links[1].load_seconds = 9.0
        starting = asyncio.ensure_future(toys.frontend.start(links))
        await until(lambda: links[0].is_ready)
        await turns()
        starting.cancel()
        await asyncio.wait((starting,))
        await asyncio.sleep(FIRST_SIGN)
        assert not toys.running

    run(main())


def test_stop_and_drain_end_calls(run: Run) -> None:
    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        calls = [asyncio.ensure_future(toys.frontend.engine_stats()) for _ in range(2)]
        await turns()
        await toys.frontend.drain(toys.frontend.replicas[0])
        await turns()
        await toys.frontend.stop()
        await asyncio.wait(calls, timeout=5.0)
        for call in calls:
            with pytest.raises(EngineDead):
                call.result()
        assert not toys.frontend._calls._waiting

    run(main())


@pytest.mark.parametrize("count", range(6))
def test_tokens_that_arrive_while_the_engine_is_stopped(run: Run, count: int) -> None:
    """They may be computed again, but not counted twice, and a request that they end is not sent again."""

    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        clients = [Client(toys, [1, 2, 3], max_tokens=2).submit(), Client(toys, [4, 5]).submit()]
        engine = toys.engine(0)
        engine.step()
        engine.holds_back = True
        engine.step()
        stopping = asyncio.ensure_future(toys.frontend.stop())
        await turns(count)
        engine.release()
        await stopping
        await toys.start()
        await toys.finish()
        assert all(client.is_right for client in clients)
        assert toys.frontend.replicas[0].load.completions == 0
        await toys.frontend.close()

    run(main())


def test_a_sink_that_aborts_another_request_when_its_own_fails(run: Run) -> None:
    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        poison, other = Client(toys, [POISON_ADD, 2]), Client(toys, [1, 2])
        poison.on_error = lambda: toys.frontend.abort([other.live])
        poison.submit()
        other.submit()
        for _ in range(2):
            await until(lambda: toys.running and toys.engine(0).is_ready)
            await turns()
            for _ in range(4):
                toys.engine(0).step()
            await asyncio.sleep(0.1)
        assert isinstance(poison.error, RequestFailed)
        await until(lambda: toys.running and toys.engine(0).is_ready)
        toys.engine(0).step()
        await asyncio.sleep(1.0)
        toys.engine(0).step()
        assert not toys.engine(0).sequences and not toys.frontend.placement.waiting
        assert len(toys.engines) == 1 + ENOUGH_FAULTS
        await toys.frontend.close()

    run(main())


def test_a_sink_that_aborts_its_sibling_when_its_own_cannot_be_sent(run: Run) -> None:
    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        prompts = [[UNSENDABLE], [1, 2, 3]]
        errors: list[Exception] = []

        def sink(live: LiveRequest, output: Any) -> None:
            if isinstance(output, Exception):
                errors.append(output)
                toys.frontend.abort(list(toys.frontend._ledger or ()))

        toys.frontend.submit([toy_request(prompt, SamplingParams()) for prompt in prompts], prompts, sink)
        await turns()
        toys.engine(0).step()
        assert [type(error) for error in errors] == [InvalidRequest]
        load = toys.frontend.replicas[0].load
        assert not toys.engine(0).sequences and not load.completions and not load.queued_tokens
        await toys.frontend.close()

    run(main())


def test_one_request_that_cannot_be_sent_among_those_that_wait(run: Run) -> None:
    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        await toys.frontend.stop()
        clients = [Client(toys, prompt).submit() for prompt in ([1, 2], [UNSENDABLE], [3], [UNSENDABLE, 1], [4])]
        await toys.start()
        await toys.finish()
        assert [client.is_right for client in clients] == [True, False, True, False, True]
        assert all(isinstance(client.error, InvalidRequest) for client in clients if not client.is_right)
        await toys.frontend.close()

    run(main())


def test_a_drain_waits_for_the_trial_of_a_suspect(run: Run) -> None:
    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        first, second = toys.frontend.replicas
        poison = Client(toys, [POISON_DECODE, 1, 2]).submit()
        assert poison.live.replica is first
        other = Client(toys, [1, 2, 3]).submit()
        assert other.live.replica is second
        toys.engine(first).step()
        toys.engine(first).step()  # dies, and the poison is a suspect
        await until(lambda: toys.engine(first).is_ready)
        await turns()
        assert first.readmission._trial is poison.live
        toys.engine(first).step()  # computes one token: the trial goes on
        assert poison.live.progress == 1
        draining = asyncio.ensure_future(toys.frontend.drain(first))
        await asyncio.sleep(0.1)
        assert poison.live.replica is first
        toys.engine(first).step()
        await asyncio.sleep(0.1)
        assert isinstance(poison.error, RequestFailed)
        await draining
        await toys.finish()
        assert other.is_right and sum(engine.fault is not None for engine in toys.engines) == 2
        await toys.frontend.close()

    run(main())


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_crash_while_all_replicas_are_drained_loses_no_request(run: Run, replicas: int) -> None:
    async def main() -> None:
        toys = Toys(replicas)
        await toys.start()
        clients = [Client(toys, [1, 2, number]).submit() for number in range(1, 5)]
        draining = [asyncio.ensure_future(toys.frontend.drain(each)) for each in toys.frontend.replicas]
        await turns()
        toys.engine(0).step()
        toys.engine(0).die()
        await asyncio.sleep(1.0)
        await toys.finish()
        assert all(client.is_right for client in clients)
        await asyncio.wait(draining)
        assert not toys.frontend.replicas and not toys.running

    run(main())


def test_an_engine_that_has_just_ended_gets_no_request(run: Run) -> None:
    """Otherwise the request is held responsible for the end, if it is not known what the engine did."""

    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        poison = Client(toys, [POISON_UNKNOWN]).submit()
        toys.engine(0).step()
        await turns()
        late = Client(toys, [1, 2, 3]).submit()
        await until(lambda: poison.live.crashes)
        assert late.live.crashes == 0
        await toys.finish()
        assert late.is_right and isinstance(poison.error, RequestFailed)
        await toys.frontend.close()

    run(main())


def test_an_engine_that_is_being_killed_gets_no_request(run: Run) -> None:
    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        hung = toys.engine(0)
        hung.hangs = True
        while not hung.is_ended:
            await asyncio.sleep(0.001)
        client = Client(toys, [1, 2]).submit()
        assert not hung.is_gone and client.live.replica is None
        await toys.finish()
        assert client.is_right and client.live.crashes == 0
        await toys.frontend.close()

    run(main())


def test_a_step_that_does_not_end(run: Run) -> None:
    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        clients = [Client(toys, [1, 2, number]).submit() for number in range(1, 5)]
        toys.engine(0).begin()
        toys.engine(0).is_stuck = True
        await toys.finish()
        assert all(client.is_right for client in clients) and toys.engines[0].is_gone
        await toys.frontend.close()

    run(main())


def test_a_drain_at_the_moment_of_a_crash_does_not_hide_its_cause(run: Run) -> None:
    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        first = toys.frontend.replicas[0]
        poison = Client(toys, [POISON_UNKNOWN]).submit()
        assert poison.live.replica is first
        toys.engine(first).step()
        await turns(1)
        draining = asyncio.ensure_future(toys.frontend.drain(first))
        await asyncio.sleep(0.1)
        assert poison.live.crashes == 1
        await toys.finish()
        await draining
        assert sum(engine.fault is not None for engine in toys.engines) == 2
        await toys.frontend.close()

    run(main())


def test_late_tokens_of_a_request_that_has_come_back(run: Run) -> None:
    """It moved to another replica and back, and then tokens from its first stay arrive."""

    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        first, second = toys.frontend.replicas
        toys.plans[1] = [{"load_seconds": 2.0}]
        toys.engine(second).die()
        await until(lambda: not second.is_ready)
        waiting = [Client(toys, [1, 2, number]).submit() for number in range(3, 6)]
        toys.engine(first).holds_back = True
        toys.engine(first).step()
        await until(lambda: second.is_open)
        quick = Client(toys, [5], max_tokens=2).submit()
        assert quick.live.replica is second
        toys.engine(second).step()
        (moved,) = (client for client in waiting if client.live.replica is second)
        toys.engine(second).die()
        await until(lambda: moved.live.replica is first)
        toys.engine(first).release()
        await toys.finish()
        assert all(client.is_right for client in [quick, *waiting])
        await toys.frontend.close()

    run(main())


def test_stop_waits_for_a_drain(run: Run) -> None:
    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        draining = [asyncio.ensure_future(toys.frontend.drain(toys.frontend.replicas[0])) for _ in range(2)]
        await asyncio.wait(draining, return_when=asyncio.FIRST_COMPLETED)
        assert toys.engines[0].is_gone
        draining.append(asyncio.ensure_future(toys.frontend.drain(toys.frontend.replicas[0])))
        await turns()
        await toys.frontend.stop()
        assert all(engine.is_gone for engine in toys.engines)
        await asyncio.wait(draining)

    run(main())


def test_suspects_do_not_wait_for_a_replica_that_does_not_come_back(run: Run) -> None:
    async def main() -> None:
        toys = Toys(2)
        await toys.start()
        first, second = toys.frontend.replicas
        clients = [Client(toys, [1, 2, number]).submit() for number in range(1, 5)]
        assert {client.live.replica for client in clients} == {first, second}
        toys.plans[0] = [{"refuses": True} for _ in range(1000)]
        toys.engine(first).begin()
        toys.engine(first).die("killed by SIGSEGV", is_fault=True)
        await toys.finish()
        assert all(client.is_right for client in clients) and not first.is_ready
        await toys.frontend.close()

    run(main())


def test_a_stop_while_the_next_engine_opens_files(run: Run, loop: VirtualLoop, tmp_path: Path) -> None:
    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        toys.frontend.states.adopt(tmp_path / "state", [1, 2, 3], "default", "")
        toys.engine(0).die()
        await until(lambda: len(toys.engines) == 2 and toys.engine(0).inbox)
        begun = loop.now
        await toys.frontend.stop()
        assert loop.now - begun < 1.0
        await turns()
        assert not toys.frontend._calls._waiting
        starting = asyncio.ensure_future(toys.start())
        await until(lambda: len(toys.engines) == 3 and toys.engines[-1].inbox)
        await toys.frontend.stop()
        await asyncio.wait((starting,))
        starting.exception()
        await asyncio.sleep(FIRST_SIGN)
        assert len(toys.engines) == 3 and not toys.running

    run(main())


def test_an_engine_that_ends_while_it_opens_files_is_replaced_at_once(
    run: Run, loop: VirtualLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        client = Client(toys, [1, 2, 3]).submit()
        state = toys.frontend.states.adopt(tmp_path / "state", [1, 2, 3], "default", "")
        toys.engine(0).die()
        await until(lambda: len(toys.engines) == 2 and toys.engine(0).inbox)
        toys.engine(0).die()
        begun = loop.now
        await until(lambda: len(toys.engines) == 3 and toys.engine(0).is_ready)
        assert loop.now - begun < 3.0
        assert client.live.crashes == 1  # of the first engine only
        assert state.file is None  # it may be what ended the engine
        await toys.finish()
        assert client.is_right
        await toys.frontend.close()

    run(main())


def test_a_state_is_kept_while_no_engine_is_ready(run: Run) -> None:
    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        client = Client(toys, [1, 2, 3]).submit()
        await toys.finish()
        toys.engine(0).die()
        await until(lambda: not toys.frontend.replicas[0].is_ready)
        state = toys.frontend.kv_states.keep(client.live.id, 0)
        assert state.num_tokens == 3 + len(client.tokens)
        await toys.frontend.close()

    run(main())


def test_crashes_caused_by_others_are_forgiven(run: Run) -> None:
    """A long request beside poisonous ones is not tried longer and longer, nor held responsible for a kill."""

    async def main() -> None:
        toys = Toys(1)
        await toys.start()
        long = Client(toys, [1, 2, 3], max_tokens=50).submit()
        for _ in range(3):
            poison = Client(toys, [POISON_PROMPT, 1]).submit()
            while poison.error is None:
                for engine in toys.running:
                    engine.step()
                await asyncio.sleep(0.05)
        assert long.live.crashes < 3
        await toys.finish()
        assert long.is_right
        await toys.frontend.close()

    run(main())
