"""Octavo: high-throughput LLM serving. Same request, same tokens, every time.

from octavo import LLM, SamplingParams
llm = LLM("smollm2")
print(llm.generate("The capital of France is", SamplingParams(temperature=0))[0].text)
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .async_llm import AsyncLLM
    from .config import EngineConfig
    from .frontend.scoring import ScoringParams
    from .llm import LLM
    from .outputs import (
        CompletionOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingRequestOutput,
        RequestMetrics,
        RequestOutput,
        ScoringRequestOutput,
    )
    from .params import PoolingParams, SamplingParams, ServiceTerms, StructuredOutputs
    from .states import KVState

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "EngineConfig": "config",
    "PoolingParams": "params",
    "ScoringParams": "frontend.scoring",
    "SamplingParams": "params",
    "ServiceTerms": "params",
    "StructuredOutputs": "params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "RequestMetrics": "outputs",
    "Logprob": "outputs",
    "EmbeddingRequestOutput": "outputs",
    "PoolingRequestOutput": "outputs",
    "ScoringRequestOutput": "outputs",
    "KVState": "states",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "KVState",
    "Logprob",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoringParams",
    "ScoringRequestOutput",
    "ServiceTerms",
    "StructuredOutputs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import names on first use, so that `import octavo` is fast."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
