"""A policy of one's own: requests of premium tenants go first, yet nobody waits for ever.

Serve with it: octavo serve smollm2 --scheduling-policy examples.premium_first:PremiumFirst
(run from the folder above this one, or with that in PYTHONPATH). Or see it at work: python examples/premium_first.py
"""

from octavo.engine.messages import EngineRequest
from octavo.engine.policies import Policy

PREMIUM = {"acme", "globex"}
HEAD_START = 30.0  # seconds that a premium request is ahead of others: who has waited that long goes before it


class PremiumFirst(Policy):
    """The lowest rank is served next. It is in seconds and contains the arrival, so waiting makes up for it."""

    def rank(self, request: EngineRequest) -> float:
        return request.arrival - (HEAD_START if request.tenant in PREMIUM else 0.0)


if __name__ == "__main__":
    import asyncio

    from octavo import LLM, SamplingParams

    async def ask(llm: LLM, tenant: str) -> None:
        await llm.agenerate("Once upon a time", SamplingParams(max_tokens=32), tenant=tenant)
        print(f"{tenant} is served")

    async def main() -> None:
        llm = LLM("smollm2", max_batch_size=1, scheduling_policy=f"{__name__}:PremiumFirst")
        await asyncio.gather(*(ask(llm, tenant) for tenant in ("trial 1", "trial 2", "trial 3", "acme")))

    asyncio.run(main())
