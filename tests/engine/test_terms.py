"""The terms on which a request is served, from Python's keywords and from HTTP's fields to the engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AsyncLLM, SamplingParams, ServiceTerms
from octavo.engine.messages import EngineRequest
from octavo.errors import InvalidRequest
from octavo.server.openai.protocol import TENANT_HEADER
from server_process import COMPLETIONS, post, serving

SHORT = SamplingParams(max_tokens=1)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
ALL: dict[str, Any] = {"tenant": "ann", "ttft_target": 0.5, "timeout": 30, "cache_salt": "x"}


def terms_of(request: EngineRequest) -> tuple[Any, ...]:
    return request.priority, request.tenant, request.ttft_target, request.timeout, request.salt


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": 1001}, {"priority": -1001}, {"priority": 1.0}, {"priority": True}, {"priority": "high"},
        {"tenant": None}, {"tenant": 5}, {"tenant": "a" * 257}, {"tenant": "a\nb"}, {"tenant": "\ud800"},
        {"ttft_target": 0}, {"ttft_target": -1}, {"ttft_target": float("nan")}, {"ttft_target": "1"},
        {"timeout": 0.0}, {"timeout": float("inf")}, {"timeout": 86_401}, {"timeout": True},
        {"cache_salt": ""}, {"cache_salt": b"x"}, {"cache_salt": "a" * 257}, {"cache_salt": "\x1b[2J"},
    ],
)  # fmt: skip
def test_terms_out_of_range(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidRequest, match=f"^{name} must be ") as error:
        ServiceTerms(**wrong)
    assert error.value.param == name and "\n" not in str(error.value)


def test_the_ends_of_the_ranges_are_in_them() -> None:
    ServiceTerms(priority=-1000, tenant="a" * 256, ttft_target=1e-9, timeout=86_400, cache_salt="é" * 256)
    ServiceTerms(priority=1000, tenant="", ttft_target=None, timeout=None, cache_salt=None)


def test_keywords_of_llm_arrive(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EngineRequest] = []
    with LLM(str(tiny_llama)) as llm:
        engine = llm._frontend.replicas[0].link.engine
        add = engine.add
        monkeypatch.setattr(engine, "add", lambda request: asked.append(request) or add(request))
        llm.generate(["a", "b"], SHORT, priority=[3, -1], **ALL)
        llm.generate([5, 6], SamplingParams(max_tokens=1, n=2), priority=2)
        llm.chat([{"role": "user", "content": "a"}], SHORT, priority=4, **ALL)
        asyncio.run(llm.agenerate("a", SHORT, priority=5, **ALL))
        list(llm.stream("a", SHORT, priority=6, **ALL))
        assert sorted(map(terms_of, asked)) == sorted(
            [(priority, "ann", 0.5, 30, "x") for priority in (3, -1, 4, 5, 6)] + [(2, "", None, None, "")] * 2
        )
        asked.clear()
        text, ids = {"prompt": "a", "cache_salt": "mine"}, {"prompt_token_ids": [5, 6]}
        llm.generate(text, SHORT, cache_salt="ours")
        llm.generate([text, ids], SHORT, cache_salt="ours")
        list(llm.stream(ids, SHORT))
        assert [request.salt for request in asked] == ["mine", "mine", "ours", ""]
        assert asked[0].prompt == llm.tokenizer.encode("a") and asked[3].prompt == [5, 6]
        for wrong, said in (
            ({"prompt": "a", "salt": "x"}, "cannot have salt"),
            ({"cache_salt": "x"}, "string or"),
            (5.5, "string"),
        ):
            with pytest.raises(InvalidRequest, match=said):
                llm.generate([wrong], SHORT)
        with pytest.raises(InvalidRequest, match="cache_salt must be 1 to 256"):
            llm.generate({"prompt": "a", "cache_salt": ""}, SHORT)
        with pytest.raises(InvalidRequest, match="2 prompts need one priority, or 2, not 3"):
            llm.generate(["a", "b"], SHORT, priority=[1, 2, 3])
        with pytest.raises(InvalidRequest, match="timeout must be"):
            llm.generate("a", SHORT, timeout=-1)
        with pytest.raises(TypeError, match="tennant"):
            llm.generate("a", SHORT, tennant="ann")  # type: ignore[call-arg]


def test_keywords_of_async_llm_arrive(tiny_llama: Path) -> None:
    """All that the engine process is asked for is in the ledger, to be asked for again after a crash."""

    async def main() -> list[EngineRequest]:
        async with AsyncLLM(str(tiny_llama)) as llm:
            async for _ in llm.generate("a", LONG, "mine", priority=7, **ALL):
                batch = asyncio.ensure_future(llm.agenerate(["a", "b"], LONG, priority=[8, 9], tenant="bob"))
                await asyncio.sleep(0)
                asked = [request for live in llm._frontend._ledger for request in live.owed()]
                batch.cancel()
                return asked
        raise AssertionError

    asked = asyncio.run(main())
    assert list(map(terms_of, asked)) == [
        (7, "ann", 0.5, 30, "x"),
        (8, "bob", None, None, ""),
        (9, "bob", None, None, ""),
    ]


FIELDS = {"priority": 7, **ALL}


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_fields_and_header_arrive(tiny_llama: Path, path: str) -> None:
    """The header wins over the body, even if it is empty; two of them are one too many."""

    async def main() -> tuple[list[EngineRequest], bytes]:
        async with serving(tiny_llama) as (llm, _, address):
            sound = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
            body = {**sound, "max_tokens": 400, "ignore_eos": True, **FIELDS}
            open_ones = [
                await post(address, body, path, *[f"{TENANT_HEADER}: {name}" for name in names])
                for names in ([], ["carl"], [""])
            ]
            open_ones.append(await post(address, {**body, **dict.fromkeys(FIELDS)}, path))
            while len(asked := [request for live in llm._frontend._ledger for request in live.owed()]) < 4:
                await asyncio.sleep(0)
            reader, _ = await post(address, body, path, f"{TENANT_HEADER}: a", f"{TENANT_HEADER}: b")
            return asked, await reader.read()

    asked, refused = asyncio.run(main())
    assert sorted(map(terms_of, asked)) == sorted(
        [(7, tenant, 0.5, 30, "x") for tenant in ("ann", "carl", "")] + [(0, "", None, None, "")]
    )
    assert refused.startswith(b"HTTP/1.1 400 ")
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["param"] == "tenant"
