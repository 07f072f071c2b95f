"""OpenAI's routes: completions, chat completions, models, and Octavo's KV states."""
