"""Offline speed of vLLM's CPU build in bf16, for peers.py: run by the Python of an environment of its own."""

import peer_timing
from vllm import LLM, SamplingParams


def main() -> None:
    args = peer_timing.arguments()
    llm = LLM(
        model=args.model,
        dtype="bfloat16",
        max_model_len=max(2048, args.input_len + args.output_len),
        max_num_seqs=args.streams,
        enable_prefix_caching=False,
        disable_log_stats=False,  # or it does not tell when the first token came
    )

    def generate(prompts: list[list[int]], output_len: int) -> tuple[int, float]:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        tokens = sum(len(result.outputs[0].token_ids) for result in results)
        return tokens, results[0].metrics.first_token_latency

    peer_timing.measure(args, generate)


if __name__ == "__main__":  # vLLM's engine is a process that imports this file
    main()
