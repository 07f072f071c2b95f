"""The HTTP server: OpenAI's API over AsyncLLM. app.py has the routes, run.py the process."""
