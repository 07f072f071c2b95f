"""Bodies of the routes for embeddings and scores: those of OpenAI, vLLM, Jina and Cohere, as strict pydantic models."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, PlainValidator, ValidationError, create_model
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers

from octavo.errors import InvalidRequest
from octavo.frontend.scoring import INSTRUCTION, LABELS, ScoringParams
from octavo.params import PoolingParams, ServiceTerms
from octavo.server.errors import MAX_DETAILS, ApiError, invalid_body

from . import neutral_fields
from .neutral_fields import ANY
from .protocol import Parameters, Prompt, Strict, Whole, prompt_list, tenant_of

MAX_INPUTS = 2048  # of a request, as in OpenAI's API

_TERMS: dict[str, Any] = {
    name: (Parameters.model_fields[name].annotation, None) for name in ServiceTerms.__struct_fields__
}
Terms: Any = create_model("Terms", __base__=Strict, **_TERMS)


class PooledRequest(Terms):  # type: ignore[misc]
    """Base of the bodies."""

    neutral: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("request_id", "additional_data", "mm_processor_kwargs", "metadata"), ANY),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }

    model: str | None = None
    user: Any = None

    @classmethod
    def from_json(cls, body: Any) -> Self:
        """Make a request of a parsed body. Raises ApiError 400."""
        if isinstance(body, dict):
            if len(body) > MAX_DETAILS:
                raise ApiError(400, f"the body has {len(body)} fields", code="invalid_body")
            for name, value in body.items():
                if isinstance(value, list) and len(value) > MAX_INPUTS and not isinstance(value[0], (int, float)):
                    raise ApiError(400, f"{name} has {len(value)} entries; the limit is {MAX_INPUTS}", name)
            body = neutral_fields.without_neutral(body, cls.model_fields.keys(), cls.neutral)
        try:
            return cls.model_validate(body)  # type: ignore[no-any-return]
        except ValidationError as error:
            raise invalid_body(error) from None

    @property
    def user_id(self) -> str | None:
        """Return the end user whom the request names, if any, for sticky splits."""
        return self.user if isinstance(self.user, str) and self.user else None

    def terms(self, headers: Headers) -> dict[str, Any]:
        """Return the given fields of ServiceTerms, and the tenant. Raises InvalidRequest."""
        given = {name: value for name in ServiceTerms.__struct_fields__ if (value := getattr(self, name)) is not None}
        given["tenant"] = tenant_of(headers, self.tenant)
        ServiceTerms(**given)  # checks them
        return given


class EmbeddingRequest(PooledRequest):
    """The body of POST /v1/embeddings. `use_activation` is vLLM's newer name of `normalize`."""

    input: Annotated[list[str | list[int]], PlainValidator(prompt_list, json_schema_input_type=Prompt)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    pooling: str | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: Whole | None = None
    add_special_tokens: bool | None = None

    def pooling_params(self) -> PoolingParams:
        """Return how the hidden states become embeddings. Raises InvalidRequest."""
        given: dict[str, Any] = {
            "pooling": self.pooling,
            "normalize": self.use_activation if self.normalize is None else self.normalize,
            "dimensions": self.dimensions,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
        }
        return PoolingParams(**{name: value for name, value in given.items() if value is not None})


def _texts(value: Any) -> list[str]:
    """Return the texts of one document or several, each a string or an object with a text."""
    items = value if isinstance(value, list) else [value]
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("texts", "should be a text or an array of texts")
    return texts  # type: ignore[return-value]


_Text = str | dict[str, str]
Texts = Annotated[list[str], BeforeValidator(_texts, json_schema_input_type=_Text | list[_Text])]


class JudgedRequest(PooledRequest):
    """Base of the bodies of /score and /rerank. The answers are given as `labels` or as `label_token_ids`."""

    neutral: ClassVar[Mapping[str, Any]] = {
        **PooledRequest.neutral,
        **dict.fromkeys(("use_activation", "activation", "softmax"), (True,)),
    }

    instruction: str | None = None
    labels: list[str] | None = None
    label_token_ids: list[Whole] | None = None
    template: str | None = None

    def scoring_params(self) -> ScoringParams:
        """Return how pairs are judged. Raises InvalidRequest."""
        if self.labels is not None and self.label_token_ids is not None:
            raise InvalidRequest("give either labels or label_token_ids", "labels")
        labels: Any = self.labels or self.label_token_ids or LABELS
        return ScoringParams(self.template, self.instruction or INSTRUCTION, tuple(labels))


class ScoreRequest(JudgedRequest):
    """The body of POST /score. The pairs have three names in vLLM's versions, of which one is given."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    def data(self) -> tuple[list[str], list[str]]:
        """Return the queries and the documents. Raises ApiError 400."""
        names = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
        given = [pair for pair in names if any(getattr(self, name) is not None for name in pair)]
        if len(given) != 1 or any(getattr(self, name) is None for name in given[0]):
            raise ApiError(400, "the body must have text_1 and text_2, or queries and documents", "text_1")
        return getattr(self, given[0][0]), getattr(self, given[0][1])


class RerankRequest(JudgedRequest):
    """The body of POST /rerank. `top_n` 0 returns all documents."""

    query: str
    documents: Texts
    top_n: Whole | None = None
    return_documents: bool | None = None
