"""Scores of (query, document) pairs, judged by a generative model: P(yes) / (P(yes) + P(no)).

The prompt describes the pair and ends where the answer begins. It is that of Qwen3-Reranker (Zhang et al., "Qwen3
Embedding", 2025), in the chat template of the model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from octavo.engine.messages import EngineInfo, Pooling
from octavo.errors import InvalidRequest
from octavo.outputs import RequestOutput, ScoringOutput, ScoringRequestOutput
from octavo.params import Terms
from octavo.text import Tokenizer

from .pooled import pooled_requests, vector_of
from .requests import Prompt, Request, encode

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
LABELS = ("yes", "no")
MAX_TEMPLATE = 16_384  # characters
MAX_CHARACTERS = 8 << 20  # of all prompts of a call, which repeat the query

_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "{yes}" or "{no}".'
)
_USER = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
_PLAIN = f"{_SYSTEM}\n\n{_USER}\n<Answer>:\n"
_PLACEHOLDERS = re.compile(r"\{(query|document|instruction|yes|no)\}")


@dataclass(frozen=True, slots=True)
class ScoringParams:
    """How pairs are judged.

    Attributes:
        template: the prompt, with the placeholders {query} and {document}, and optionally {instruction}, {yes} and
            {no}; None for the default prompt.
        instruction: what makes a document relevant.
        labels: the answers for a relevant and an irrelevant document. Each is one token: its text, or its id.
    """

    template: str | None = None
    instruction: str = INSTRUCTION
    labels: tuple[str | int, str | int] = LABELS

    def __post_init__(self) -> None:
        """Check the values. Raises InvalidRequest."""
        if not (isinstance(self.labels, (list, tuple)) and len(self.labels) == 2):
            raise InvalidRequest("labels must be two tokens: for relevant and for irrelevant documents", "labels")
        if not isinstance(self.instruction, str) or len(self.instruction) > MAX_TEMPLATE:
            raise InvalidRequest(f"instruction must be a text of at most {MAX_TEMPLATE:,} characters", "instruction")
        if self.template is None:
            return
        if not isinstance(self.template, str) or len(self.template) > MAX_TEMPLATE:
            raise InvalidRequest(f"template must be a text of at most {MAX_TEMPLATE:,} characters", "template")
        if not {"query", "document"} <= set(_PLACEHOLDERS.findall(self.template)):
            raise InvalidRequest("template must contain {query} and {document}", "template")


def pairs_of(data_1: str | Sequence[str], data_2: str | Sequence[str]) -> list[tuple[str, str]]:
    """Return (query, document) pairs: one query with each document, or the i-th query with the i-th document.

    Raises InvalidRequest.
    """
    queries, documents = ([each] if isinstance(each, str) else list(each) for each in (data_1, data_2))
    if not queries or not documents or not all(isinstance(text, str) for text in (*queries, *documents)):
        raise InvalidRequest("queries and documents must be texts, at least one of each", "data_1")
    if len(queries) == 1:
        queries *= len(documents)
    if len(queries) != len(documents):
        message = f"there must be one query, or as many as documents: {len(documents)}, not {len(queries)}"
        raise InvalidRequest(message, "data_1")
    return list(zip(queries, documents, strict=True))


def score_requests(
    pairs: list[tuple[str, str]],
    scoring: ScoringParams,
    tokenizer: Tokenizer,
    info: EngineInfo,
    priority: int = 0,
    terms: Terms | None = None,
) -> list[Request]:
    """Make a request of each pair, for the logits of both labels after its prompt.

    Renders a chat and tokenizes all pairs, so on an event loop, call it in a thread. Raises InvalidRequest,
    PromptTooLong.
    """
    labels = [_label(label, tokenizer) for label in scoring.labels]
    if labels[0] == labels[1]:
        raise InvalidRequest("labels must be two different tokens", "labels")
    template, is_chat = _template(scoring, tokenizer)
    fixed = {"instruction": scoring.instruction, **_names(scoring, tokenizer)}
    length = sum(map(len, fixed.values())) + len(template)
    if sum(len(query) + len(document) + length for query, document in pairs) > MAX_CHARACTERS:
        raise InvalidRequest(f"the prompts of all pairs have more than {MAX_CHARACTERS:,} characters", "documents")
    texts = [_filled(template, {**fixed, "query": query, "document": document}) for query, document in pairs]
    prompts = [encode(text, tokenizer, info, None, add_special_tokens=not is_chat) for text in texts]
    return pooled_requests(cast("list[Prompt]", prompts), Pooling(None, labels), priority, terms)


def share_prefix(pairs: list[tuple[str, str]]) -> bool:
    """Return whether the prompts of all pairs begin with the same query."""
    return len(pairs) > 1 and len({query for query, _ in pairs}) == 1


def score_of(output: RequestOutput) -> float:
    """Return P(first label) / (P(first label) + P(second label))."""
    yes, no = vector_of(output).astype(np.float64)
    return float(1 / (1 + np.exp(np.minimum(no - yes, 700.0))))  # beyond, exp overflows


def scoring_output(output: RequestOutput) -> ScoringRequestOutput:
    """Return the output of `score` for a pair."""
    pooled = ScoringOutput(score_of(output))
    return ScoringRequestOutput(output.request_id, pooled, output.prompt_token_ids, output.num_cached_tokens)


def _template(scoring: ScoringParams, tokenizer: Tokenizer) -> tuple[str, bool]:
    """Return the prompt with placeholders, and whether it is a rendered chat.

    The chat template is rendered once, around the placeholders.
    """
    if scoring.template is not None:
        return scoring.template, False
    if not tokenizer.has_chat_template:
        return _PLAIN, False
    variables = {"enable_thinking": False}
    try:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        return tokenizer.chat(messages, **variables), True
    except InvalidRequest:  # some templates refuse system messages
        return tokenizer.chat([{"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}], **variables), True


def _filled(template: str, values: dict[str, str]) -> str:
    """Return a template with its placeholders replaced. Placeholders in the values stay as they are."""
    return _PLACEHOLDERS.sub(lambda found: values[found[1]], template)


def _label(label: str | int, tokenizer: Tokenizer) -> int:
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < tokenizer.vocab_size:
            raise InvalidRequest(f"labels must be tokens below {tokenizer.vocab_size}, not {label}", "labels")
        return label
    tokens = tokenizer.encode(label, add_special_tokens=False) if isinstance(label, str) and len(label) < 256 else []
    if len(tokens) != 1:
        message = f"each label must be one token of the model; {str(label)[:40]!r} has {len(tokens)}"
        raise InvalidRequest(message, "labels")
    return tokens[0]


def _names(scoring: ScoringParams, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of both labels, for the prompt."""
    texts = [label if isinstance(label, str) else tokenizer.token_text(label) for label in scoring.labels]
    return dict(zip(("yes", "no"), (text.strip() for text in texts), strict=True))
