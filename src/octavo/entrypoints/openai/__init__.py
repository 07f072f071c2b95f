"""`python -m octavo.entrypoints.openai.api_server`."""
