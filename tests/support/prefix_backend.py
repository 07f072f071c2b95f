"""A backend whose K and V of a token say which tokens came before it: whoever reads a wrong page gives wrong tokens."""

from types import SimpleNamespace

import numpy as np

from octavo.backends.base import ComputesAtOnce, StepBatch, StepResult

VOCAB = 3


def after(state: int, token: int) -> int:
    """The "K and V" of a token that comes after one with those of `state`; 0 before the first."""
    return (state * 6364136223846793005 + token * 1442695040888963407 + 1) % 2**63


def complete(prompt: list[int], max_tokens: int) -> list[int]:
    """The output that is right for a prompt, computed by itself."""
    state = 0
    for token in prompt:
        state = after(state, token)
    output = []
    for _ in range(max_tokens):
        output.append((state >> 32) % VOCAB)
        state = after(state, output[-1])
    return output


class PrefixBackend(ComputesAtOnce):
    """A Backend (see octavo.backends.base) of this model; pages hold an int64 for each token."""

    spec = SimpleNamespace(vocab_size=VOCAB, hidden_size=0)

    def __init__(self, num_pages: int, page_size: int):
        self.page_size, self.page_bytes = page_size, page_size * 8
        self.memory = np.full((num_pages, page_size), -1, np.int64)
        self.steps = 0

    def step(self, batch: StepBatch) -> StepResult:
        self.steps += 1
        return StepResult(((self.write(batch)[batch.sample_rows] >> 32) % VOCAB).astype(np.int32))

    def write(self, batch: StepBatch) -> np.ndarray:
        """Write the K and V of a step's tokens, and return them."""
        states = np.zeros(len(batch.tokens), np.int64)
        for s in range(len(batch.query_start) - 1):
            for row in range(batch.query_start[s], batch.query_start[s + 1]):
                position = int(batch.positions[row])
                state = self._at(batch, s, position - 1) if position else 0
                states[row] = after(state, int(batch.tokens[row]))
                page = batch.page_tables[s, position // self.page_size]
                self.memory[page, position % self.page_size] = states[row]
        return states

    def _at(self, batch: StepBatch, sequence: int, position: int) -> int:
        page = batch.page_tables[sequence, position // self.page_size]
        return int(self.memory[page, position % self.page_size])

    def export_page(self, page: int) -> np.ndarray:
        return self.memory[page].view(np.uint8)

    def import_page(self, page: int, content: np.ndarray) -> None:
        self.memory[page] = content.view(np.int64)

    def copy_page(self, source: int, target: int) -> None:
        self.memory[target] = self.memory[source]

    def close(self) -> None:
        pass
