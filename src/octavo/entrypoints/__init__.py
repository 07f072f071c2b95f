"""Ways in under the names that vLLM's users know."""
