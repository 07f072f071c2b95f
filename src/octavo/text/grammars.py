"""Structured output: compile StructuredOutputs to grammars, and follow a grammar token by token with llguidance."""

import json
import re
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from octavo.errors import InvalidRequest, shortened
from octavo.params import StructuredOutputs

from .structural_tags import enforced, lark_of

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

MAX_CACHED = 64  # compiled grammars, each of which takes up to some MiB
MAX_SECONDS = 1.0  # of processor time, for compiling a grammar and computing its first mask
MASK_SECONDS = 0.005  # of processor time for a mask of an output, on average, after the first
MASK_BURST = 0.1  # seconds by which the masks of an output may exceed this
SLOW_SECONDS = 0.001  # of processor time for a mask of a slow grammar, on average over its last masks
PACE_WEIGHT = 0.2  # of the latest mask in this average
MAX_FORCED = 1024  # bytes that are tokenized at once
MAX_ERROR = 300  # characters of an error message

_LARK_TEXT = re.compile(r""""(\\.|[^"\\])*"|/(?!/)(\\.|[^/\\])+/|//[^\n]*|\#[^\n]*""")  # strings, expressions, comments
_HARMONY = r"""
start: analysis* <|channel|> "final" <|message|> @answer
analysis: <|channel|> "analysis" <|message|> TEXT? <|end|> <|start|> "assistant"
TEXT: /(.|\n)+/
"""  # gpt-oss's messages: any on the channel of reasoning, then the answer. Names in <> are special tokens.
_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class GrammarError(Exception):
    """A grammar that cannot be followed any further, or not within the limits."""


@dataclass(slots=True)
class Pace:
    """How long the masks of a grammar take, in all outputs that follow it.

    Attributes:
        seconds: exponential moving average of the processor time of a mask.
    """

    seconds: float = 0.0

    def record(self, seconds: float) -> None:
        self.seconds += PACE_WEIGHT * (seconds - self.seconds)


class Matcher:
    """The position of one sequence in its grammar. Only one thread at a time may use it.

    Args:
        pace: that of the grammar.
        end_tokens: end-of-sequence tokens.
        mask: the mask of the first token, if it is known.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        pace: Pace,
        end_tokens: frozenset[int] = frozenset(),
        mask: bytes | None = None,
    ):
        self._matcher = matcher
        self._pace = pace
        self._end_tokens = end_tokens
        self._known = mask  # the mask of the next token, if it is known
        self._seconds = -MASK_BURST  # of processor time so far, less what the masks may take

    @property
    def is_slow(self) -> bool:
        """Return whether the grammar's last masks took long, in this or other outputs."""
        return self._pace.seconds > SLOW_SECONDS

    @property
    def is_stopped(self) -> bool:
        """Return whether the output is complete, and no token may follow."""
        return self._matcher.is_stopped()

    def is_end(self, token: int) -> bool:
        """Return whether `token` is an end-of-sequence token, which is not part of the text."""
        return token in self._end_tokens

    def accept(self, tokens: Iterable[int]) -> None:
        """Advance by tokens of the output. Raises GrammarError if the grammar does not allow them."""
        for token in tokens:
            self._known = None
            if not self._matcher.consume_token(token):
                raise GrammarError(_one_line(self._matcher.get_error()))

    def count_allowed(self, draft: "array[int]") -> int:
        """Return how many of the first draft tokens the grammar allows."""
        return self._matcher.validate_tokens(draft.tolist())

    def masks(self, draft: "array[int] | None" = None) -> list[bytes]:
        """Return the tokens allowed next, and those allowed after each draft token: a bit per token, in words of 32.

        Args:
            draft: tokens that the grammar allows.

        Raises:
            GrammarError: a limit is exceeded.
        """
        masks = [self._mask()]
        for token in draft or ():
            self.accept([token])
            masks.append(self._mask())
        if draft and not self._matcher.rollback(len(draft)):
            raise GrammarError(_one_line(self._matcher.get_error()))
        return masks

    def _mask(self) -> bytes:
        if self._known is not None:
            return self._known
        started = time.thread_time()
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(_one_line(self._matcher.get_error()))
        seconds = time.thread_time() - started
        self._pace.record(seconds)
        self._seconds += seconds - MASK_SECONDS
        if self._seconds > 0:
            raise GrammarError("the grammar is too complex: its masks take too long to compute")
        return mask


