"""Batches: files of requests, one per line in OpenAI's format, that are sent to the server's own routes."""
