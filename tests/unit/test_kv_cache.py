"""The prefix cache of an engine: partial pages, salts and tenants, pins."""

from collections.abc import Iterator
from itertools import count

import pytest

from octavo.engine.engine import Engine
from octavo.engine.messages import EngineRequest, TokenOutput
from octavo.params import SamplingParams
from prefix_backend import PrefixBackend, complete

PAGE = 4
PROMPT = [0, 1, 2, 2, 1, 0, 0, 2, 1, 1]  # two full pages and a half


class Client:
    """Asks an engine on a PrefixBackend, and checks every answer."""

    def __init__(self, num_pages: int = 32, **settings: bool):
        self.backend = PrefixBackend(num_pages, PAGE)
        self.engine = Engine(
            self.backend, num_pages=num_pages, max_model_len=64, max_batch_size=8, max_batch_tokens=32, **settings
        )
        self.ids: Iterator[int] = count()

    def ask(self, prompt: list[int], max_tokens: int = 3, tenant: str = "", salt: str = "") -> tuple[list[int], int]:
        """The output, and how many tokens of the prompt were found in the cache."""
        params = SamplingParams(max_tokens=max_tokens)
        self.engine.add(EngineRequest(str(next(self.ids)), prompt, params, tenant=tenant, salt=salt))
        outputs: list[TokenOutput] = []
        while self.engine.has_work:
            outputs += self.engine.step()
        tokens = [output.token for output in outputs]
        assert tokens == complete(prompt, max_tokens)
        return tokens, outputs[0].cached_tokens


def test_the_next_turn_finds_all_that_was_computed():
    client = Client()
    conversation = PROMPT
    for _ in range(4):
        answer, _ = client.ask(conversation)
        conversation = conversation + answer
        computed = len(conversation) - 1  # the last token's K and V are not
        conversation = [*conversation, 2, 0]
        assert client.ask(conversation, 1)[1] == computed


def test_conversations_that_fork_within_a_page():
    client = Client()
    answer, _ = client.ask(PROMPT)
    for further in ([0], [1], [2, 1]):
        assert client.ask(PROMPT + answer + further)[1] >= len(PROMPT) - len(PROMPT) % PAGE


@pytest.mark.parametrize("length", range(1, 3 * PAGE))
@pytest.mark.parametrize("max_tokens", [1, 2, PAGE, 2 * PAGE])
def test_a_prompt_that_comes_again_computes_its_last_token_only(length, max_tokens):
    client = Client()
    prompt = (PROMPT * 2)[:length]
    client.ask(prompt, max_tokens)
    assert client.ask(prompt, max_tokens)[1] == length - 1


def test_an_edit_where_the_last_completion_was_computes_the_edit_alone():
    client = Client()
    text = PROMPT
    for edit in ([0], [1, 1], [2, 0, 1, 0, 2], [1, 2, 1]):
        completion, _ = client.ask(text, 2 * PAGE)
        edited = [*text, (completion[0] + 1) % 3, *edit]  # another token than the one that was generated
        assert client.ask(edited, 1)[1] == len(text)
        text = edited


def test_a_page_is_not_found_under_another_tenant_or_salt():
    client = Client()
    assert client.ask(PROMPT, tenant="a", salt="s")[1] == 0
    for tenant, salt in (("b", "s"), ("a", "t"), ("", ""), ("as", ""), ("", "as")):
        assert client.ask(PROMPT, tenant=tenant, salt=salt)[1] == 0
    assert client.ask(PROMPT, tenant="a", salt="s")[1] > 0


def test_without_the_prefix_cache_nothing_is_found():
    client = Client(prefix_caching=False)
    assert [client.ask(PROMPT)[1] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("pinned", [True, False])
def test_a_pinned_prefix_outlives_what_fills_the_cache(pinned):
    client = Client(num_pages=8)
    conversation = PROMPT + client.ask(PROMPT)[0]
    if pinned:
        client.engine.pin("state", conversation)
    for token in range(3):
        client.ask([token] * 17, 2)  # 5 pages each, of 8
    found = client.ask([*conversation, 0])[1]
    assert found == (len(conversation) - 1 if pinned else 0)
    client.engine.unpin("state")
    assert client.engine.stats().free_pages + client.engine.stats().cached_pages == 8


def test_pins_give_way_to_what_runs():
    client = Client(num_pages=8)
    conversation = PROMPT + client.ask(PROMPT)[0]
    client.engine.pin("state", conversation)
    client.ask([1] * 28, 4)  # needs every page
    assert client.ask([*conversation, 0])[1] == 0


def test_a_state_that_is_pinned_again_holds_its_pages_once():
    client = Client()
    conversation = PROMPT + client.ask(PROMPT)[0]
    for _ in range(3):
        client.engine.pin("state", conversation)
    client.engine.unpin("state")
    client.engine.unpin("state")
    stats = client.engine.stats()
    assert stats.free_pages + stats.cached_pages == 32
