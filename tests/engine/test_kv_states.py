"""KV states: conversations that go on where they were, in Python."""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_state_turns import GREEDY, QUESTION, first_turn, small_llm
from octavo import LLM, AsyncLLM, SamplingParams
from octavo.errors import EngineDead, InvalidKVState, InvalidRequest, PromptTooLong, QuotaExceeded
from octavo.states import KVState, StateBook, book, handle

# Going on


def test_turns_that_follow_states_are_the_conversation_sent_whole(llm: LLM, tiny_llama: Path) -> None:
    conversation = llm.tokenizer.encode(QUESTION)
    state, turns = None, []
    for new in (QUESTION, "\nUser: Why?\nAssistant:", [7, 8, 9], "\nUser: And then?\nAssistant:", ""):
        [output] = llm.generate([new], GREEDY, kv_cache_state=state)
        if state is not None:
            assert output.metrics.cached_tokens == state.num_tokens - 1  # K and V of the last token are not there yet
            conversation += llm.tokenizer.encode(new) if isinstance(new, str) and new else list(new)
        assert output.prompt_token_ids == conversation
        turns.append((output.prompt_token_ids, output.outputs[0].token_ids))
        conversation = conversation + output.outputs[0].token_ids
        state = llm.get_kv_cache_state(output.request_id)
        assert state.token_ids == conversation and state.num_tokens == len(conversation)
    with LLM(str(tiny_llama), enable_prefix_caching=False) as other:
        for prompt, answer in turns:
            [whole] = other.generate([prompt], GREEDY)
            assert whole.outputs[0].token_ids == answer and whole.metrics.cached_tokens == 0


def test_a_state_forks(llm: LLM) -> None:
    state = first_turn(llm)
    prompts = [" One", " Two", " Three"]
    forks = llm.generate(prompts, GREEDY, kv_cache_state=state)
    assert [fork.metrics.cached_tokens for fork in forks] == [state.num_tokens - 1] * 3
    assert len({tuple(fork.outputs[0].token_ids) for fork in forks}) > 1
    other = first_turn(llm, "Another question")
    one_each = llm.generate(prompts, GREEDY, kv_cache_state=[other, state, other])
    assert one_each[1].outputs == forks[1].outputs
    for output, of in zip(one_each, (other, state, other), strict=True):
        assert output.prompt_token_ids[: of.num_tokens] == of.token_ids
        assert output.metrics.cached_tokens >= of.num_tokens - 1
    with pytest.raises(InvalidRequest, match="3 prompts need one kv_cache_state, or 3, not 2"):
        llm.generate(prompts, GREEDY, kv_cache_state=[state, other])


def test_of_several_completions_one_is_chosen(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=9, ignore_eos=True)
    [output] = llm.generate(QUESTION, params)
    for completion in output.outputs:
        state = llm.get_kv_cache_state(output.request_id, completion.index)
        assert state.token_ids == output.prompt_token_ids + completion.token_ids
    with pytest.raises(InvalidRequest, match="index must be from 0 to 2, not 3"):
        llm.get_kv_cache_state(output.request_id, 3)


def test_a_stop_string_is_part_of_the_state(llm: LLM) -> None:
    """As its tokens are of `token_ids`; the text alone ends before it."""
    whole = llm.generate(QUESTION, GREEDY)[0].text
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=whole[4:6])
    [output] = llm.generate(QUESTION, params)
    state = llm.get_kv_cache_state(output.request_id)
    assert state.token_ids == output.prompt_token_ids + output.outputs[0].token_ids
    [more] = llm.generate("more", GREEDY, kv_cache_state=state)
    assert more.metrics.cached_tokens >= state.num_tokens - 1


