"""Offline throughput of OpenVINO GenAI, for peers.py: run by the Python of an environment of its own."""

import argparse
import random
import time

import numpy as np
import openvino
import openvino_genai

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--streams", type=int, default=64)
parser.add_argument("--input-len", type=int, default=128)
parser.add_argument("--output-len", type=int, default=128)
args = parser.parse_args()

scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 4, 4096, 256  # GB, tokens, streams
pipe = openvino_genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", {})


def generate(output_len: int) -> int:
    """Greedy tokens for `streams` random prompts: how many came."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = output_len, True, False
    prompts = [[random.randint(10, 49000) for _ in range(args.input_len)] for _ in range(args.streams)]
    tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    results = pipe.generate(tensors, [config] * args.streams)
    return sum(len(result.m_generation_ids[0]) for result in results)


random.seed(0)
generate(8)  # its kernels are compiled for the shapes they meet
start = time.perf_counter()
tokens = generate(args.output_len)
print(tokens / (time.perf_counter() - start))
