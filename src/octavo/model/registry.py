"""From a checkpoint to a DecoderSpec and its parameters: which family it is, and whether every tensor fits."""

import re
from collections.abc import Mapping
from typing import Any, Protocol

from octavo.errors import DamagedWeights, UnsupportedModel
from octavo.weights.tensor import FORMATS, Parameter, Tensor

from .families import llama, mistral, qwen2, qwen3
from .spec import DecoderSpec


class Family(Protocol):
    """What a family's file exports."""

    ARCHITECTURE: str  # in config.json's `architectures`
    MODEL_TYPE: str  # its `model_type`
    WEIGHTS: dict[str, tuple[str, ...]]  # canonical name -> the tensors stacked in it; "{i}" is a layer

    def spec(self, config: Mapping[str, Any]) -> DecoderSpec: ...


# What checkpoints may have beside the parameters: copies of tied embeddings, and tables that follow from the config.
_UNUSED = re.compile(r"lm_head\.weight|rope_freqs\.weight|.*\.rotary_emb\.inv_freq")
FAMILIES: tuple[Family, ...] = (llama, mistral, qwen2, qwen3)


def describe_model(
    checkpoint_config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[DecoderSpec, dict[str, Parameter]]:
    """The model's spec, and its parameters under the canonical names of decoder.py, still mapped.

    Raises UnsupportedModel (family, variant or tensor format) or DamagedWeights (config or tensors that do not fit).
    """
    family = find_family(checkpoint_config)
    spec = family.spec(checkpoint_config)
    parameters = {}
    for name, shapes in parameter_shapes(spec).items():
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        names = [n.replace("{i}", layer) for n in family.WEIGHTS[name.replace(f".{layer}.", ".{i}.", 1)]]
        parameters[name] = Parameter(tuple(_fitting(tensors, *part) for part in zip(names, shapes, strict=True)))
    used = {part.name for parameter in parameters.values() for part in parameter.parts}
    if unused := [name for name in tensors if name not in used and not _UNUSED.fullmatch(name)]:
        raise UnsupportedModel(f"the checkpoint has a tensor {unused[0]!r} that a model of its config has no use for")
    return spec, parameters


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that `architectures` names, or else `model_type`. Raises UnsupportedModel."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for family in FAMILIES:
        if architectures == [family.ARCHITECTURE] if architectures else model_type == family.MODEL_TYPE:
            return family
    supported = ", ".join(family.ARCHITECTURE for family in FAMILIES)
    raise UnsupportedModel(f"architecture {architectures or model_type!r} is not supported; supported are {supported}")


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Every parameter that `spec` needs, and the shapes of the tensors stacked in it."""
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


def _fitting(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise DamagedWeights(f"the checkpoint has no tensor {name!r}; download it again")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise DamagedWeights(f"tensor {name!r} has shape {list(tensor.shape)}; its config asks for {list(shape)}")
    if tensor.format not in FORMATS:
        raise UnsupportedModel(f"tensor {name!r} is stored as {tensor.format}; supported are {', '.join(FORMATS)}")
    return tensor
