"""Generate a text from a prompt. Run: python examples/quick_start.py"""

from octavo import LLM, SamplingParams

# Initialize the model (auto-downloads if missing)
llm = LLM(model="smollm2", tensor_parallel_size=1)

# Define sampling parameters once; reuse for every request
sampling_params = SamplingParams(temperature=0.7, max_tokens=256)


def generate(prompt: str) -> str:
    # The API returns a list of RequestOutput objects (one per request)
    outputs = llm.generate([prompt], sampling_params)
    return outputs[0].text


# Example usage
print(generate("Explain the difference between TCP and UDP in 2 sentences."))

# `generate` continues the prompt, which a chat model may consider complete. To ask a chat model, use `chat`:
question = {"role": "user", "content": "Explain the difference between TCP and UDP in 2 sentences."}
print(llm.chat([question], sampling_params)[0].text)
