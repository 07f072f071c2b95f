"""Convert thinking_token_budget to the limit that an engine follows: token ids in place of names."""

from octavo.engine.messages import Thinking
from octavo.errors import InvalidRequest
from octavo.params import SamplingParams
from octavo.text import Tokenizer
from octavo.text.reasoning import REASONING_PARSERS, chosen_reasoning_parser


def thinking_of(params: SamplingParams, tokenizer: Tokenizer, reasoning_parser: str) -> Thinking | None:
    """Return the limit of the model's reasoning; None if the request sets none.

    Args:
        reasoning_parser: the setting of this name.

    Raises InvalidRequest if the tokens that end the reasoning are not known.
    """
    if params.thinking_token_budget in (None, -1):
        return None
    name = chosen_reasoning_parser(reasoning_parser, tokenizer.template_source())
    kind = REASONING_PARSERS.get(name or "none")
    if kind is None:
        raise InvalidRequest(
            "thinking_token_budget needs a model whose reasoning has marks such as <think>, or the setting "
            "reasoning_parser",
            "thinking_token_budget",
        )
    assert params.thinking_token_budget is not None
    start, end = (_spelled(marks[0], tokenizer) for marks in (kind.starts, kind.ends))
    return Thinking(params.thinking_token_budget, start, end)


def _spelled(mark: str, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a mark: a token of its own if the vocabulary has one."""
    token = tokenizer.special_id(mark)
    return tokenizer.encode(mark, add_special_tokens=False) if token is None else [token]
