"""The Python API, as a user of vLLM would use it, on a tiny random model."""

import asyncio
import shutil
import threading

import numpy as np
import pytest

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, EngineDead, InvalidRequest, ModelNotFound, OutOfMemory, PromptTooLong
from octavo.frontend.requests import make_request

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_text_ids_and_lists_are_prompts(llm):
    text = "The class statement"
    ids = llm.tokenizer.encode(text)
    one = llm.generate(text, GREEDY)
    assert len(one) == 1 and one[0].prompt == text and one[0].prompt_token_ids == ids
    assert one[0].finished and one[0].outputs[0].finish_reason == "length"
    assert len(one[0].outputs[0].token_ids) == 12
    assert one[0].text == one[0].outputs[0].text == llm.tokenizer.decode(one[0].outputs[0].token_ids)
    for outputs in (llm.generate(ids, GREEDY), llm.generate([text], GREEDY), llm.generate([ids, text], GREEDY)):
        assert {output.text for output in outputs} == {one[0].text}


def test_each_prompt_can_have_its_own_parameters(llm):
    lengths = [1, 5, 9]
    outputs = llm.generate(["a", "b", "c"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths])
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    with pytest.raises(InvalidRequest, match="3 prompts need one SamplingParams, or 3, not 2"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])


def test_seeds(llm):
    drawn = llm.generate("x = ", SamplingParams(max_tokens=12))[0]
    again = llm.generate("x = ", SamplingParams(max_tokens=12, seed=drawn.seed))[0]
    other = llm.generate("x = ", SamplingParams(max_tokens=12))[0]
    assert again.outputs == drawn.outputs and other.outputs != drawn.outputs


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = llm.generate("def f(", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))[0].text
    stop = whole[15:18]
    cut = llm.generate("def f(", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=[stop, "\0"]))[0]
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    llm.generate("b", SamplingParams(max_tokens=1))  # the engine hears of the end before it hears of this
    assert llm.stats().running == 0


def test_a_stop_token_ends_the_text_before_it(llm):
    tokens = llm.generate("def f(", GREEDY)[0].outputs[0].token_ids
    stop = tokens[4]
    cut = llm.generate("def f(", SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[stop], ignore_eos=True))
    completion = cut[0].outputs[0]
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert completion.text == llm.tokenizer.decode(tokens[: tokens.index(stop)])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_min_tokens_and_logit_bias(llm):
    (eos,) = llm.tokenizer.eos_token_ids
    soon = llm.generate("a", SamplingParams(temperature=0, max_tokens=40, logit_bias={eos: 100}))[0].outputs[0]
    assert soon.token_ids == [eos] and soon.text == "" and (soon.finish_reason, soon.stop_reason) == ("stop", None)
    later = llm.generate("a", SamplingParams(temperature=0, max_tokens=40, logit_bias={eos: 100}, min_tokens=7))[0]
    assert len(later.outputs[0].token_ids) == 8 and eos not in later.outputs[0].token_ids[:7]


def test_logprobs(llm):
    output = llm.generate("a", SamplingParams(max_tokens=6, seed=1, logprobs=4, ignore_eos=True))[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 6
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entry)) == token and len(entry) in (4, 5)
        ranked = sorted(entry.values(), key=lambda item: item.rank)
        assert [item.logprob for item in ranked] == sorted((item.logprob for item in ranked), reverse=True)
        assert [item.rank for item in ranked[:4]] == [1, 2, 3, 4]
    assert output.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True))
    )


def test_the_last_token_that_fits_is_the_last(llm):
    prompt = [5] * 500
    output = llm.generate(prompt, SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 12 and output.outputs[0].finish_reason == "length"
    with pytest.raises(PromptTooLong, match="has 512 tokens; the model's context of 512 has room for at most 511"):
        llm.generate([5] * 512)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the prompt is empty"), ([], "the prompt is empty"), ([512], "from 0 to 511"), ([-1], "from 0 to 511")],
)
def test_bad_prompts(llm, prompt, message):
    with pytest.raises(InvalidRequest, match=message):
        llm.generate([prompt])
    assert llm.generate("still there", GREEDY)[0].finished


def test_token_ids_may_be_numpy_s(llm):
    expected = llm.generate([[5, 6]], GREEDY)[0].outputs[0].token_ids
    for prompts in (np.array([5, 6]), np.array([[5, 6]]), [np.array([5, 6])], [np.int64(5), np.int32(6)]):
        [output] = llm.generate(prompts, GREEDY)
        assert output.prompt_token_ids == [5, 6] and output.outputs[0].token_ids == expected
    for wrong in ([np.array([5.0, 6.0])], [np.array([True])], [np.array([[[5]]])]):
        with pytest.raises(InvalidRequest):
            llm.generate(wrong, GREEDY)


@pytest.mark.parametrize("messages", [5, None, "hi", [{"role": "user", "content": b"hi"}]])
def test_messages_that_are_none(llm, messages):
    with pytest.raises(InvalidRequest, match="messages"):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -2}, {"n": 0},
        {"max_tokens": -1}, {"min_tokens": 20}, {"stop": [""]}, {"logprobs": -2}, {"repetition_penalty": 0},
        {"presence_penalty": 3}, {"logit_bias": {1: 101}}, {"seed": 2**64}, {"temperature": "hot"}, {"n": True},
        {"stop_token_ids": [-1]}, {"frequency_penalty": float("inf")}, {"ignore_eos": 1}, {"min_p": 2},
    ],
)  # fmt: skip
def test_parameters_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        SamplingParams(**wrong)
    assert "\n" not in str(error.value) and error.value.param == name


