"""The part of a model that one rank of several computes: which rows and columns of each weight it has."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from octavo.config import RANKS
from octavo.errors import ConfigError
from octavo.weights.tensor import Parameter

from .registry import parameter_shapes
from .spans import span_ends
from .spec import DecoderSpec

_OUTPUTS = 16  # rows are divided in multiples of this
_OUT, _DOWN = "layers.0.out", "layers.0.down"


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size` of the model `whole`, whose size must be one of `sizes_for(whole)`.

    A rank has some rows of the embedding and of the head, and as many neighboring spans of the columns of `down`
    (spans.py) as any other, with the rows of gate and up from which they come. If heads can be divided, it has some
    heads and their columns of `out`, and the heads of keys and values that they need, which are copied where there are
    fewer than ranks. If not, it has some rows of qkv and of `out`, and the keys and values of all heads; then each rank
    computes the attention of some rows of a step.
    """

    whole: DecoderSpec
    rank: int = 0
    size: int = 1

    @property
    def spec(self) -> DecoderSpec:
        """Return the sizes of this rank."""
        whole, kv_heads = self.whole, self.kv_heads
        return replace(
            whole,
            num_heads=len(self._heads),
            num_kv_heads=len(kv_heads),
            intermediate_size=len(self._ffn),
            ranks=self.size,
            whole_attention=not divides_heads(whole, self.size),
        )

    def parameters(self, parameters: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
        """Return this rank's part of each parameter. Nothing is read."""
        if self.size == 1:
            return parameters
        return {name: self._part(name, parameter) for name, parameter in parameters.items()}

    def outputs(self, weight: str) -> tuple[int, int]:
        """Return where the rows of this rank begin among the rows of a weight in all ranks, and the number of these."""
        rows = sum(part[0] for part in parameter_shapes(self.whole)[weight])
        kind = weight.rpartition(".")[2]
        return {"embed": self._vocab, "head": self._vocab, "qkv": self._qkv}.get(kind, self._hidden).start, rows

    def ends(self, weight: str, nodes: int) -> list[int]:
        """Return the end of each node's rows of a weight, if the ranks are on several nodes (machines); else []."""
        starts = [replace(self, rank=node * self.size // nodes).outputs(weight) for node in range(1, nodes)]
        return [*(start for start, _ in starts), starts[0][1]] if starts else []

    def spans(self, weight: str) -> tuple[int, ...]:
        """Return the ends of the spans of this rank's columns of a weight; () for a single span."""
        ends = span_ends(self.whole, weight)
        if self.size == 1 or not ends or (weight.endswith(".out") and not divides_heads(self.whole, self.size)):
            return ends
        own = self._columns(weight)
        return tuple(end - own.start for end in ends if own.start < end <= own.stop)

    @property
    def _heads(self) -> range:
        heads = self.whole.num_heads
        if not divides_heads(self.whole, self.size):
            return range(heads)
        own = self._columns(_OUT)
        return range(own.start // self.whole.head_dim, own.stop // self.whole.head_dim)

    @property
    def kv_heads(self) -> range:
        """Return the heads of keys and values that this rank has."""
        heads = self._heads
        group = self.whole.num_heads // self.whole.num_kv_heads
        return range(heads.start // group, -(-heads.stop // group))

    @property
    def _ffn(self) -> range:
        return self._columns(_DOWN)

    def _columns(self, weight: str) -> range:
        """Return this rank's columns of `out` or `down`: its share of the spans."""
        ends = (0, *(span_ends(self.whole, weight) or (self.whole.intermediate_size,)))
        count = (len(ends) - 1) // self.size
        return range(ends[self.rank * count], ends[(self.rank + 1) * count])

    @property
    def _vocab(self) -> range:
        return self._rows(self.whole.vocab_size)

    @property
    def _hidden(self) -> range:
        return self._rows(self.whole.hidden_size)

    @property
    def _qkv(self) -> range:
        return self._rows(self.whole.qkv_size)

    def _rows(self, rows: int) -> range:
        """Return this rank's share of some rows."""
        units = -(-rows // _OUTPUTS)
        start, stop = (min(rows, units * rank // self.size * _OUTPUTS) for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def _part(self, name: str, parameter: Parameter) -> Parameter:
        """Return this rank's part of the parameter `name`, such as layers.0.qkv or layers.0.qkv.bias."""
        weight = name.removesuffix(".bias")
        kind, is_bias = weight.rpartition(".")[2], weight != name
        cuts_heads = divides_heads(self.whole, self.size)
        if kind in ("embed", "head"):
            return parameter.take_rows(self._vocab)
        if kind == "gate_up":
            return parameter.take_rows(self._ffn, _moved(self._ffn, self.whole.intermediate_size))
        if kind == "qkv":
            return parameter.take_rows(*self._rows_of_heads() if cuts_heads else [self._qkv])
        if kind == "out" and not cuts_heads:
            return parameter.take_rows(self._hidden)
        if kind == "out" and not is_bias:
            return parameter.take_columns(_times(self._heads, self.whole.head_dim))
        if kind == "down" and not is_bias:
            return parameter.take_columns(self._ffn)
        return parameter

    def _rows_of_heads(self) -> list[range]:
        """Return the rows of qkv for this rank's heads: those of queries, keys and values."""
        queries, keys = (_times(heads, self.whole.head_dim) for heads in (self._heads, self.kv_heads))
        keys = _moved(keys, self.whole.q_size)
        return [queries, keys, _moved(keys, self.whole.kv_size)]


def divides_heads(spec: DecoderSpec, size: int) -> bool:
    """Return whether each of `size` ranks can have as many spans of `out`, and whole heads of keys and values."""
    kv_heads, spans = spec.num_kv_heads, len(span_ends(spec, _OUT))
    return size == 1 or (spans % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0))


def sizes_for(spec: DecoderSpec) -> list[int]:
    """Return the numbers of ranks over which a model can be divided, so that each has a part of everything."""
    return [size for size in RANKS if size == 1 or _divides(spec, size)]


def check_size(spec: DecoderSpec, size: int) -> None:
    """Raise ConfigError if a model cannot be divided over `size` ranks."""
    if size not in (sizes := sizes_for(spec)):
        raise ConfigError(
            f"tensor_parallel_size must be {' or '.join(map(str, sizes))} for this model, not {size}: its layers are "
            "too small to be divided further"
        )


def _divides(spec: DecoderSpec, size: int) -> bool:
    widths = [spec.vocab_size] if divides_heads(spec, size) else [spec.vocab_size, spec.hidden_size, spec.qkv_size]
    return len(span_ends(spec, _DOWN)) % size == 0 and all(width >= size * _OUTPUTS for width in widths)


def _times(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _moved(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)