def test_from_asyncio_and_streamed(llm: LLM) -> None:
    state = first_turn(llm)
    [expected] = llm.generate(" more", GREEDY, kv_cache_state=state)
    [output] = asyncio.run(llm.agenerate(" more", GREEDY, kv_cache_state=state))
    increments = list(llm.stream(" more", GREEDY, kv_cache_state=state))
    assert output.outputs == expected.outputs
    assert "".join(increment.text for increment in increments) == expected.text
    assert increments[0].prompt_token_ids == expected.prompt_token_ids


def test_only_a_finished_request_has_a_state(llm: LLM) -> None:
    increments = llm.stream(QUESTION, SamplingParams(temperature=0, max_tokens=450, ignore_eos=True))
    id = next(increments).request_id
    with pytest.raises(InvalidRequest, match="still runs") as error:
        llm.get_kv_cache_state(id)
    assert error.value.param == "request_id"
    increments.close()
    for unknown in (id, "req-0", ""):  # the first was aborted
        with pytest.raises(InvalidRequest, match="there is no finished request"):
            llm.get_kv_cache_state(unknown)


def test_a_conversation_that_has_no_room(llm: LLM) -> None:
    state = llm.get_kv_cache_state(llm.generate([[9] * 500], GREEDY)[0].request_id)
    assert state.num_tokens == 512
    with pytest.raises(PromptTooLong, match="has 513 tokens"):
        llm.generate([[1]], GREEDY, kv_cache_state=state)


def test_from_many_threads(llm: LLM, tmp_path: Path) -> None:
    def converse(number: int) -> list[int]:
        state = first_turn(llm, f"Question {number}")
        for turn in range(3):
            [output] = llm.generate(f" turn {turn}", GREEDY, use_tqdm=False, kv_cache_state=state)
            state.save(tmp_path / str(number))
            state.drop()
            state = llm.get_kv_cache_state(output.request_id)
        with state:
            return state.token_ids

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(converse, range(8)))
    assert together == [converse(number) for number in range(8)]


# Whose it is, and how long


def test_other_tenants_and_salts_are_refused(llm: LLM) -> None:
    state = first_turn(llm, tenant="ann", cache_salt="s")
    [output] = llm.generate("x", GREEDY, kv_cache_state=state, tenant="ann", cache_salt="s")
    assert output.metrics.cached_tokens == state.num_tokens - 1
    for terms in ({}, {"tenant": "ann"}, {"cache_salt": "s"}, {"tenant": "bob", "cache_salt": "s"}):
        with pytest.raises(InvalidKVState, match="of another tenant or cache_salt") as error:
            llm.generate("x", GREEDY, kv_cache_state=state, **terms)
        assert error.value.param == "kv_cache_state"


def test_a_dropped_state_is_refused(llm: LLM) -> None:
    state = first_turn(llm)
    child = llm.get_kv_cache_state(llm.generate("x", GREEDY, kv_cache_state=state)[0].request_id)
    state.drop()
    state.drop()
    with pytest.raises(InvalidKVState, match="was dropped"):
        llm.generate("x", GREEDY, kv_cache_state=state)
    with child:
        [output] = llm.generate("x", GREEDY, kv_cache_state=child)
        assert output.metrics.cached_tokens == child.num_tokens - 1
    with pytest.raises(InvalidKVState, match="was dropped"):
        llm.generate("x", GREEDY, kv_cache_state=child)


def test_states_of_another_engine_are_refused(llm: LLM, tiny_llama: Path) -> None:
    with LLM(str(tiny_llama)) as other:
        state = first_turn(other)
        with pytest.raises(InvalidKVState, match="belongs to another engine"):
            llm.generate("x", GREEDY, kv_cache_state=state)
    state.drop()  # its engine is gone
    with pytest.raises(EngineDead):
        other.generate("x", GREEDY, kv_cache_state=state)


def test_a_state_expires_after_its_last_use(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), kv_state_ttl=60) as llm:
        now = 1000.0
        llm._frontend.states._clock = lambda: now
        used, unused = first_turn(llm), first_turn(llm)
        assert used._deadline == 1060.0
        now = 1059.0
        llm.generate("x", GREEDY, kv_cache_state=used)
        assert used._deadline == 1119.0
        now = 1060.0
        llm.generate("x", GREEDY, kv_cache_state=used)
        with pytest.raises(InvalidKVState, match="has expired"):
            llm.generate("x", GREEDY, kv_cache_state=unused)


