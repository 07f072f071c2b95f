"""Use different sampling parameters for each request. Run: python examples/temperatures.py"""

from octavo import LLM, SamplingParams

llm = LLM(model="smollm2")


def route_request(prompt: str, mode: str) -> str:
    if mode == "creative":
        params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=200)
    else:  # factual
        params = SamplingParams(temperature=0.2, top_p=0.9, max_tokens=150)
    return llm.generate([prompt], params)[0].text


print(route_request("Write a sci-fi short story.", "creative"))
print(route_request("What is the capital of France?", "factual"))

# Both in one batch, each with its own parameters: mixing costs nothing.
outputs = llm.chat(
    [
        [{"role": "user", "content": "Write a sci-fi short story."}],
        [{"role": "user", "content": "What is the capital of France?"}],
    ],
    [SamplingParams(temperature=1.0, top_p=0.95, max_tokens=200), SamplingParams(temperature=0.0, max_tokens=150)],
)
for output in outputs:
    print(output.text)
