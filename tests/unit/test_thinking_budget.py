"""ThinkingBudget: the end of reasoning is forced at the budget, and only the tokens decide when."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.messages import Thinking
from octavo.engine.thinking import ThinkingBudget

TOKENS = st.lists(st.integers(0, 3), max_size=12)
MARK = st.lists(st.integers(0, 3), min_size=1, max_size=3)


def budget(size: int, tokens: list[int], num_prompt: int | None = None) -> ThinkingBudget:
    """With 8 as <think> and 9 as </think>."""
    return ThinkingBudget(
        Thinking(size, [8], [9]), array("i", tokens), len(tokens) if num_prompt is None else num_prompt
    )


def test_the_end_is_forced_after_the_budget() -> None:
    assert budget(2, [1, 8]).forced_token is None
    assert budget(2, [1, 8, 5], 2).forced_token is None
    assert budget(2, [1, 8, 5, 6], 2).forced_token == 9
    assert budget(2, [1, 8, 5, 6, 9], 2).forced_token is None
    assert budget(2, [1, 5, 6, 7], 1).forced_token is None, "it has not begun to reason"
    assert budget(0, [8]).forced_token == 9
    assert budget(2, [8, 1, 9, 1, 8, 1, 1], 1).forced_token == 9, "it reasons again"


def test_reasoning_in_the_prompt_counts() -> None:
    assert budget(2, [8, 1]).forced_token is None
    assert budget(2, [8, 1, 1]).forced_token == 9
    assert budget(2, [8, 1, 1, 1, 1]).forced_token == 9
    assert budget(2, [8, 1, 1, 1, 9, 1]).forced_token is None


def test_an_end_of_several_tokens() -> None:
    thinking, tokens = Thinking(1, [7, 8], [1, 2, 3]), array("i", [7, 8, 5])
    for expected in (1, 2, 3, None):
        follower = ThinkingBudget(thinking, tokens, 2)
        assert follower.forced_token == expected
        tokens.append(expected or 0)


@given(TOKENS, TOKENS, MARK, MARK, st.integers(0, 4))
def test_followed_or_rebuilt(prompt: list[int], output: list[int], start: list[int], end: list[int], size: int) -> None:
    """Token by token, and from scratch as after a preemption, it is the same; also for marks that overlap."""
    thinking, tokens = Thinking(size, start, end), array("i", prompt)
    followed = ThinkingBudget(thinking, tokens, len(prompt))
    for token in output:
        tokens.append(token)
        followed.advance()
        assert followed.forced_token == ThinkingBudget(thinking, array("i", tokens), len(prompt)).forced_token
