"""--max-new-tokens: the server's limit of every completion."""

from pathlib import Path

import httpx

from octavo import LLM, BeamSearchParams, SamplingParams
from server_process import ServerProcess


def test_no_completion_is_longer(tiny_llama: Path) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    with ServerProcess(tiny_llama, "--max_new_tokens", "5") as server, httpx.Client(base_url=server.url) as http:
        for path, prompt in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": hello})):
            for wanted, got in ((None, 5), (3, 3), (100, 5)):
                body = prompt | {"max_tokens": wanted, "ignore_eos": True, "temperature": 0}
                reply = http.post(path, json=body).raise_for_status().json()
                assert reply["usage"]["completion_tokens"] == got, (path, wanted)
                assert reply["choices"][0]["finish_reason"] == "length"
        beams = {"prompt": "x", "max_tokens": 30, "use_beam_search": True, "n": 2, "ignore_eos": True}
        assert http.post("/v1/completions", json=beams).json()["usage"]["completion_tokens"] == 10
        message = {"model": "tiny", "max_tokens": 50, "messages": hello, "ignore_eos": True}
        assert http.post("/v1/messages", json=message).json()["usage"]["output_tokens"] == 5


def test_in_python(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), max_new_tokens=4) as llm:
        [output] = llm.generate("x", SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 4
        [beams] = llm.beam_search("x", BeamSearchParams(beam_width=2, max_tokens=9, ignore_eos=True))
        assert all(len(beam.tokens) == len(output.prompt_token_ids) + 4 for beam in beams.sequences)
