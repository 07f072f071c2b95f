"""Measurements behind `octavo bench`: the engine's speed, its limits, and any OpenAI-compatible server's speed."""
