"""Write a model of Llama-3.2-1B's shape with random bf16 weights, to measure: random_1b.py TOKENIZER_DIR TARGET_DIR"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

source, target = map(Path, sys.argv[1:])
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, vocab_size=128256, rope_theta=500000.0, max_position_embeddings=8192, tie_word_embeddings=True,
    rms_norm_eps=1e-5,
)  # fmt: skip
LlamaForCausalLM(config).bfloat16().save_pretrained(target)
for file in source.glob("tokenizer*.json"):
    shutil.copy(file, target)
