"""A meter that is set while requests run."""

import asyncio

from octavo.frontend.live import LiveRequest
from octavo.frontend.meter import INTER_TOKEN, Meter
from octavo.params import SamplingParams
from toy_engine import Toys, toy_request
from virtual_time import virtual_loop

RUNNING, WAITING = [1, 2, 3], [4, 5, 6, 7]  # prompts
PARAMS = SamplingParams(max_tokens=12, seed=7, ignore_eos=True)


async def begin_to_measure() -> None:
    toys, meter = Toys(), Meter()
    await toys.start()

    def submit(prompt: list[int]) -> LiveRequest:
        (live,) = toys.frontend.submit([toy_request(prompt, PARAMS)], [prompt], lambda *_: None)
        return live

    live = submit(RUNNING)
    while live.num_tokens < 5:
        toys.engine(0).step()
        await asyncio.sleep(0.05)
    submit(WAITING)
    before = live.num_tokens
    toys.frontend.set_meter(meter)
    await asyncio.sleep(0.05)
    await toys.finish()
    engine = meter.engines[0]
    counts = engine.tenants[""]
    assert counts.requests == counts.finished["length"] == 2
    assert counts.generated_tokens == (12 - before) + 12
    assert counts.prompt_tokens == len(WAITING) and sum(counts.first_token.counts) == 1
    assert sum(engine.histograms[INTER_TOKEN].counts) == (12 - before) + 11
    await toys.frontend.close()


def test_what_a_request_had_got_before_is_not_counted() -> None:
    with virtual_loop() as loop:
        loop.run_until_complete(begin_to_measure())
