"""Pooled requests: embeddings of prompts, and their conversion from the engine's vectors."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from octavo.engine.messages import EngineInfo, Pooling
from octavo.errors import InvalidRequest
from octavo.outputs import EmbeddingOutput, EmbeddingRequestOutput, PoolingOutput, PoolingRequestOutput, RequestOutput
from octavo.params import PoolingParams, SamplingParams, Terms

from .requests import Prompt, Request, make_requests

TASKS = ("embed",)


def pooled_requests(
    prompts: Prompt | Sequence[Prompt],
    pooling: Pooling,
    priority: int | Sequence[int] = 0,
    terms: Terms | None = None,
    truncate: int | None = None,
) -> list[Request]:
    """Make a pooled request of each prompt. Raises InvalidRequest.

    Args:
        truncate: see PoolingParams.truncate_prompt_tokens.
    """
    params = SamplingParams(max_tokens=0, temperature=0.0, detokenize=False, truncate_prompt_tokens=truncate)
    requests = make_requests(prompts, params, params, priority, terms or {})
    return [dataclasses.replace(request, pooling=pooling) for request in requests]


def embedding_requests(
    prompts: Prompt | Sequence[Prompt],
    params: PoolingParams,
    info: EngineInfo,
    priority: int | Sequence[int] = 0,
    terms: Terms | None = None,
) -> list[Request]:
    """Make a request for the embedding of each prompt. Raises InvalidRequest."""
    if not isinstance(params, PoolingParams):
        raise InvalidRequest(f"pooling_params must be PoolingParams, not {type(params).__name__}", "pooling_params")
    if params.dimensions is not None and params.dimensions > info.hidden_size:
        message = f"dimensions must be at most {info.hidden_size}, the model's hidden size, not {params.dimensions}"
        raise InvalidRequest(message, "dimensions")
    return pooled_requests(prompts, Pooling(params.pooling), priority, terms, params.truncate_prompt_tokens)


def check_task(task: str | None) -> None:
    """Raise InvalidRequest for a `pooling_task` of vLLM's `encode` that is not supported."""
    if task is not None and task not in TASKS:
        raise InvalidRequest(f"pooling_task must be {' or '.join(TASKS)}, not {task!r}", "pooling_task")


def vector_of(output: RequestOutput) -> np.ndarray:
    """Return the vector that the engine has computed for a pooled request: float32 [hidden] or [labels]."""
    assert output.pooled is not None
    return np.frombuffer(output.pooled, np.float32)


def embedding_of(output: RequestOutput, params: PoolingParams) -> np.ndarray:
    """Return the embedding of a prompt, float32 [dimensions].

    If the first `dimensions` elements are all zero, they cannot be normalized and stay zero.
    """
    vector = vector_of(output)[: params.dimensions].astype(np.float64)
    if params.normalize:
        vector /= np.sqrt(np.square(vector).sum()) or 1.0
    return vector.astype(np.float32)


def pooling_output(output: RequestOutput, params: PoolingParams) -> PoolingRequestOutput[PoolingOutput]:
    """Return the output of `encode` for a prompt."""
    pooled = PoolingOutput(embedding_of(output, params))
    return PoolingRequestOutput(output.request_id, pooled, output.prompt_token_ids, output.num_cached_tokens)


def embedding_output(output: RequestOutput, params: PoolingParams) -> EmbeddingRequestOutput:
    """Return the output of `embed` for a prompt."""
    pooled = EmbeddingOutput(embedding_of(output, params).tolist())
    return PoolingRequestOutput(output.request_id, pooled, output.prompt_token_ids, output.num_cached_tokens)
