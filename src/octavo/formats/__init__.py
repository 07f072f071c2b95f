"""File formats: GGUF headers, and files of KV pages."""
