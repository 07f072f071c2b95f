"""The importance of each input of a linear layer, measured before its weights are rounded to 4 bits.

An error e[j, k] in a weight changes output j by e[j, k] * x[k], so errors should be smallest where inputs x[k] are
large: importance[k] = mean(x[k]^2). llama.cpp calls this the importance matrix and measures it on text. Random tokens
do nearly as well, and suit any vocabulary and language: docs/quantization.md has the figures.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from octavo.backends.base import SamplingBatch, StepBatch
from octavo.errors import DamagedWeights
from octavo.model.decoder import describe_layer, needs_8_bits
from octavo.model.shard import Shard
from octavo.model.spec import DecoderSpec
from octavo.weights.tensor import Parameter, bfloat16_tensor, require_finite

from ._native import encoding_for
from .program import Place, choose_isa, new_program, pack
from .recorder import Recorder

_SEQUENCES, _LENGTH = 2, 256  # of random tokens
_PAGE_SIZE = 32


def measure_importances(
    spec: DecoderSpec,
    parameters: Mapping[str, Parameter],
    threads: int,
    rank: int = 0,
    ranks: int = 1,
    place: Place = Place(),  # noqa: B008 (immutable)
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the importances, float32 [columns], of each weight of each layer but the last.

    Yields nothing if no weight is to be rounded to 4 bits. Results are the same in every run with the same instruction
    set, and for any number of ranks, each of which gets those of its own columns. Only one layer at a time is in
    memory, in bfloat16. Raises ConfigError or UnsupportedModel.

    Args:
        parameters: those of the whole model.
        rank, ranks: the number of this process among those that do this together.
        place: where it runs.
    """
    if not any(_is_rounded(spec, name, parameter) for name, parameter in parameters.items()):
        return
    tokens = random_tokens(spec)
    embed = parameters["embed"].parts[0]
    x = np.concatenate([embed.float32(token, token + 1) for token in tokens.ravel().tolist()])
    require_finite(embed.name, x)
    # The input of each layer is an embedding in which token r is row r.
    shard = Shard(dataclasses.replace(spec, vocab_size=len(x)), rank, ranks)
    processors = place.of_threads(threads)
    for i in range(spec.num_layers - 1):  # the last one keeps 8 bits
        squares, x = _run_layer(shard, i, parameters, x, tokens.shape[1], processors, place)
        if not np.isfinite(x).all():
            raise DamagedWeights(f"layer {i} computes values that are NaN or infinite; download the model again")
        for name, sums in squares.items():
            yield name, (sums / len(x)).astype(np.float32)


def random_tokens(spec: DecoderSpec) -> np.ndarray:
    """Return tokens that depend only on the vocabulary size and the context length: uint64 [sequences, tokens]."""
    length = min(_LENGTH, spec.max_positions)
    raw = np.random.Philox(0).random_raw(_SEQUENCES * length)
    return (raw % np.uint64(spec.vocab_size)).reshape(_SEQUENCES, length)


def _is_rounded(spec: DecoderSpec, name: str, parameter: Parameter) -> bool:
    """Return whether quantization 4bit rounds this weight to 4 bits."""
    if len(parameter.shape) == 1 or needs_8_bits(spec, name):
        return False
    return encoding_for([part.format for part in parameter.parts]).bits > 4


class _Observer(Recorder):
    """Records the ops of a layer, and an op `observe` for the input of each linear."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.observed: dict[str, int] = {}  # weight: handle

    def linear(self, x: int, weight: str, bias: bool = False, residual: int | None = None) -> int:
        self.observed[weight] = self._program.observe(x)
        return super().linear(x, weight, bias, residual)


def _run_layer(
    shard: Shard,
    i: int,
    parameters: Mapping[str, Parameter],
    x: np.ndarray,
    length: int,
    processors: Sequence[Sequence[int]],
    place: Place,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run layer `i` on `x`, the residual stream of sequences of `length` tokens each: float32 [rows, hidden].

    Returns the sum over rows of the square of each input, by linear, and the residual stream after the layer.
    """
    own = shard.parameters({**parameters, "embed": Parameter((bfloat16_tensor("embed", x),))})
    program = new_program(
        shard, choose_isa(), processors, page_size=_PAGE_SIZE, max_rows=length, max_sampled=length,
        group=place.calibration, lines=place.lines,
    )  # fmt: skip
    recorder = _Observer(shard, program, own, "none")
    program.finish(recorder.sampled_rows(describe_layer(shard.spec, i, recorder, recorder.embed("embed"))))
    for name, handle in recorder.weights.items():
        pack(program, handle, own[name])
    program.allocate_kv(-(-length // _PAGE_SIZE))
    x = np.concatenate([program.logits(_sequence(start, length)) for start in range(0, len(x), length)])
    return {name: program.squares(handle) for name, handle in recorder.observed.items()}, x


def _sequence(first: int, length: int) -> StepBatch:
    """Return a step of tokens first, first + 1 ... as one sequence, with the logits of all of them."""
    rows = np.arange(length, dtype=np.int32)
    return StepBatch(
        tokens=first + rows,
        positions=rows,
        query_start=np.array([0, length], np.int32),
        page_tables=np.arange(-(-length // _PAGE_SIZE), dtype=np.int32)[None],
        sample_rows=rows,
        sampling=SamplingBatch.greedy(length),
    )