def test_the_quota_of_a_tenant(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), kv_state_quota=100, kv_state_ttl=60) as llm:
        now = 0.0
        llm._frontend.states._clock = lambda: now
        request = llm.generate([[5] * 30], GREEDY, tenant="ann")[0].request_id
        state = llm.get_kv_cache_state(request)  # 50 tokens
        again = llm.get_kv_cache_state(request)  # the same 50
        child = llm.generate([[6] * 20], GREEDY, kv_cache_state=again, tenant="ann")[0].request_id
        other = llm.generate([[7]], GREEDY, kv_cache_state=again, tenant="ann")[0].request_id
        kept = llm.get_kv_cache_state(child)  # 40 more
        with pytest.raises(QuotaExceeded, match=r"of 32 more tokens .* of 100 \(kv_state_quota\), 90 of which are in"):
            llm.get_kv_cache_state(other)
        state.drop()
        again.drop()  # `kept` holds its tokens
        with pytest.raises(QuotaExceeded):
            llm.get_kv_cache_state(other)
        llm.get_kv_cache_state(llm.generate([[7] * 80], GREEDY, tenant="bob")[0].request_id)
        kept.drop()
        llm.get_kv_cache_state(other)  # 82, as none counts less than 32
        with pytest.raises(QuotaExceeded):
            llm.get_kv_cache_state(child)
        now = 60.0
        llm.get_kv_cache_state(child)


def test_pinned_pages_outlive_other_prompts_and_return_after_their_loss(tiny_llama: Path) -> None:
    pages = 16  # one context of 512 tokens
    with small_llm(tiny_llama, pages) as llm:
        state = first_turn(llm)

        def cached_after(length: int) -> int:
            for token in range(10, 13):
                llm.generate([[token] * length], GREEDY)
            [output] = llm.generate("x", GREEDY, kv_cache_state=state)
            return output.metrics.cached_tokens

        everything = state.num_tokens - 1
        assert cached_after(300) == everything
        assert cached_after(490) == 0  # all pages were needed
        assert cached_after(300) >= everything // 32 * 32  # pinned again when they were computed again
        stats = llm.stats()
        assert stats.free_pages + stats.cached_pages < pages
        state.drop()
        llm.generate("x", GREEDY)
        stats = llm.stats()
        assert stats.free_pages + stats.cached_pages == pages


# The book, against a simple model


class Pins:
    """What an engine has been told."""

    def __init__(self) -> None:
        self.pinned: set[str] = set()

    def pin_state(self, state: KVState) -> None:
        self.pinned.add(state.id)

    def unpin_state(self, state: KVState) -> None:
        self.pinned.remove(state.id)


