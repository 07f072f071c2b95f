"""One prompt, one text. Run: python examples/quick_start.py"""

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

# `generate` goes on where the prompt ends, which a chat model may take for the end of the text. To ask it, use `chat`:
question = {"role": "user", "content": "Explain the difference between TCP and UDP in 2 sentences."}
print(llm.chat([question], sampling_params)[0].text)
