"""API keys: whose a request is, and what its owner may do."""
