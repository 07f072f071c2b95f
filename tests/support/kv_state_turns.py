"""A conversation's first turn on a tiny model, and the state of it."""

from pathlib import Path
from typing import Any

from octavo import LLM, KVState, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
QUESTION = "User: How do modules, classes and functions differ in what they define?\nAssistant:"


def small_llm(model: Path, pages: int, **settings: Any) -> LLM:
    with LLM(str(model), kv_cache_memory="1MiB") as measuring:
        page_bytes = measuring._frontend.replicas[0].link.engine.backend.page_bytes
    return LLM(str(model), kv_cache_memory=pages * page_bytes, **settings)


def first_turn(llm: LLM, prompt: str = QUESTION, **terms: Any) -> KVState:
    return llm.get_kv_cache_state(llm.generate(prompt, GREEDY, **terms)[0].request_id)
