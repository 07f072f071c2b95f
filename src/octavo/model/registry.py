"""Find the family of a checkpoint, its DecoderSpec and its parameters, and check that every tensor fits."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from octavo.errors import DamagedWeights, UnsupportedModel, shortened
from octavo.formats.blocks import BLOCK_FORMATS
from octavo.weights.tensor import Parameter, Tensor

from .families import llama, mistral, qwen2, qwen3
from .spec import DecoderSpec


class Family(Protocol):
    """The interface of the modules in families/."""

    ARCHITECTURE: str  # in `architectures` of config.json
    MODEL_TYPE: str  # `model_type` in config.json
    WEIGHTS: dict[str, tuple[str, ...]]  # canonical name: the tensors stacked in it; "{i}" is a layer

    def spec(self, config: Mapping[str, Any]) -> DecoderSpec:
        """Return the DecoderSpec of a config.json. Raises DamagedWeights or UnsupportedModel."""
        ...


# Tensors that are not parameters: a head that equals the tied embedding, and tables that follow from the config.
_UNUSED = re.compile(r"lm_head\.weight|rope_freqs\.weight|.*\.rotary_emb\.inv_freq")
_COMPARED_ROWS = 1024  # at a time
FAMILIES: tuple[Family, ...] = (llama, mistral, qwen2, qwen3)


def describe_model(
    checkpoint_config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[DecoderSpec, dict[str, Parameter]]:
    """Return the model's spec, and its parameters by the canonical names of decoder.py. Nothing is read yet.

    As in transformers, a head that differs from the embedding is used even if the config says that they are tied.

    Raises:
        UnsupportedModel: The family, a variant of it or the format of a tensor is not supported.
        DamagedWeights: The config is invalid, or a tensor is missing or does not fit the config.
    """
    family = find_family(checkpoint_config)
    spec = family.spec(checkpoint_config)
    spec, tensors = _resolve_tie(spec, family, tensors)
    parameters, used = {}, set[str]()
    for name, shapes in parameter_shapes(spec).items():
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        names = [n.replace("{i}", layer) for n in family.WEIGHTS[name.replace(f".{layer}.", ".{i}.", 1)]]
        parameters[name] = Parameter(tuple(_fitting(tensors, *part) for part in zip(names, shapes, strict=True)))
        used.update(names)
    if unused := [name for name in tensors if name not in used and not _UNUSED.fullmatch(name)]:
        found = shortened(repr(unused[0]))
        raise UnsupportedModel(f"the checkpoint has a tensor {found} that a model with its config does not use")
    return spec, parameters


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family that `architectures` names or, without it, `model_type`. Raises UnsupportedModel."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for family in FAMILIES:
        if architectures == [family.ARCHITECTURE] if architectures else model_type == family.MODEL_TYPE:
            return family
    supported = ", ".join(family.ARCHITECTURE for family in FAMILIES)
    found = shortened(repr(architectures or model_type))
    raise UnsupportedModel(f"architecture {found} is not supported; supported are {supported}")


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the parameters that `spec` needs by canonical name, with the shapes of the tensors stacked in each."""
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    qkv = (spec.q_size, spec.kv_size, spec.kv_size)
    layer: dict[str, tuple[tuple[int, ...], ...]] = {
        "attn_norm": ((hidden,),),
        "qkv": tuple((rows, hidden) for rows in qkv),
        "out": ((hidden, spec.q_size),),
        "mlp_norm": ((hidden,),),
        "gate_up": ((ffn, hidden), (ffn, hidden)),
        "down": ((hidden, ffn),),
    }
    if spec.qkv_bias:
        layer["qkv.bias"] = tuple((rows,) for rows in qkv)
    if spec.output_bias:
        layer["out.bias"] = ((hidden,),)
    if spec.mlp_bias:
        layer |= {"gate_up.bias": ((ffn,), (ffn,)), "down.bias": ((hidden,),)}
    if spec.qk_norm:
        layer |= {"q_norm": ((spec.head_dim,),), "k_norm": ((spec.head_dim,),)}
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {"embed": ((spec.vocab_size, hidden),)}
    for i in range(spec.num_layers):
        shapes |= {f"layers.{i}.{name}": parts for name, parts in layer.items()}
    shapes["norm"] = ((hidden,),)
    if not spec.tied_embeddings:
        shapes["head"] = ((spec.vocab_size, hidden),)
    return shapes


def _resolve_tie(
    spec: DecoderSpec, family: Family, tensors: Mapping[str, Tensor]
) -> tuple[DecoderSpec, Mapping[str, Tensor]]:
    """Decide from the checkpoint's tensors whether embedding and head are tied.

    If the config ties them, but the checkpoint has both and they differ, they are not tied. If the checkpoint has only
    the head, it serves as the embedding too.
    """
    (embed_name,), (head_name,) = family.WEIGHTS["embed"], family.WEIGHTS["head"]
    embed, head = tensors.get(embed_name), tensors.get(head_name)
    if not spec.tied_embeddings or head is None:
        return spec, tensors
    if embed is None:
        return spec, {**tensors, embed_name: head}
    return replace(spec, tied_embeddings=_equal(embed, head)), tensors


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same values. Stops reading at the first difference."""
    if one.shape != other.shape or any(tensor.format not in BLOCK_FORMATS for tensor in (one, other)):
        return False
    stored = one.format == other.format and one.row_order is None and other.row_order is None
    a, b = one.data, other.data
    for start in range(0, one.shape[0], _COMPARED_ROWS):
        rows = slice(start, start + _COMPARED_ROWS)
        pair = (a[rows], b[rows]) if stored else (one.float32(start, rows.stop), other.float32(start, rows.stop))
        if not np.array_equal(*pair):
            return False
    other.release()
    return True


def _fitting(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor `name` if it has this shape and a format that backends read."""
    if name not in tensors:
        raise DamagedWeights(f"the checkpoint has no tensor {name!r}; download it again")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise DamagedWeights(f"tensor {name!r} has shape {list(tensor.shape)}; its config requires {list(shape)}")
    if tensor.format not in BLOCK_FORMATS:
        supported = ", ".join(BLOCK_FORMATS)
        raise UnsupportedModel(f"tensor {name!r} is stored as {tensor.format}; supported are {supported}")
    return tensor
