"""What peer_openvino.py and peer_vllm.py share. Their own Pythons run it, so it needs only the standard library."""

import argparse
import json
import random
import time
from collections.abc import Callable

# prompts, tokens to generate for each (greedy, past end-of-sequence)
# -> tokens generated in all, and the engine's own word on the seconds until the first prompt's first token
Generate = Callable[[list[list[int]], int], tuple[int, float]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    return parser.parse_args()


def measure(args: argparse.Namespace, generate: Generate) -> None:
    """Print, as JSON, the seconds until the first token and until all of them.

    The run that counts is the second: engines compile kernels for the shapes that they meet.
    """
    random.seed(0)
    for _ in range(2):
        prompts = [[random.randint(10, 49000) for _ in range(args.input_len)] for _ in range(args.streams)]
        start = time.perf_counter()
        generated, first = generate(prompts, args.output_len)
        taken = time.perf_counter() - start
        assert generated == args.streams * args.output_len, f"{generated} tokens came"
    print(json.dumps({"first": first, "all": taken}))