@dataclass(slots=True)
class _Compiled:
    """A compiled grammar: a matcher at its beginning, and the mask of the first token."""

    matcher: llguidance.LLMatcher
    mask: bytes
    end_tokens: frozenset[int]
    pace: Pace = field(default_factory=Pace)

    def copy(self) -> Matcher:
        return Matcher(self.matcher.deep_copy(), self.pace, self.end_tokens, self.mask)


class Grammars:
    """Compiles grammars for one tokenizer, and caches them. Safe to use from several threads.

    Args:
        max_seconds: of processor time, for compiling a grammar and computing its first mask.
    """

    def __init__(self, tokenizer: "Tokenizer", max_seconds: float = MAX_SECONDS):
        self._tokenizer = tokenizer
        self._max_seconds = max_seconds
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, outputs: StructuredOutputs) -> bool:
        """Return whether a grammar is in the cache, and mark it as recently used."""
        return self._find(outputs) is not None

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """Return the thread that compiles grammars, so that nothing else waits for them."""
        return ThreadPoolExecutor(1, "octavo-grammars")

    def matcher(self, outputs: StructuredOutputs, output: Iterable[int] = ()) -> Matcher:
        """Return a matcher behind the tokens `output`. Takes up to a second if the grammar is not in the cache.

        Raises:
            InvalidRequest: The grammar is malformed, or exceeds a limit.
            GrammarError: The grammar does not allow `output`.
        """
        matcher = self.find(outputs)
        if matcher is None:
            compiled = self._compile(outputs)
            with self._lock:
                self._compiled[repr(outputs)] = compiled
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            matcher = compiled.copy()
        matcher.accept(output)
        return matcher

    def find(self, outputs: StructuredOutputs) -> Matcher | None:
        """Return a matcher at the beginning of a grammar that is in the cache, or None. Takes less than 0.2 ms."""
        compiled = self._find(outputs)
        return None if compiled is None else compiled.copy()

    def _find(self, outputs: StructuredOutputs) -> _Compiled | None:
        key = repr(outputs)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
            return self._compiled.get(key)

    def _compile(self, outputs: StructuredOutputs) -> _Compiled:
        grammar, started = to_grammar(outputs, self._tokenizer), time.thread_time()
        limits = llguidance.LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        try:
            [mask] = Matcher(matcher, Pace()).masks()  # builds states of the lexer, which copies inherit
        except GrammarError as error:
            raise _invalid(str(error)) from None
        if time.thread_time() - started > self._max_seconds:
            raise _invalid("the grammar is too complex")
        return _Compiled(matcher, mask, self._tokenizer.eos_token_ids)

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        words = _Vocabulary(self._tokenizer)
        return llguidance.LLTokenizer(words, eos_token=sorted(self._tokenizer.eos_token_ids) or None)  # type: ignore[arg-type]


class _Vocabulary:
    """A tokenizer in the form that llguidance expects. Tokens without bytes are marked as special."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: "Tokenizer"):
        ids = range(tokenizer.last_token_id + 1)
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = min(tokenizer.eos_token_ids, default=0)
        self.tokens = [tokenizer.token_bytes(token) for token in ids]
        ends = tokenizer.eos_token_ids
        self.special_token_ids = [t for t in ids if tokenizer.is_special(t) or t in ends or not self.tokens[t]]
        special = frozenset(self.special_token_ids)
        self._ids = {word: token for token, word in enumerate(self.tokens) if token not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Return tokens for text that the grammar forces: the tokenizer's own if their bytes are those of the text."""
        data = (text.encode() if isinstance(text, str) else bytes(text))[:MAX_FORCED]
        try:
            ids = self._tokenizer.encode(data.decode(), add_special_tokens=False)
        except (UnicodeDecodeError, InvalidRequest):
            ids = []
        words = b"".join(self.tokens[token] for token in ids)
        return ids if words == data and not any(map(self._tokenizer.is_special, ids)) else self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        ids, at = list[int](), 0
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                if (token := self._ids.get(data[at : at + length])) is not None:
                    ids.append(token)
                    at += length
                    break
            else:
                break  # the vocabulary lacks a byte; llguidance continues without forced tokens
        return ids


