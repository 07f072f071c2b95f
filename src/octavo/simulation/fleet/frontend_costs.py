"""The processor time of a frontend: it has one core for Python, whatever the number of its engines."""

from dataclasses import dataclass

from .record import Done


@dataclass(frozen=True)
class FrontendCosts:
    """Microseconds of one core, as `benchmarks/frontend_load.py` measures them; docs/scale.md has its results.

    Attributes:
        request: of a streamed request over HTTP with a short prompt, without its tokens.
        prompt_token: per token of a prompt, to tokenize it and to compute the keys of its pages.
        token: per token that is streamed.
        message: per message of an engine with the tokens of a step.
        message_engine: the same per engine of the frontend, to look for a queue from which a request could move.
        page: per page that an engine gains or loses.
    """

    request: float = 1000.0
    prompt_token: float = 0.4
    token: float = 23.0
    message: float = 300.0
    message_engine: float = 0.04
    page: float = 0.7


FRONTEND = FrontendCosts()


def frontend_use(done: Done, costs: FrontendCosts = FRONTEND) -> float:
    """Return the mean share of its core that a frontend needs."""
    use, steady = done.use, done.steady()
    if not len(steady.arrival) or not use.seconds:
        return 0.0
    per_request = (
        costs.request + costs.prompt_token * float(steady.prompt.mean()) + costs.token * float(steady.output.mean())
    )
    per_step = costs.message + costs.message_engine * use.engines / use.frontends
    of_engines = per_step * use.steps + costs.page * use.page_changes
    return per_request / 1e6 * done.rate / use.frontends + of_engines / 1e6 / use.seconds
