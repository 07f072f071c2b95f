"""Part e: transformers on the same machine, with models of the same shapes."""

import argparse
import time
from typing import Any

import torch

from octavo.model.spec import DecoderSpec

from .report import Report
from .shapes import MODELS

PROMPT, NEW = 1024, 24
BATCHES = (1, 8, 64)


def run(report: Report, options: argparse.Namespace) -> None:
    for name, spec in sorted(MODELS.items(), key=lambda item: item[1].hidden_size):
        if name not in options.models:
            continue
        with report.attempt(f"transformers {name}"):
            model = transformers_model(spec)
            for batch in BATCHES:
                if report.seconds_left < 10:
                    return
                with report.attempt(f"transformers {name}, decode {batch}"):
                    generate(report, name, model, batch)
            with report.attempt(f"transformers {name}, continuous batching"):
                if report.seconds_left > 25:
                    continuous(report, name, model)
            del model
        torch.cuda.empty_cache()


def transformers_model(spec: DecoderSpec) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    kind = Qwen3Config if spec.qk_norm else LlamaConfig
    config = kind(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied_embeddings,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


@torch.inference_mode()
def generate(report: Report, name: str, model: Any, batch: int) -> None:
    """Measure `generate`: the time of NEW tokens beside that of one gives the time of a decode step."""
    prompts = torch.randint(10, 1000, (batch, PROMPT), device="cuda")

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model.generate(prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds(2)
    first = seconds(1)
    each = (seconds(NEW + 1) - first) / NEW
    report.add(
        f"transformers {name}, decode {batch} x {PROMPT}",
        f"{batch / each:9,.0f} tok/s  {each * 1e3:7.2f} ms",
        batch / each,
    )
    report.add(
        f"transformers {name}, prompts {batch} x {PROMPT}",
        f"{batch * PROMPT / first:9,.0f} tok/s",
        batch * PROMPT / first,
    )


def continuous(report: Report, name: str, model: Any) -> None:
    """Measure continuous batching of 64 requests."""
    from transformers import GenerationConfig

    prompts = torch.randint(10, 1000, (64, PROMPT)).tolist()
    config = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.generate_batch(inputs=prompts[:2], generation_config=config)
    begun = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=config)
    took = time.perf_counter() - begun
    made = sum(len(output.generated_tokens) for output in outputs.values())
    report.add(f"transformers {name}, continuous batching, 64 x {PROMPT}/64", f"{made / took:9,.0f} tok/s", made / took)
