"""A model divided over two GPUs behind a server, in Triton's interpreter: a dead rank loses no request."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from rank_requests import ranks_of
from server_process import ServerProcess

pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed; it comes with octavo[cuda]")

FLAGS = ["--device", "cuda", "-tp", "2", "--kv-cache-memory", "1MiB"]
FLAGS += ["--max-model-len", "64", "--max-batch-size", "2", "--max-batch-tokens", "32"]
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0.8, "seed": 3, "ignore_eos": True}


def test_a_dead_rank_loses_no_request(tiny_model: Callable[[str], Path]) -> None:
    with ServerProcess(tiny_model("llama-ranks"), *FLAGS, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") as server:
        assert "2 GPUs, each with its part of the weights" in server.banner
        url = f"{server.url}/v1/completions"
        expected = httpx.post(url, json=BODY, timeout=120).raise_for_status().json()["choices"][0]["text"]
        ranks, text = ranks_of(server.engine_pid()), ""
        assert len(ranks) == 1
        with httpx.stream("POST", url, json=BODY | {"stream": True}, timeout=120) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    while ranks:
                        os.kill(ranks.pop(), signal.SIGKILL)
        assert text == expected
        assert "rank 1 has ended: killed by SIGKILL" in server.stderr()
