"""Models of random weights and odd shapes, made in memory, on the cpu backend."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from octavo.model.spec import DecoderSpec, RopeSpec
from octavo.weights.tensor import Parameter, Tensor

cpu = pytest.importorskip("octavo.backends.cpu", reason="the cpu backend's extension is not built")

PLAIN = DecoderSpec(
    vocab_size=203,
    hidden_size=64,
    intermediate_size=112,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=512,
    norm_eps=1e-5,
    rope=RopeSpec(theta=10000.0),
    windows=(0, 0, 0),
    tied_embeddings=True,
)
SPECS = {
    "plain": PLAIN,
    "head_dim 64, group of 3": dataclasses.replace(PLAIN, num_heads=6, head_dim=64, hidden_size=96),
    "head_dim 80, one kv head": dataclasses.replace(PLAIN, num_heads=5, num_kv_heads=1, head_dim=80, hidden_size=72),
    "head_dim 128, no groups": dataclasses.replace(PLAIN, num_heads=2, head_dim=128, tied_embeddings=False),
    "head_dim 96, group of 60": dataclasses.replace(
        PLAIN, num_heads=60, num_kv_heads=1, head_dim=96, num_layers=1, windows=(0,)
    ),
    "windows, qkv as wide as hidden": dataclasses.replace(PLAIN, windows=(7, 0, 40), num_heads=2, num_kv_heads=1),
    "biases": dataclasses.replace(PLAIN, qkv_bias=True, output_bias=True, mlp_bias=True, intermediate_size=100),
    "qk_norm, large eps": dataclasses.replace(
        PLAIN, qk_norm=True, head_dim=32, norm_eps=0.1, rope=RopeSpec(factors=tuple(range(1, 17)))
    ),
    "gelu, odd widths": dataclasses.replace(
        PLAIN, activation="gelu_tanh", hidden_size=50, intermediate_size=33, vocab_size=101, tied_embeddings=False
    ),
}
TOKENS = np.random.default_rng(0).integers(1, 100, 150).tolist()
PAGES = [5, 0, 7, 2, 9]  # five pages of 32 for 150 tokens, out of order


def random_parameters(spec: DecoderSpec) -> dict[str, Parameter]:
    """Every parameter of `spec`, in bfloat16, sized so that activations stay near 1."""
    rng = np.random.default_rng(1)
    h, inter = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.vocab_size, h), "norm": (h,)}
    if not spec.tied_embeddings:
        shapes["head"] = (spec.vocab_size, h)
    for i in range(spec.num_layers):
        layer = {
            "attn_norm": (h,), "mlp_norm": (h,), "q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,),
            "qkv": (spec.qkv_size, h), "out": (h, spec.q_size), "gate_up": (2 * inter, h), "down": (h, inter),
            "qkv.bias": (spec.qkv_size,), "out.bias": (h,), "gate_up.bias": (2 * inter,), "down.bias": (h,),
        }  # fmt: skip
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    parameters = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        values = 1 + values / 4 if name.endswith("norm") else values / 2 if len(shape) == 1 else values
        if len(shape) == 2 and name != "embed":
            values *= 1.2 / np.sqrt(shape[1])
        bf16 = (np.float32(values).view(np.uint32) >> 16).astype(np.uint16)
        data = bf16.reshape(shape[0] if len(shape) > 1 else 1, -1).view(np.uint8)
        parameters[name] = Parameter((Tensor(name, shape, "BF16", data),))
    return parameters


def load(spec: DecoderSpec, factory: Any = cpu.load, **changes: Any) -> Any:
    """A backend of the random model, with 10 pages, or so many as `pages`."""
    settings: dict[str, Any] = {
        "page_size": 32, "max_batch_tokens": 256, "max_batch_size": 256, "max_model_len": 512, "threads": 2,
        "dtype": "auto", "quantization": "auto", "device": "cpu", "progress": lambda done, total: None,
    }  # fmt: skip
    settings |= changes
    pages = settings.pop("pages", 10)
    backend = factory(spec, settings.pop("parameters", None) or random_parameters(spec), **settings)
    backend.allocate_kv(pages)
    return backend
