"""KV states in files: saved, loaded, damaged, of others."""

import asyncio
import itertools
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_state_turns import GREEDY, QUESTION, first_turn, small_llm
from octavo import LLM, AsyncLLM
from octavo.errors import EngineDead, InvalidKVState, QuotaExceeded, RequestFailed
from octavo.kv import root_key
from octavo.states import jobs as state_files
from octavo.states.file import save_state


@pytest.fixture(scope="module")
def reader(tiny_llama: Path) -> Iterator[LLM]:
    """Another engine, which computed nothing of what the first one saves."""
    with LLM(str(tiny_llama)) as llm:
        yield llm


def test_a_saved_state_goes_on_in_another_engine(llm: LLM, reader: LLM, tmp_path: Path) -> None:
    state = first_turn(llm, QUESTION * 3)
    [expected] = llm.generate(" more", GREEDY, kv_cache_state=state)
    state.save(tmp_path / "a.kv")
    assert stat.S_IMODE((tmp_path / "a.kv").stat().st_mode) == 0o600
    loaded = reader.load_kv_cache_state(tmp_path / "a.kv")
    assert loaded.token_ids == state.token_ids and loaded.id != state.id
    [output] = reader.generate(" more", GREEDY, kv_cache_state=loaded)
    assert output.outputs == expected.outputs
    assert output.metrics.cached_tokens == (state.num_tokens - 1) // 32 * 32
    further = reader.get_kv_cache_state(output.request_id)
    loaded.drop()
    [output] = reader.generate(" and more", GREEDY, kv_cache_state=further)
    assert output.metrics.cached_tokens == further.num_tokens - 1
    further.save(tmp_path / "a.kv")
    assert llm.load_kv_cache_state(tmp_path / "a.kv").token_ids == further.token_ids
    assert [file.name for file in tmp_path.iterdir()] == ["a.kv"]


def test_pages_are_held_while_they_are_written(tiny_llama: Path, tmp_path: Path) -> None:
    with LLM(str(tiny_llama)) as llm:
        state = first_turn(llm)
        state.save(tmp_path / "a.kv")
        state.drop()
        llm.generate("x", GREEDY)
        stats = llm.stats()
        assert stats.free_pages + stats.cached_pages == stats.num_pages


