"""What files look like: GGUF headers, and files of KV pages."""
