"""What sampling reads and writes on the device."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from octavo.backends.base import StepResult


@dataclass(frozen=True)
class DeviceSampling:
    """The arrays of a SamplingBatch on the device. Integers of 64 bits are pairs of int32, low half first."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    num_logprobs: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    history: Tensor
    history_start: Tensor
    history_outputs: Tensor
    bias_tokens: Tensor
    bias_values: Tensor
    bias_start: Tensor
    masks: Tensor
    mask_start: Tensor


@dataclass(frozen=True)
class Sampled:
    """The device's part of a StepResult, packed in one int32 tensor of R * (3 + 2 K) words.

    In this order: tokens [R], logprobs [R], ranks [R], top_tokens [R, K], top_logprobs [R, K]; the likeliest tokens of
    a row are in order of token id. The logprobs are the bits of float32 values.
    """

    words: Tensor
    rows: int
    columns: int
    wants_logprobs: bool

    def result(self, words: np.ndarray) -> StepResult:
        """Return the StepResult of `words`, which are this tensor's on the host."""
        rows, columns = self.rows, self.columns
        tokens, logprobs, ranks = words[: 3 * rows].reshape(3, rows)
        if not self.wants_logprobs:
            return StepResult(tokens.copy())
        top_tokens, top_logprobs = words[3 * rows :].reshape(2, rows, columns)
        values = top_logprobs.view(np.float32)
        order = np.lexsort((top_tokens, -values)) if columns else np.zeros((rows, 0), np.int64)  # NaN comes last
        return StepResult(
            tokens.copy(),
            logprobs.view(np.float32).copy(),
            ranks.copy(),
            np.take_along_axis(top_tokens, order, axis=1),
            np.take_along_axis(values, order, axis=1),
        )