def to_grammar(outputs: StructuredOutputs, tokenizer: "Tokenizer") -> str:
    """Return the grammar of an output in llguidance's form. Raises InvalidRequest."""
    grammar = _of_constraint(outputs)
    if outputs.reasoning_format == "harmony":
        return _after(_HARMONY, grammar)
    return _after(_reasoning(outputs, tokenizer), grammar) if outputs.reasoning_end else grammar


def _after(lark: str, grammar: str) -> str:
    """Return a grammar in Lark whose rule `answer` is another grammar."""
    [answer] = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**answer, "name": "answer"}]})


def _reasoning(outputs: StructuredOutputs, tokenizer: "Tokenizer") -> str:
    """Return the grammar of an output that begins with reasoning: always, or if it begins with a reasoning_start."""
    starts, ends = outputs.reasoning_start or [], outputs.reasoning_end or []
    special = {mark: f"<[{token}]>" for mark in starts + ends if (token := tokenizer.special_token(mark)) is not None}
    opening = " | ".join(special.get(start, json.dumps(start)) for start in starts)
    texts = " | ".join(json.dumps(end) for end in ends if end not in special)
    tokens = " | ".join(special[end] for end in ends if end in special)
    reasoning = [*(["until_text"] if texts else []), *([f"TEXT? ({tokens})"] if tokens else [])]
    lark = [
        f"start: (SPACE ({opening}) reasoning SPACE)? @answer" if starts else "start: reasoning SPACE @answer",
        f"reasoning: {' | '.join(reasoning)}",
        f"until_text[lazy]: PERHAPS ({texts})" if texts else "",
        "PERHAPS: /(.|\\n)*/",
        "TEXT: /(.|\\n)+/",
        "SPACE: /[ \\r\\n\\t]{0,8}/",
    ]
    return "\n".join(lark)


def _of_constraint(outputs: StructuredOutputs) -> str:
    try:
        if outputs.json is not None or outputs.json_object:
            return _of_schema(outputs)
        if outputs.regex is not None:
            return llguidance.LLMatcher.grammar_from_regex(outputs.regex)
        if outputs.choice is not None:
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in outputs.choice)
            return llguidance.LLMatcher.grammar_from_lark(f"start: {choices}")
        if outputs.structural_tag is not None:
            return llguidance.LLMatcher.grammar_from_lark(lark_of(_object(outputs.structural_tag, "structural_tag")))
        return llguidance.LLMatcher.grammar_from_lark(_without_special_tokens(any_to_lark(outputs.grammar or "")))
    except InvalidRequest:
        raise
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except Exception as error:  # llguidance's converters raise various types for malformed grammars
        raise _invalid(str(error)) from None


def _without_special_tokens(lark: str) -> str:
    """Return a grammar. Raises InvalidRequest if it names tokens, since special ones may end or forge a turn of a chat.

    llguidance's syntax for them is <name>, <[ids]> and <[^ids]>, outside of strings, regular expressions and comments.
    """
    if named := re.search(r"<[^\s>]+>", _LARK_TEXT.sub(" ", lark)):
        raise _invalid(f"a grammar cannot name tokens, such as {shortened(named.group(), 40)}")
    return lark


def _of_schema(outputs: StructuredOutputs) -> str:
    schema = {"type": "object"} if outputs.json is None else _object(outputs.json, "json")
    if outputs.disable_additional_properties:
        schema = _closed(schema)
    options: dict[str, Any] = {}
    if outputs.disable_any_whitespace:
        options["whitespace_flexible"] = False
    elif outputs.whitespace_pattern is not None:
        options["whitespace_pattern"] = outputs.whitespace_pattern
    return llguidance.LLMatcher.grammar_from_json_schema(enforced(schema), overrides=options)  # type: ignore[arg-type]


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties beyond those that it names."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value if key in ("enum", "const") else _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _object(text: Any, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _invalid(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid(f"{name} must be a JSON object")
    return value


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs cannot be used: {_one_line(reason)}", "structured_outputs")


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), MAX_ERROR)
