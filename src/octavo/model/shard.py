"""The part of a model that one rank of several computes: which rows and columns of each weight it has."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from octavo.errors import ConfigError
from octavo.weights.tensor import Parameter

from .registry import parameter_shapes
from .spec import DecoderSpec

SIZES = (1, 2, 4, 8)  # numbers of ranks
_OUTPUTS, _INPUTS = 16, 64  # rows, and columns of `down`, are divided in multiples of these


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size` of the model `whole`, whose size must be one of `sizes_for(whole)`.

    The embedding, the head, gate and up are cut by rows, `down` by columns. So are query, key and value projections,
    and `out`, where heads can be divided: each rank has some heads, and those of keys and values that they need, which
    are copied where there are fewer than ranks. Where they cannot, each rank computes some rows of qkv and of `out`,
    and the attention of all heads.
    """

    whole: DecoderSpec
    rank: int = 0
    size: int = 1

    @property
    def spec(self) -> DecoderSpec:
        """Return the sizes of this rank."""
        whole, kv_heads = self.whole, self._kv_heads
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

    @property
    def _heads(self) -> range:
        heads = self.whole.num_heads
        return _share(heads, 1, self.rank, self.size) if divides_heads(self.whole, self.size) else range(heads)

    @property
    def _kv_heads(self) -> range:
        heads = self._heads
        group = self.whole.num_heads // self.whole.num_kv_heads
        return range(heads.start // group, -(-heads.stop // group))

    @property
    def _ffn(self) -> range:
        return _share(self.whole.intermediate_size, _INPUTS, self.rank, self.size)

    @property
    def _vocab(self) -> range:
        return _share(self.whole.vocab_size, _OUTPUTS, self.rank, self.size)

    @property
    def _hidden(self) -> range:
        return _share(self.whole.hidden_size, _OUTPUTS, self.rank, self.size)

    @property
    def _qkv(self) -> range:
        return _share(self.whole.qkv_size, _OUTPUTS, self.rank, self.size)

    def _part(self, name: str, parameter: Parameter) -> Parameter:
        """Return this rank's part of the parameter `name`, such as layers.0.qkv or layers.0.qkv.bias."""
        weight = name.removesuffix(".bias")
        kind, is_bias = weight.rpartition(".")[2], weight != name
        cuts_heads = divides_heads(self.whole, self.size)
        if kind in ("embed", "head"):
            return parameter.take_rows(self._vocab)
        if kind == "gate_up":
            return parameter.take_rows(self._ffn, self._ffn)
        if kind == "qkv":
            return parameter.take_rows(*self._rows_of_heads() if cuts_heads else self._rows_of_qkv())
        if kind == "out" and not cuts_heads:
            return parameter.take_rows(self._hidden)
        if kind == "out" and not is_bias:
            return parameter.take_columns(_times(self._heads, self.whole.head_dim))
        if kind == "down" and not is_bias:
            return parameter.take_columns(self._ffn)
        return parameter

    def _rows_of_heads(self) -> tuple[range, range, range]:
        """Return the rows of the query, key and value projections for this rank's heads."""
        queries, keys = (_times(heads, self.whole.head_dim) for heads in (self._heads, self._kv_heads))
        return queries, keys, keys

    def _rows_of_qkv(self) -> tuple[range, ...]:
        """Return the rows of the query, key and value projections that are in this rank's part of the stack."""
        first, rows = 0, []
        for size in (self.whole.q_size, self.whole.kv_size, self.whole.kv_size):
            start, stop = (min(max(at - first, 0), size) for at in (self._qkv.start, self._qkv.stop))
            rows.append(range(start, stop))
            first += size
        return tuple(rows)


def divides_heads(spec: DecoderSpec, size: int) -> bool:
    """Return whether `size` ranks can have as many heads each, and whole heads of keys and values."""
    kv_heads = spec.num_kv_heads
    return spec.num_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def sizes_for(spec: DecoderSpec) -> list[int]:
    """Return the numbers of ranks over which a model can be divided, so that each has a part of everything."""
    return [size for size in SIZES if all(_fits(spec, size))]


def check_size(spec: DecoderSpec, size: int) -> None:
    """Raise ConfigError if a model cannot be divided over `size` ranks."""
    if size not in (sizes := sizes_for(spec)):
        raise ConfigError(
            f"tensor_parallel_size must be {' or '.join(map(str, sizes))} for this model, not {size}: its smallest "
            "layers cannot be divided further"
        )


def _fits(spec: DecoderSpec, size: int) -> list[bool]:
    """Return, for each width that is divided, whether there is a unit of it for each rank."""
    widths = [(spec.intermediate_size, _INPUTS), (spec.vocab_size, _OUTPUTS)]
    if not divides_heads(spec, size):
        widths += [(spec.hidden_size, _OUTPUTS), (spec.qkv_size, _OUTPUTS)]
    return [size == 1 or -(-width // unit) >= size for width, unit in widths]


def _share(width: int, unit: int, rank: int, size: int) -> range:
    """Return a rank's range of `width`, which is divided at multiples of `unit`."""
    units = -(-width // unit)
    start, stop = (min(width, units * i // size * unit) for i in (rank, rank + 1))
    return range(start, stop)


def _times(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
