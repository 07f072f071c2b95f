"""A custom scheduling policy: requests of premium tenants go first, yet every request is served in the end.

Use it in a server: octavo serve smollm2 --scheduling-policy examples.premium_first:PremiumFirst
(from the folder above this one, or with that folder in PYTHONPATH). Or run it here: python examples/premium_first.py
"""

from octavo.engine.policies import Policy
from octavo.engine.sequence import Sequence

PREMIUM = {"acme", "globex"}
HEAD_START = 30.0  # seconds: a premium request goes before others that arrived up to so much earlier


class PremiumFirst(Policy):
    """The request with the lowest rank is served next. Ranks contain the arrival time, so that waiting counts."""

    def rank(self, seq: Sequence) -> float:
        return seq.arrival - (HEAD_START if seq.tenant in PREMIUM else 0.0)


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