def test_steps_go_on_while_a_state_is_written_and_its_pages_stay(
    tiny_llama: Path, reader: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(path: Path, **content: Any) -> None:
        begun.set()
        assert go_on.wait(30)
        save_state(path, **content)

    monkeypatch.setattr(state_files, "save_state", slow)
    with small_llm(tiny_llama, pages=16) as llm:
        state = first_turn(llm, QUESTION * 2, cache_salt="slow")
        [expected] = llm.generate("x", GREEDY, kv_cache_state=state, cache_salt="slow")
        saving = threading.Thread(target=state.save, args=(tmp_path / "a.kv",))
        saving.start()
        assert begun.wait(30)
        state.drop()
        for token in range(10, 15):
            llm.generate([[token] * 300], GREEDY)  # 10 pages each
        go_on.set()
        saving.join(30)
    loaded = reader.load_kv_cache_state(tmp_path / "a.kv", cache_salt="slow")
    [output] = reader.generate("x", GREEDY, kv_cache_state=loaded, cache_salt="slow")
    assert output.outputs == expected.outputs
    assert output.metrics.cached_tokens == (loaded.num_tokens - 1) // 32 * 32


def test_pages_are_saved_from_lower_tiers_too(tiny_llama: Path, reader: LLM, tmp_path: Path) -> None:
    with small_llm(tiny_llama, pages=16, kv_disk=str(tmp_path / "disk")) as llm:
        state = first_turn(llm, QUESTION * 2, cache_salt="disk")
        llm.generate([[9] * 490], GREEDY)
        assert llm.stats().cached_tokens == 0
        state.save(tmp_path / "a.kv")
    loaded = reader.load_kv_cache_state(tmp_path / "a.kv", cache_salt="disk")
    [output] = reader.generate("x", GREEDY, kv_cache_state=loaded, cache_salt="disk")
    assert output.metrics.cached_tokens == (loaded.num_tokens - 1) // 32 * 32


def test_without_the_prefix_cache_a_state_is_tokens(tiny_llama: Path, llm: LLM, tmp_path: Path) -> None:
    with LLM(str(tiny_llama), enable_prefix_caching=False) as bare:
        state = first_turn(bare)
        state.save(tmp_path / "a.kv")
        outputs = bare.generate("x", GREEDY, kv_cache_state=[state])
        outputs += bare.generate("x", GREEDY, kv_cache_state=bare.load_kv_cache_state(tmp_path / "a.kv"))
    outputs += llm.generate("x", GREEDY, kv_cache_state=llm.load_kv_cache_state(tmp_path / "a.kv"))
    assert outputs[0].outputs == outputs[1].outputs == outputs[2].outputs
    assert outputs[1].metrics.cached_tokens == 0


def test_whose_file_it_is(llm: LLM, reader: LLM, tmp_path: Path) -> None:
    first_turn(llm, tenant="ann", cache_salt="secret").save(tmp_path / "a.kv")
    content = (tmp_path / "a.kv").read_bytes()
    assert b"ann" not in content and b"secret" not in content
    for terms in ({}, {"tenant": "ann"}, {"cache_salt": "secret"}, {"tenant": "annsecret"}):
        with pytest.raises(InvalidKVState, match="is of another tenant or cache_salt"):
            reader.load_kv_cache_state(tmp_path / "a.kv", **terms)
    state = reader.load_kv_cache_state(tmp_path / "a.kv", tenant="ann", cache_salt="secret")
    with pytest.raises(InvalidKVState, match="is of another tenant"):
        reader.generate("x", GREEDY, kv_cache_state=state)
    [output] = reader.generate("x", GREEDY, kv_cache_state=state, tenant="ann", cache_salt="secret")
    assert output.metrics.cached_tokens == (state.num_tokens - 1) // 32 * 32


def test_files_that_cannot_be_used(llm: LLM, tmp_path: Path) -> None:
    state = first_turn(llm)
    with pytest.raises(
        RequestFailed, match=r"cannot write the KV state .*/no/such/folder \(No such file or directory\)"
    ):
        state.save(tmp_path / "no/such/folder")
    with pytest.raises(InvalidKVState, match="No such file"):
        llm.load_kv_cache_state(tmp_path / "missing")
    (tmp_path / "text").write_text("a letter, not a state\n" * 9)
    with pytest.raises(InvalidKVState, match="not a file of KV pages"):
        llm.load_kv_cache_state(str(tmp_path / "text"))
    with pytest.raises(InvalidKVState, match="tokens beyond this model's vocabulary"):
        save_state(
            tmp_path / "crafted",
            tokens=[512],
            fingerprint=llm.info.fingerprint,
            metadata={"root": root_key(llm.info.fingerprint, "", "").hex()},
            page_bytes=32,
            pages=[],
        )
        llm.load_kv_cache_state(tmp_path / "crafted")


def test_the_quota_counts_what_is_loaded(llm: LLM, tiny_llama: Path, tmp_path: Path) -> None:
    state = first_turn(llm)
    state.save(tmp_path / "a.kv")
    with LLM(str(tiny_llama), kv_state_quota=state.num_tokens) as other:
        other.load_kv_cache_state(tmp_path / "a.kv")
        with pytest.raises(QuotaExceeded):
            other.load_kv_cache_state(tmp_path / "a.kv")


@pytest.mark.parametrize("recipe", [{"quantization": "8bit"}, {"kv_cache_page_size": 64}, {"kv_cache_dtype": "int8"}])
def test_other_models_and_recipes_are_refused(
    llm: LLM, tiny_llama: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    state = first_turn(llm)
    state.save(tmp_path / "a.kv")
    with LLM(str(tiny_llama), **recipe) as other:
        with pytest.raises(InvalidKVState, match="belongs to another model, quantization or layout"):
            other.load_kv_cache_state(tmp_path / "a.kv")
        with pytest.raises(InvalidKVState, match="belongs to another model, quantization or layout"):
            other.generate("x", GREEDY, kv_cache_state=state)


SALTS = itertools.count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_or_its_pages_are_computed_again(
    llm: LLM, reader: LLM, tmp_path: Path, data: st.DataObject
) -> None:
    salt = str(next(SALTS))  # so that the reader knows no page of it
    path = tmp_path / "a.kv"
    first_turn(llm, QUESTION * 2, cache_salt=salt).save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "truncated"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        # Of the ends of the file, where it says what it is, as often as of its many pages.
        anywhere = st.integers(0, len(content) - 1)
        at = data.draw(st.one_of(st.integers(0, 63), anywhere, st.integers(len(content) - 700, len(content) - 1)))
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        state = reader.load_kv_cache_state(path, cache_salt=salt)
    except InvalidKVState as error:
        assert "\n" not in str(error)
        return
    with state:
        [output] = reader.generate(" more", GREEDY, kv_cache_state=state, cache_salt=salt)
    [expected] = llm.generate([output.prompt_token_ids], GREEDY)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_file_that_vanishes(llm: LLM, reader: LLM, tmp_path: Path) -> None:
    state = first_turn(llm, cache_salt="vanishes")
    state.save(tmp_path / "a.kv")
    loaded = reader.load_kv_cache_state(tmp_path / "a.kv", cache_salt="vanishes")
    os.truncate(tmp_path / "a.kv", 0)
    (tmp_path / "a.kv").unlink()
    [output] = reader.generate("x", GREEDY, kv_cache_state=loaded, cache_salt="vanishes")
    [expected] = llm.generate("x", GREEDY, kv_cache_state=state, cache_salt="vanishes")
    assert output.outputs == expected.outputs and output.metrics.cached_tokens == 0


def test_files_and_an_engine_in_its_own_process(llm: LLM, tiny_llama: Path, tmp_path: Path) -> None:
    state = first_turn(llm, QUESTION * 3)
    state.save(tmp_path / "a.kv")
    [expected] = llm.generate(" more", GREEDY, kv_cache_state=state)

    async def main() -> None:
        async with AsyncLLM(str(tiny_llama)) as other, asyncio.timeout(60):
            loaded = await other.load_kv_cache_state(tmp_path / "a.kv")
            for _ in range(2):  # the second time in an engine that came after a crash
                [output] = await other.agenerate(" more", GREEDY, kv_cache_state=loaded)
                assert output.outputs == expected.outputs
                assert output.metrics.cached_tokens == (state.num_tokens - 1) // 32 * 32
                further = await other.get_kv_cache_state(output.request_id)
                os.kill(other._frontend.replicas[0].link.pid, signal.SIGKILL)
            with pytest.raises(EngineDead, match="the engine"):
                await further.save(tmp_path / "b.kv")
            await other.agenerate(" more", GREEDY, kv_cache_state=further)
            await further.save(tmp_path / "b.kv")
            with pytest.raises(RequestFailed, match="cannot write"):
                await further.save(tmp_path / "no/such/folder")
            with pytest.raises(InvalidKVState):
                await other.load_kv_cache_state(tmp_path / "missing")
            stats = await other.stats()
            assert stats.free_pages + stats.cached_pages < stats.num_pages

    asyncio.run(main())
    [output] = llm.generate(" more", GREEDY, kv_cache_state=llm.load_kv_cache_state(tmp_path / "b.kv"))
    [whole] = llm.generate([output.prompt_token_ids], GREEDY)
    assert output.outputs == whole.outputs
