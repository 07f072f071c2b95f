"""Entry points under the module names that vLLM's users know."""
