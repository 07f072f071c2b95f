"""Micro-batching: collect requests for up to 5 ms and generate for all of them in one call.

Octavo needs no such queue, since a request joins the next step by itself; a program that has one runs unchanged.
Run: python examples/micro_batching.py [BATCHES]; without a number it runs until Ctrl-C.
"""

import asyncio
import itertools
import sys

from octavo import LLM, SamplingParams

llm = LLM(model="smollm2", tensor_parallel_size=1)
sampling_params = SamplingParams(temperature=0.8, max_tokens=128)
request_queue: asyncio.Queue[str] = asyncio.Queue()


async def producer() -> None:
    while True:
        # Simulate incoming HTTP requests
        await request_queue.put("Write a haiku about sunrise.")
        await asyncio.sleep(0.01)  # 100 req/s


async def consumer(batches: int | None) -> None:
    answered = itertools.count() if batches is None else iter(range(batches))
    while True:
        batch = []
        try:
            # Collect up to 32 prompts or wait 5 ms
            for _ in range(32):
                prompt = await asyncio.wait_for(request_queue.get(), timeout=0.005)
                batch.append(prompt)
        except TimeoutError:
            pass
        if batch:
            if next(answered, None) is None:
                return
            outputs = await llm.agenerate(batch, sampling_params)
            for out in outputs:
                print(out.text)


async def main(batches: int | None) -> None:
    producing = asyncio.create_task(producer())
    await consumer(batches)
    producing.cancel()


asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else None))
