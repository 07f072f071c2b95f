"""KV states: a second turn of a conversation without recomputing the first. Run: python examples/kv_state.py"""

from tempfile import TemporaryDirectory

from octavo import LLM, SamplingParams

llm = LLM(model="smollm2")

# First turn: prefill + decode
first_output = llm.generate(
    ["User: How do I reverse a linked list in Python?\nAssistant:"], SamplingParams(temperature=0.0, max_tokens=64)
)
# Extract KV-cache state
kv_state = llm.get_kv_cache_state(first_output[0].request_id)
# Second turn: reuse cache, only decode new tokens
second_output = llm.generate(
    ["User: Can you add comments?"], SamplingParams(temperature=0.0, max_tokens=64), kv_cache_state=kv_state
)
print(second_output[0].text)

prompt, cached = len(second_output[0].prompt_token_ids), second_output[0].metrics.cached_tokens
print(f"\nOf {prompt} prompt tokens, {cached} were not computed again.")

# A state can be continued any number of times, and saved to a file for another process with the same model.
with TemporaryDirectory() as folder:
    kv_state.save(f"{folder}/linked_list.kv")
    loaded = llm.load_kv_cache_state(f"{folder}/linked_list.kv")
