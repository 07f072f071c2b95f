"""What peer_openvino.py and peer_vllm.py share. Their own Pythons run it, so it needs only the standard library."""

import argparse
import json
import random
import time
from collections.abc import Callable

# prompts, tokens to generate for each -> tokens generated in all; greedy, past end-of-sequence
Generate = Callable[[list[list[int]], int], int]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    return parser.parse_args()


def measure(args: argparse.Namespace, generate: Generate) -> None:
    """Print, as JSON, the seconds to the first token of every stream, and to all of them."""
    random.seed(0)

    def seconds(output_len: int) -> float:
        prompts = [[random.randint(10, 49000) for _ in range(args.input_len)] for _ in range(args.streams)]
        start = time.perf_counter()
        generated = generate(prompts, output_len)
        taken = time.perf_counter() - start
        assert generated == args.streams * output_len, f"{generated} tokens came"
        return taken

    seconds(args.output_len)  # at full size, as kernels are compiled for the shapes they meet
    print(json.dumps({"first": seconds(1), "all": seconds(args.output_len)}))
