"""Loading maps the weights and packs them: at no time are there two copies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny_models import save_tokenizer

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 1024, 4096, 24, 512


def save_large_model(folder: Path) -> int:
    """A Llama of some 800 MB in bfloat16, whose weights are all a very small number. Bytes of its weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (HIDDEN,)
    tensors = {name: torch.full(shape, 1e-5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


# VmHWM, not getrusage: the latter counts what the parent had in memory when it forked.
LOAD = """
import pathlib, re, sys
from octavo import LLM, SamplingParams
with LLM(sys.argv[1], kv_cache_memory="32MB") as llm:
    llm.generate("a", SamplingParams(max_tokens=2))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.slow
def test_peak_memory_while_loading(tmp_path):
    packed = save_large_model(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert packed < peak <= 1.3 * packed + 300e6, f"{peak / 1e6:.0f} MB for {packed / 1e6:.0f} MB of weights"
