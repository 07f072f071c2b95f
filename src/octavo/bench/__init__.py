"""Benchmarks of the engine, of the machine's limits, and of any OpenAI-compatible server (`octavo bench`)."""
