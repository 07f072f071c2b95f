"""Questions of /v1/decisions, as strict pydantic models: the options of each, and the answer that follows from them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from .protocol import Strict

MAX_OPTIONS = 255


class PredicateAnswer(msgspec.Struct, kw_only=True, tag_field="type", tag="predicate"):
    """How likely it is that a statement is true."""

    name: str | None
    probability: float


class ChoiceProbability(msgspec.Struct):
    value: str | bool
    probability: float


class ChoiceAnswer(msgspec.Struct, kw_only=True, tag_field="type", tag="choice"):
    """The likeliest choice. `confidence` is its probability."""

    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]


class LevelProbability(msgspec.Struct):
    """The probability of a level. `value` is its number, 0 for the first one."""

    label: str
    value: int
    probability: float


class ScoreAnswer(msgspec.Struct, kw_only=True, tag_field="type", tag="score"):
    """The expected number of the level. `confidence` is the probability of the likeliest level."""

    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


DecisionAnswer = PredicateAnswer | ChoiceAnswer | ScoreAnswer


def part_text(part: Any) -> Any:
    """Return a content part as a part of text, if it is one of JSON."""
    if isinstance(part, dict) and part.get("type") == "input_json" and isinstance(part.get("data"), (dict, list)):
        return {"type": "input_text", "text": json.dumps(part["data"], ensure_ascii=False)}
    return part


def _instructions(value: Any) -> Any:
    """Return text, also of a list of parts of text or JSON."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") if isinstance(part, dict) else None for part in map(part_text, value)]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("texts", "should be a string or an array of parts of text or JSON")
    return "\n".join(texts)  # type: ignore[arg-type]


class Question(Strict):
    """Base of the questions."""

    name: str | None = None
    instructions: Annotated[str, BeforeValidator(_instructions, json_schema_input_type=str | list[dict[str, Any]])]

    @property
    def options(self) -> list[str]:
        """Return the possible answers, as the model reads them."""
        raise NotImplementedError

    def answer(self, probabilities: Sequence[float]) -> DecisionAnswer:
        """Return the answer, given the probability of each option."""
        raise NotImplementedError


class Predicate(Question):
    """A statement about the input."""

    type: Literal["predicate"]

    @property
    def options(self) -> list[str]:
        """Return the possible answers."""
        return ["true", "false"]

    def answer(self, probabilities: Sequence[float]) -> PredicateAnswer:
        """Return the probability of the first option."""
        return PredicateAnswer(name=self.name, probability=probabilities[0])


class ChoiceOption(Strict):
    """One of several choices."""

    value: str | bool
    description: str | None = None


class Choice(Question):
    """A choice between unordered values, which must differ; a text and a boolean always do."""

    type: Literal["choice"]
    choices: Annotated[list[ChoiceOption], Field(min_length=2, max_length=MAX_OPTIONS)]

    @model_validator(mode="after")
    def _check(self) -> "Choice":
        if len({(type(choice.value), choice.value) for choice in self.choices}) < len(self.choices):
            raise PydanticCustomError("choices", "has two choices of the same value")
        return self

    @property
    def options(self) -> list[str]:
        """Return the possible answers."""
        return [_option(json.dumps(each.value, ensure_ascii=False), each.description) for each in self.choices]

    def answer(self, probabilities: Sequence[float]) -> ChoiceAnswer:
        """Return the likeliest choice, the first one of equal ones."""
        values = [choice.value for choice in self.choices]
        confidence = max(probabilities)
        return ChoiceAnswer(
            name=self.name,
            choice=values[probabilities.index(confidence)],
            confidence=confidence,
            probabilities=[ChoiceProbability(*each) for each in zip(values, probabilities, strict=True)],
        )


class ScoreLevel(Strict):
    """One of several levels."""

    label: str
    description: str | None = None


class Score(Question):
    """A rating of the input by levels, the lowest one first."""

    type: Literal["score"]
    levels: Annotated[list[ScoreLevel], Field(min_length=2, max_length=MAX_OPTIONS)]

    @property
    def options(self) -> list[str]:
        """Return the possible answers."""
        return [_option(level.label, level.description) for level in self.levels]

    def answer(self, probabilities: Sequence[float]) -> ScoreAnswer:
        """Return the mean of the levels' numbers, weighted by their probabilities."""
        return ScoreAnswer(
            name=self.name,
            score=sum(number * probability for number, probability in enumerate(probabilities)),
            confidence=max(probabilities),
            probabilities=[
                LevelProbability(level.label, number, probabilities[number]) for number, level in enumerate(self.levels)
            ],
        )


AnyQuestion = Annotated[Predicate | Choice | Score, Field(discriminator="type")]


def _option(text: str, description: str | None) -> str:
    return f"{text} ({description})" if description else text
