"""Replicas of engines that others run: what a frontend does if one does not fit, or is gone for a while."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.engine.messages import EngineInfo
from octavo.frontend.frontend import Frontend
from octavo.frontend.links.messages import Ready
from octavo.frontend.replica import Replica
from octavo.params import SamplingParams
from toy_engine import MAX_MODEL_LEN, NUM_PAGES, PAGE_SIZE, VOCAB_SIZE, ToyEngine, Toys, toy_request, toy_token
from virtual_time import check_no_task_is_left, virtual_loop

PARAMS = SamplingParams(max_tokens=12, seed=7, ignore_eos=True)


class RemoteToy(ToyEngine):
    """A toy engine that others run.

    Args:
        vocab_size: of its model.
    """

    is_remote = True

    def __init__(self, number: int, vocab_size: int = VOCAB_SIZE, **plan: Any):
        super().__init__(number, **plan)
        self.vocab_size = vocab_size

    def _load(self) -> None:
        self.is_ready = True
        self._deliver(Ready(EngineInfo(MAX_MODEL_LEN, self.vocab_size, NUM_PAGES, PAGE_SIZE, self.fingerprint)))


class RemoteToys(Toys):
    """A frontend over toy engines that others run; each replica's next engines follow a plan of its own."""

    def join(self, *plans: dict[str, Any]) -> Replica:
        number, left = len(self.frontend.replicas), list(plans)

        def connect(replica: Replica) -> RemoteToy:
            engine = RemoteToy(number, **(left.pop(0) if left else {}))
            self.engines.append(engine)
            return engine

        return self.frontend.add_remote(connect, f"engine {number}", max_pause=1.0)

    async def ready(self, replica: Replica) -> None:
        async with asyncio.timeout(100):
            while not replica.is_ready:
                await asyncio.sleep(0.01)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with virtual_loop() as loop:
        yield loop
        check_no_task_is_left(loop)


def test_a_first_engine_without_all_tokens_is_not_used(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        toys = RemoteToys()
        replica = toys.join({"vocab_size": VOCAB_SIZE - 1})
        await toys.ready(replica)
        assert toys.frontend.info.vocab_size == VOCAB_SIZE and len(toys.engines) == 2
        await toys.frontend.close()

    loop.run_until_complete(main())
    assert "the tokenizer does not fit the model" in caplog.text


def test_requests_of_an_engine_that_is_drained_while_it_loads_go_on_elsewhere(loop: asyncio.AbstractEventLoop) -> None:
    """Suspects of its crash too, which would otherwise wait for it without end."""

    async def main() -> None:
        toys = RemoteToys()
        first = toys.join({}, {"load_seconds": 1e6})
        await toys.ready(first)
        prompt, tokens = [1, 2, 3], list[int]()
        frontend = toys.frontend
        (live,) = frontend.submit(
            [toy_request(prompt, PARAMS)], [prompt], lambda _, output: tokens.extend(output.outputs[0].token_ids)
        )
        toys.engine(first).begin()
        toys.engine(first).die("killed by SIGSEGV", is_fault=True)
        second = toys.join()
        await toys.ready(second)
        assert live.replica is first and not first.is_ready
        await asyncio.wait_for(frontend.drain(first), 10)
        assert live.replica is second and frontend.replicas == [second]
        await toys.finish()
        assert tokens == [toy_token(prompt, 7, position) for position in range(12)]
        await frontend.close()

    loop.run_until_complete(main())


def test_an_address_of_kv_events_that_is_taken_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """The engine is tried again, and serves as soon as the address is free."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            toys = RemoteToys()
            config = EngineConfig(kv_events=f"tcp://127.0.0.1:{taken.getsockname()[1]}")
            toys.frontend = Frontend(config, toys.tokenizer, toys.connect, has_queue_limit=True)
            replica = toys.join(*[{"load_seconds": 0.0}] * 20)
            async with asyncio.timeout(20):
                while "kv_events: cannot listen on" not in caplog.text:
                    await asyncio.sleep(0.01)
            assert not replica.is_ready
        await asyncio.wait_for(toys.ready(replica), 20)
        assert toys.frontend._events is not None
        await toys.frontend.close()

    asyncio.run(main())
