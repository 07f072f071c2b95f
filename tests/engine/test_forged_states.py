"""What a user's file may do: pages of a loaded state serve what continues that state, and nothing else."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from kv_state_turns import GREEDY, QUESTION, first_turn
from octavo import LLM, AsyncLLM
from octavo.errors import InvalidKVState
from octavo.formats.page_file import PageFile, write_page_file

LONG = QUESTION * 3
TURN = " more"


def forge(path: Path) -> None:
    """Replace the pages of a saved state by others, with correct checksums."""
    with PageFile(path) as file:
        header = file.header
        pages = [(key, np.full(header.page_bytes, 60 + i, np.uint8)) for i, key in enumerate(header.keys)]
    assert len(pages) > 3
    write_page_file(
        path,
        header.page_bytes,
        pages,
        fingerprint=header.fingerprint,
        tokens=header.tokens,
        metadata=header.metadata,
    )


@pytest.fixture(scope="module")
def saved(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "honest.kv"
    first_turn(llm, LONG).save(path)
    return path


@pytest.fixture(scope="module")
def forged(saved: Path) -> Path:
    path = saved.with_name("forged.kv")
    path.write_bytes(saved.read_bytes())
    forge(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(llm: LLM, saved: Path) -> tuple[list[int], list[int]]:
    """The prompt that continues the state, and its right answer."""
    tokens = llm.load_kv_cache_state(saved).token_ids + llm.tokenizer.encode(TURN, add_special_tokens=False)
    return tokens, llm.generate([tokens], GREEDY)[0].outputs[0].token_ids


def test_a_forged_state_serves_what_continues_it_and_nobody_else(
    tiny_llama: Path, forged: Path, undisturbed: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    prompt, expected = undisturbed
    with LLM(str(tiny_llama), kv_disk=str(tmp_path / "pages")) as victim:
        state = victim.load_kv_cache_state(forged)
        [disturbed] = victim.generate(TURN, GREEDY, kv_cache_state=state)
        assert disturbed.prompt_token_ids == prompt and disturbed.metrics.cached_tokens >= len(prompt) // 32 * 32 - 32
        assert disturbed.outputs[0].token_ids != expected, (
            "the forged pages are not used at all: the test shows nothing"
        )
        [beside] = victim.generate([prompt], GREEDY)
        state.drop()
        [after] = victim.generate([prompt], GREEDY)
        honest = victim.get_kv_cache_state(after.request_id)
        [turn] = victim.generate(" on", GREEDY, kv_cache_state=honest)
        [again] = victim.generate([turn.prompt_token_ids], GREEDY)
    assert beside.outputs[0].token_ids == after.outputs[0].token_ids == expected
    assert beside.metrics.cached_tokens == 0 and after.metrics.cached_tokens >= len(prompt) - 32
    assert turn.outputs == again.outputs
    with LLM(str(tiny_llama), kv_disk=str(tmp_path / "pages")) as restarted:
        [output] = restarted.generate([prompt], GREEDY)
    assert output.outputs[0].token_ids == expected and output.metrics.cached_tokens > 0


def test_what_is_computed_after_a_forged_state_stays_with_it(
    tiny_llama: Path, forged: Path, tmp_path: Path, always_fetch: None
) -> None:
    """The answer, later turns, states made of them and the files of those."""
    with LLM(str(tiny_llama)) as victim:
        state = victim.load_kv_cache_state(forged)
        [answer] = victim.generate(LONG, GREEDY, kv_cache_state=state)
        child = victim.get_kv_cache_state(answer.request_id)
        state.drop()
        [turn] = victim.generate(TURN, GREEDY, kv_cache_state=child)
        assert turn.metrics.cached_tokens == child.num_tokens - 1, "later turns find all pages, the file being closed"
        grandchild = victim.get_kv_cache_state(turn.request_id)
        grandchild.save(tmp_path / "grandchild.kv")
        whole = [turn.prompt_token_ids]
        [clean] = victim.generate(whole, GREEDY)
        assert clean.metrics.cached_tokens == 0
        loaded = victim.load_kv_cache_state(tmp_path / "grandchild.kv")
        [more] = victim.generate(TURN, GREEDY, kv_cache_state=loaded)
        assert more.metrics.cached_tokens == (loaded.num_tokens - 1) // 32 * 32
        [expected] = victim.generate(TURN, GREEDY, kv_cache_state=grandchild)
        assert more.outputs == expected.outputs
    with LLM(str(tiny_llama)) as other:
        assert other.generate(whole, GREEDY)[0].outputs == clean.outputs


def test_pages_under_other_keys_than_the_tokens_are_not_used(
    tiny_llama: Path, saved: Path, undisturbed: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    """A file whose pages claim to belong to another prompt changes neither that prompt's answer nor its own."""
    prompt, expected = undisturbed
    with PageFile(saved) as file:
        header = file.header
    junk = [(key, np.full(header.page_bytes, 61, np.uint8)) for key in header.keys]
    write_page_file(
        tmp_path / "a.kv",
        header.page_bytes,
        junk,
        fingerprint=header.fingerprint,
        tokens=[9] * 100,
        metadata=header.metadata,
    )
    with LLM(str(tiny_llama)) as victim:
        state = victim.load_kv_cache_state(tmp_path / "a.kv")
        [own] = victim.generate([[8]], GREEDY, kv_cache_state=state)
        [other] = victim.generate([prompt], GREEDY)
        [whole] = victim.generate([own.prompt_token_ids], GREEDY)
    assert other.outputs[0].token_ids == expected and own.outputs == whole.outputs
    assert own.metrics.cached_tokens == other.metrics.cached_tokens == 0


def test_an_engine_that_is_killed_keeps_them_apart(
    tiny_llama: Path, forged: Path, undisturbed: tuple[list[int], list[int]]
) -> None:
    prompt, expected = undisturbed

    async def main() -> None:
        async with AsyncLLM(str(tiny_llama)) as victim, asyncio.timeout(60):
            state = await victim.load_kv_cache_state(forged)
            [first] = await victim.agenerate(TURN, GREEDY, kv_cache_state=state)
            os.kill(victim._frontend.replicas[0].link.pid, signal.SIGKILL)
            [second] = await victim.agenerate(TURN, GREEDY, kv_cache_state=state)
            assert second.outputs == first.outputs and second.metrics.cached_tokens > 0
            assert second.outputs[0].token_ids != expected
            [clean] = await victim.agenerate([prompt], GREEDY)
            assert clean.outputs[0].token_ids == expected and clean.metrics.cached_tokens == 0

    asyncio.run(main())


def test_a_pipe_is_no_state(llm: LLM, tmp_path: Path) -> None:
    """Without a writer, to open one would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidKVState, match="not a regular file"):
        llm.load_kv_cache_state(tmp_path / "pipe")