def test_one_bad_prompt_starts_nothing(llm):
    before = llm.stats().tokens_generated
    with pytest.raises(InvalidRequest):
        llm.generate(["good", ""], GREEDY)
    assert llm.generate("good", GREEDY)[0].finished
    assert llm.stats().tokens_generated == before + 12


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "Hello"}]
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
    assert llm.chat(messages, GREEDY)[0].prompt_token_ids == ids
    assert [output.prompt_token_ids for output in llm.chat([messages, messages], GREEDY)] == [ids, ids]


def test_the_limits_of_chat_templates_are_settings(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    messages = [{"role": "user", "content": "Hello"}]
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for source, settings, problem in (
        (loop, {"chat_template_timeout": 0.05}, "took longer than 0.05 s"),
        ("{{ 'x' * 30000000 }}", {"chat_template_memory": "10MiB"}, "too much memory"),
    ):
        (folder / "chat_template.jinja").write_text(source)
        with LLM(str(folder), **settings) as llm, pytest.raises(InvalidRequest, match=problem):
            llm.chat(messages, GREEDY)


def test_agenerate_joins_batches(llm):
    async def main():
        one, other = await asyncio.gather(llm.agenerate("a", GREEDY), llm.agenerate(["b", "c"], GREEDY))
        return [output.text for output in one + other]

    steps = llm.stats().steps
    together = asyncio.run(main())
    assert llm.stats().steps - steps < 3 * 12
    assert together == [llm.generate(prompt, GREEDY)[0].text for prompt in "abc"]


def test_a_cancelled_task_frees_its_pages(llm):
    async def main():
        task = asyncio.create_task(llm.agenerate("a", SamplingParams(max_tokens=400, ignore_eos=True)))
        while llm.stats().running == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    llm.generate("b", SamplingParams(max_tokens=1))  # the abort comes before this in the engine's inbox
    stats = llm.stats()
    assert stats.running == 0 and stats.free_pages + stats.cached_pages == stats.num_pages


def test_stream(llm):
    increments = list(llm.stream("import ", GREEDY))
    assert "".join(increment.outputs[0].text for increment in increments) == llm.generate("import ", GREEDY)[0].text
    assert [increment.finished for increment in increments] == [False] * (len(increments) - 1) + [True]
    for increment in llm.stream("import ", SamplingParams(max_tokens=400, ignore_eos=True)):
        assert not increment.finished
        break
    llm.generate("b", SamplingParams(max_tokens=1))
    assert llm.stats().running == 0


def test_many_threads(llm):
    expected = {prompt: llm.generate(prompt, GREEDY)[0].text for prompt in "abcdefgh"}
    got: dict[str, str] = {}

    def work(prompt: str) -> None:
        got[prompt] = llm.generate(prompt, GREEDY)[0].text

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_shutdown_ends_what_runs(tiny_llama):
    llm = LLM(str(tiny_llama))
    stream = llm.stream("a", SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    llm.shutdown()
    with pytest.raises(EngineDead):
        list(stream)
    with pytest.raises(EngineDead):
        llm.generate("a")


def test_a_sink_that_fails_ends_its_own_request_only(llm):
    called = threading.Event()

    def sink(*_: object) -> None:
        called.set()
        raise ZeroDivisionError("a sink that fails")

    stream = llm.stream("a", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    llm._submit([make_request("b", SamplingParams(max_tokens=400, ignore_eos=True))], sink)
    assert sum(len(increment.outputs[0].token_ids) for increment in stream) == 99
    assert called.is_set()
    llm.generate("c", SamplingParams(max_tokens=1))
    assert llm.stats().running == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "no/such/model/here"}, ModelNotFound, "no/such/model/here"),
        ({"max_batchsize": 3}, ConfigError, "unknown setting 'max_batchsize': did you mean max_batch_size?"),
        ({"max_batch_size": 0}, ConfigError, "max_batch_size must be at least 1, not 0"),
        ({"kv_cache_page_size": 48}, ConfigError, "kv_cache_page_size must be a multiple of 32, not 48"),
        ({"kv_cache_dtype": "fp4"}, ConfigError, "kv_cache_dtype must be bf16 or int8, not 'fp4'"),
        ({"backend": "torch", "kv_cache_dtype": "int8"}, ConfigError, "kv_cache_dtype must be bf16 with the torch"),
        ({"kv_cache_memory": "lots"}, ConfigError, "kv_cache_memory must be a size such as 4GiB"),
        ({"kv_cache_memory": "1000TiB"}, OutOfMemory, ""),
        ({"kv_cache_memory": "1"}, OutOfMemory, "set kv_cache_memory to at least"),
        ({"max_model_len": 513}, ConfigError, "max_model_len must be at most the model's 512, not 513"),
        ({"tensor_parallel_size": 3}, ConfigError, "tensor_parallel_size must be 1, 2, 4 or 8"),
        ({"backend": "cpu", "dtype": "float32"}, ConfigError, "torch"),
    ],
)
def test_settings_that_cannot_work(tiny_llama, settings, error, message):
    with pytest.raises(error) as raised:
        LLM(**{"model": str(tiny_llama), **settings})
    assert message in str(raised.value) and "\n" not in str(raised.value)
