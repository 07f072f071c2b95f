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
    from .frontend.requests import TextPrompt, TokensPrompt
    from .frontend.scoring import ScoringParams
    from .llm import LLM
    from .outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingRequestOutput,
        RequestMetrics,
        RequestOutput,
        ScoringRequestOutput,
    )
    from .params import (
        BeamSearchParams,
        PoolingParams,
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        ServiceTerms,
        StructuredOutputs,
    )
    from .states import KVState

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "EngineConfig": "config",
    "PoolingParams": "params",
    "ScoringParams": "frontend.scoring",
    "SamplingParams": "params",
    "BeamSearchParams": "params",
    "RepetitionDetectionParams": "params",
    "RequestOutputKind": "params",
    "ServiceTerms": "params",
    "StructuredOutputs": "params",
    "RequestOutput": "outputs",
    "TextPrompt": "frontend.requests",
    "TokensPrompt": "frontend.requests",
    "BeamSearchOutput": "outputs",
    "BeamSearchSequence": "outputs",
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
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "KVState",
    "Logprob",
    "PoolingParams",
    "PoolingRequestOutput",
    "RepetitionDetectionParams",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringParams",
    "ScoringRequestOutput",
    "ServiceTerms",
    "StructuredOutputs",
    "TextPrompt",
    "TokensPrompt",
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