QUOTA, TTL, MINIMUM = 60, 10, 4
OPERATIONS = st.one_of(
    st.tuples(st.just("finish"), st.sampled_from("ab"), st.integers(1, 9), st.integers(0, 99)),
    st.tuples(st.just("keep"), st.integers(0, 99)),
    st.tuples(st.just("drop"), st.integers(0, 99)),
    st.tuples(st.just("wait"), st.integers(1, 6)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(OPERATIONS, max_size=40))
def test_any_traffic_of_states(operations: list[tuple[Any, ...]]) -> None:
    """The model: a state is the requests that it is made of; a tenant holds the tokens of the union of its states'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handle, "MIN_CHARGE", MINIMUM)
        run_traffic(operations)


def run_traffic(operations: list[tuple[Any, ...]]) -> None:
    pins, now = Pins(), 0
    states_book = StateBook(pins, pins, "", QUOTA, TTL, clock=lambda: now)
    requests: list[tuple[str, list[int], dict[int, int]]] = []  # tenant, all tokens, request -> its own tokens
    states: list[tuple[KVState, int]] = []  # and the request that each is of
    last_use: dict[str, int] = {}

    def alive(state: KVState) -> bool:
        return state.id in last_use and last_use[state.id] + TTL > now

    def held(tenant: str, *more: int) -> int:
        of = [request for state, request in states if alive(state) and state.tenant == tenant]
        parts: dict[int, int] = {}
        for request in [*of, *more]:
            parts.update(requests[request][2])
        return sum(parts.values())

    for operation, *values in operations:
        if operation == "finish":
            tenant, length, which = values
            before = states[which % len(states)] if states and which % 3 else None
            if before and not alive(before[0]):
                with pytest.raises(InvalidKVState):
                    states_book.use(before[0], before[0].tenant, "")
                before = None
            tokens, parts = [], {}
            if before:
                tenant, tokens, parts = requests[before[1]]
                assert states_book.use(before[0], tenant, "") == tokens
                last_use[before[0].id] = now
            number = len(requests)
            prompt, output = [*tokens, *[number % 10] * (length - 1)], [7]
            states_book.remember(f"r{number}", tenant, "", prompt, [output], before[0] if before else None)
            requests.append((tenant, prompt + output, {**parts, number: max(length, MINIMUM)}))
        elif operation == "keep" and requests:
            number = values[0] % len(requests)
            tenant, tokens, _ = requests[number]
            if held(tenant, number) > QUOTA:
                with pytest.raises(QuotaExceeded):
                    states_book.keep(f"r{number}")
            else:
                state = states_book.keep(f"r{number}")
                assert state.token_ids == tokens and state.tenant == tenant
                states.append((state, number))
                last_use[state.id] = now
        elif operation == "drop" and states:
            state, _ = states[values[0] % len(states)]
            states_book.drop(state)
            last_use.pop(state.id, None)
        elif operation == "wait":
            now += values[0]
        for tenant in "ab":
            room = QUOTA - held(tenant)
            states_book.check_quota(tenant, room)
            with pytest.raises(QuotaExceeded):
                states_book.check_quota(tenant, room + 1)
        assert pins.pinned == {state.id for state, _ in states if alive(state)}


def test_finished_requests_are_remembered_up_to_a_number_of_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "MAX_REMEMBERED", 100)
    monkeypatch.setattr(book, "MIN_REMEMBERED", 40)
    for length in (20, 5):
        ids = [llm.generate([[5] * length], GREEDY)[0].request_id for _ in range(4)]
        with pytest.raises(InvalidRequest, match="no finished request"):
            llm.get_kv_cache_state(ids[1])
        assert [llm.get_kv_cache_state(id).num_tokens for id in ids[2:]] == [length + 20] * 2


# An engine in its own process


def test_states_outlive_a_crash_of_the_engine(tiny_llama: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(str(tiny_llama)) as llm, asyncio.timeout(60):
            [first] = await llm.agenerate(QUESTION, GREEDY)
            state = await llm.get_kv_cache_state(first.request_id)
            [expected] = await llm.agenerate(" more", GREEDY, kv_cache_state=state)
            assert expected.metrics.cached_tokens == state.num_tokens - 1
            os.kill(llm._frontend.replicas[0].link.pid, signal.SIGKILL)
            [output] = await llm.agenerate(" more", GREEDY, kv_cache_state=state)
            assert output.outputs == expected.outputs
            [output] = await llm.agenerate(" more", GREEDY, kv_cache_state=state)
            assert output.metrics.cached_tokens >= state.num_tokens - 1
            stream = [increment async for increment in llm.generate(" more", GREEDY, kv_cache_state=state)]
            assert "".join(increment.text for increment in stream) == expected.text
            state.drop()
            with pytest.raises(InvalidKVState):
                await llm.agenerate(" more", GREEDY, kv_cache_state=state)

    asyncio.run(main())
