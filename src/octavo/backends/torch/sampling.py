"""Sampling row by row in numpy: the plain implementation of what SamplingBatch describes.

It draws as the native sampler (csrc/kernels/sampler.cpp) does: among the tokens left after truncation, in order of
token id, the first whose cumulative weight exceeds u times the total. So both pick the same token, up to rounding.
"""

import numpy as np

from octavo.backends.base import SamplingBatch, StepResult


def sample(logits: np.ndarray, sampling: SamplingBatch) -> StepResult:
    """Sample the next token of each row of raw logits, float32 [R, vocab].

    A row from which no token can be drawn (NaN, +inf, all banned) gets -1.
    """
    num_rows, vocab = logits.shape
    tokens = np.empty(num_rows, np.int32)
    for r in range(num_rows):
        tokens[r] = _next_token(logits[r].astype(np.float64), sampling, r)
    if num_rows == 0 or sampling.num_logprobs.max() < 0:
        return StepResult(tokens)

    logprobs = np.full(num_rows, np.nan, np.float32)
    ranks = np.zeros(num_rows, np.int32)
    columns = min(int(sampling.num_logprobs.max()), vocab)
    top_tokens = np.full((num_rows, columns), -1, np.int32)
    top_logprobs = np.full((num_rows, columns), np.nan, np.float32)
    for r, (token, wanted) in enumerate(zip(tokens, sampling.num_logprobs, strict=True)):
        if wanted < 0 or token < 0:
            continue
        of_all = _log_softmax(logits[r].astype(np.float64))
        likeliest = np.argsort(-logits[r], kind="stable")  # ties in order of token id
        logprobs[r], ranks[r] = of_all[token], 1 + np.flatnonzero(likeliest == token)[0]
        top_tokens[r, :wanted] = likeliest[:wanted]
        top_logprobs[r, :wanted] = of_all[likeliest[:wanted]]
    return StepResult(tokens, logprobs, ranks, top_tokens, top_logprobs)


def _next_token(x: np.ndarray, sampling: SamplingBatch, r: int) -> int:
    _adjust(x, sampling, r)
    if not np.all(x < np.inf) or not np.any(x > -np.inf):
        return -1
    temperature = float(sampling.temperature[r])
    if temperature == 0:
        return int(np.argmax(x))
    weights = np.exp((x - x.max()) / temperature)
    order = np.argsort(-x, kind="stable")  # likeliest first
    if 0 < (top_k := int(sampling.top_k[r])) < len(x):
        weights[order[top_k:]] = 0
    if (top_p := float(sampling.top_p[r])) < 1:
        before = np.cumsum(weights[order]) - weights[order]  # weight of all more likely tokens
        weights[order[before >= top_p * weights.sum()]] = 0
    weights[weights < float(sampling.min_p[r])] = 0  # the largest weight is 1
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, _uniform(sampling, r) * cumulative[-1], side="right"))


def _adjust(x: np.ndarray, sampling: SamplingBatch, r: int) -> None:
    """Add biases and bans to one row of logits, then apply vLLM's penalties and the mask, in place."""
    bias = slice(sampling.bias_start[r], sampling.bias_start[r + 1])
    np.add.at(x, sampling.bias_tokens[bias], sampling.bias_values[bias])
    history = sampling.history[sampling.history_start[r] : sampling.history_start[r + 1]]
    seen = np.unique(history)
    repetition = float(sampling.repetition[r])
    x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
    outputs, counts = np.unique(history[len(history) - sampling.history_outputs[r] :], return_counts=True)
    x[outputs] -= float(sampling.frequency[r]) * counts + float(sampling.presence[r])
    words = sampling.masks[sampling.mask_start[r] : sampling.mask_start[r + 1]]
    if len(words):
        allowed = np.zeros(len(x), bool)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(x)]
        allowed[: len(bits)] = bits
        x[~allowed & (x < np.inf)] = -np.inf  # NaN and +inf stay, so that the row still fails


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    logprobs: np.ndarray = x - np.log(np.exp(x).sum())
    return logprobs


def _uniform(sampling: SamplingBatch, r: int) -> float:
    """Return the random number in [0, 1), of 53 bits, for output `positions[r]` of a request with seed `seeds[r]`."""
    seed, position = int(sampling.seeds[r]), int(sampling.positions[r]) % 2**64
    random = philox4x32((position % 2**32, position >> 32, 0, 0), (seed % 2**32, seed >> 32))
    return float(((random[1] << 32 | random[0]) >> 11) * 2.0**-53)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return four random 32-bit words of Philox4x32-10 (Salmon et al., Parallel Random Numbers, 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3
