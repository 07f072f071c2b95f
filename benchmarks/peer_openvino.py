"""Offline speed of OpenVINO GenAI, for peers.py: run by the Python of an environment of its own."""

import numpy as np
import openvino
import openvino_genai
import peer_timing

args = peer_timing.arguments()
scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 4, 4096, 256  # GB, tokens, streams
pipe = openvino_genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", {})


def generate(prompts: list[list[int]], output_len: int) -> tuple[int, float]:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = output_len, True, False
    tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    results = pipe.generate(tensors, [config] * len(prompts))
    tokens = sum(len(result.m_generation_ids[0]) for result in results)
    return tokens, results[0].perf_metrics.get_ttft().mean / 1000


peer_timing.measure(args, generate)
