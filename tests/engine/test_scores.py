"""Scores of pairs: against transformers' logits of the answers, and the prompts that are judged."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo import LLM, AsyncLLM, ScoringParams
from octavo.errors import InvalidRequest, PromptTooLong
from octavo.frontend.scoring import INSTRUCTION
from octavo.text import Tokenizer
from tiny_models import save_tiny_model

QUERY, DOCUMENTS = "What is a module?", ["A module is a file.", "Statements end with a line.", "{query} {yes}"]
LETTERS = ScoringParams(labels=("a", "b"))
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "a" or "b".'
)


def chat_of(document: str) -> list[dict[str, str]]:
    user = f"<Instruct>: {INSTRUCTION}\n<Query>: {QUERY}\n<Document>: {document}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def probability(folder: Path, tokens: list[int], labels: list[int]) -> float:
    """P(first) / (P(first) + P(second)), by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return float(model(torch.tensor([tokens])).logits[0, -1, labels].softmax(-1)[0])


def test_they_are_those_of_transformers(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    labels = [tokenizer.convert_tokens_to_ids(letter) for letter in "ab"]
    with LLM(str(tiny_llama), backend="torch", dtype="float32") as llm:
        outputs = llm.score(QUERY, DOCUMENTS, scoring_params=LETTERS)
    for document, output in zip(DOCUMENTS, outputs, strict=True):
        chat = chat_of(document)
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert output.prompt_token_ids == tokens
        assert output.outputs.score == pytest.approx(probability(tiny_llama, tokens, labels), abs=1e-5)
    assert len({output.outputs.score for output in outputs}) == len(DOCUMENTS)


def test_documents_share_the_pages_of_the_query_and_no_bit_changes(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), max_batch_tokens=48) as llm:
        outputs = llm.score(QUERY, DOCUMENTS, scoring_params=LETTERS)
        assert outputs[0].num_cached_tokens == 0
        assert all(output.num_cached_tokens > 32 for output in outputs[1:])
        for document, output in zip(DOCUMENTS, outputs, strict=True):
            [alone] = llm.score([QUERY], [document], scoring_params=LETTERS, cache_salt=document)
            assert alone.outputs == output.outputs
        pairs = llm.score([QUERY] * 3, DOCUMENTS, scoring_params=LETTERS)
        assert [pair.outputs for pair in pairs] == [output.outputs for output in outputs]
        turned = llm.score(
            QUERY, DOCUMENTS, scoring_params=ScoringParams(labels=("b", "a"), template="{query}{document}")
        )
        straight = llm.score(
            QUERY, DOCUMENTS, scoring_params=ScoringParams(labels=("a", "b"), template="{query}{document}")
        )
    for one, other in zip(turned, straight, strict=True):
        assert one.outputs.score + other.outputs.score == pytest.approx(1)


def test_they_do_not_depend_on_the_batch_size(tiny_llama: Path) -> None:
    """With one sampled row in a step, and prompts whose last chunk is one token."""
    expected = None
    for settings in ({}, {"max_batch_size": 1}, {"max_batch_tokens": 17}, {"speculative_tokens": 4}):
        with LLM(str(tiny_llama), **settings) as llm:  # type: ignore[arg-type]
            scores = [output.outputs.score for output in llm.score(QUERY, DOCUMENTS * 4, scoring_params=LETTERS)]
        assert scores == (expected := expected or scores)


def test_a_template_of_the_request(llm: LLM, tiny_llama: Path) -> None:
    """Placeholders in queries and documents are text. Labels may be token ids."""
    own = ScoringParams(template="Q {query} D {document} I {instruction} {yes}{no}", instruction="i", labels=(70, 71))
    [output] = llm.score("{document}", "{query}", scoring_params=own)
    tokenizer = Tokenizer.load(tiny_llama)
    names = tokenizer.decode([70]).strip() + tokenizer.decode([71]).strip()
    assert tokenizer.decode(output.prompt_token_ids) == "Q {document} D {query} I i " + names


def test_without_a_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("chat_template", "no_template"))
    with LLM(str(folder)) as llm:
        [output] = llm.score(QUERY, DOCUMENTS[0], scoring_params=LETTERS)
        text = llm.tokenizer.decode(output.prompt_token_ids)
    user = chat_of(DOCUMENTS[0])[1]["content"]
    assert text == f"{SYSTEM}\n\n{user}\n<Answer>:\n"


@pytest.mark.parametrize(
    "arguments, params, message",
    [
        (([], ["a"]), {}, "at least one"),
        ((["a", "b"], ["a"]), {}, "one query, or as many"),
        (("a", [5]), {}, "texts"),
        (("a", "b"), {"labels": ("a", "a")}, "different"),
        (("a", "b"), {"labels": ("a",)}, "two tokens"),
        (("a", "b"), {"labels": ("a", "several tokens")}, "one token"),
        (("a", "b"), {"labels": ("a", 512)}, "below 512"),
        (("a", "b"), {"template": "{query}"}, "must contain"),
        (("a" * 9, ["b" * 5000] * 2000), {"labels": ("a", "b")}, "characters"),
    ],
)
def test_what_is_refused(llm: LLM, arguments: tuple[object, object], params: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.score(*arguments, scoring_params=ScoringParams(**params))  # type: ignore[arg-type]


def test_a_document_that_is_too_long(llm: LLM) -> None:
    with pytest.raises(PromptTooLong):
        llm.score(QUERY, "word " * 600, scoring_params=LETTERS)


def test_with_asyncio(tiny_llama: Path) -> None:
    async def scenario() -> None:
        async with AsyncLLM(str(tiny_llama)) as llm, asyncio.timeout(60):
            outputs = await llm.score(QUERY, DOCUMENTS, scoring_params=LETTERS)
            with LLM(str(tiny_llama)) as same:
                expected = same.score(QUERY, DOCUMENTS, scoring_params=LETTERS)
            assert [output.outputs for output in outputs] == [output.outputs for output in expected]

    asyncio.run(scenario())
