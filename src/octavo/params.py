"""How a request is sampled (SamplingParams), pooled (PoolingParams) and served (ServiceTerms), with vLLM's names and
defaults.

These classes are the only list of request parameters: command-line flags, HTTP fields and keywords are derived from
their fields. A field's description is its help text.
"""

import json
import math
from enum import Enum
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from .errors import InvalidRequest

MAX_LOGPROBS = 20  # OpenAI's limit, and the default of the setting max_logprobs
MAX_ALLOWED_TOKENS = 8192  # these are checked on the event loop, in some milliseconds
MAX_PATTERN, MAX_REPETITIONS = 256, 65_536  # of repetition_detection: tokens of a pattern, and how often it occurs
MAX_COMPLETIONS = 128  # of a prompt
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 1024
MAX_BAD_WORDS, MAX_BAD_CHARACTERS = 128, 4096  # these are tokenized on the event loop, in about two milliseconds
MAX_PRIORITY = 1000  # and at least -1000, so that aging makes up for any difference within hours
MAX_SECONDS = 86_400.0  # of a request's timeout or target
MAX_NAME = 256  # characters of a tenant's name or of a salt
MAX_INTEGER = 2**31 - 1
MAX_GRAMMAR = 131_072  # characters of a constraint of structured output, as JSON
MAX_CHOICES = 4096
_SHOWN = 200  # characters of a wrong value in an error message


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A constraint on the form of the output, with the names of vLLM's StructuredOutputsParams. Exactly one is set.

    A schema or a tag that is given as a dict is stored as JSON text.

    Raises:
        InvalidRequest: A ValueError, for no constraint or several, one of the wrong type, or one that is too large.
            The grammar itself is checked when a request is submitted.
    """

    json: Annotated[dict[str, Any] | str | None, Meta(description="JSON schema of the output.")] = None
    regex: Annotated[str | None, Meta(description="Regular expression that the whole output matches.")] = None
    choice: Annotated[list[str] | None, Meta(description="The output is one of these strings.")] = None
    grammar: Annotated[str | None, Meta(description="Grammar of the output, in Lark's syntax or in GBNF.")] = None
    json_object: Annotated[bool | None, Meta(description="The output is any JSON object.")] = None
    structural_tag: Annotated[
        dict[str, Any] | str | None,
        Meta(description="Tags in the output whose contents follow JSON schemas: structures and triggers."),
    ] = None
    disable_any_whitespace: Annotated[bool, Meta(description="JSON has no whitespace outside of strings.")] = False
    disable_additional_properties: Annotated[
        bool, Meta(description="Objects have only the properties that the JSON schema names.")
    ] = False
    whitespace_pattern: Annotated[
        str | None, Meta(description="Regular expression of the whitespace between the parts of JSON.")
    ] = None
    reasoning_end: Annotated[
        list[str] | None, Meta(description="Texts that end the reasoning, which the constraint does not apply to.")
    ] = None
    reasoning_start: Annotated[
        list[str] | None, Meta(description="Texts that begin it; if unset, the output begins within the reasoning.")
    ] = None
    reasoning_format: Annotated[
        str | None, Meta(description="harmony for gpt-oss, whose reasoning is in messages of its own.")
    ] = None

    def __post_init__(self) -> None:
        fields = _Fields(self)
        if self.json_object is not None:
            fields.need(type(self.json_object) is bool, "json_object", "true or false")
        given = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise InvalidRequest(
                f"structured_outputs must have exactly one of {', '.join(CONSTRAINTS)}, not {names}",
                "structured_outputs",
            )
        for name in ("json", "structural_tag"):
            fields.json_text(name, MAX_GRAMMAR)
        for name in ("regex", "grammar", "whitespace_pattern"):
            text = getattr(self, name)
            ok = text is None or (isinstance(text, str) and 1 <= len(text) <= MAX_GRAMMAR)
            fields.need(ok, name, f"a string of 1 to {MAX_GRAMMAR:,} characters")
        if self.choice is not None:
            what = f"a list of 1 to {MAX_CHOICES:,} strings, of at most {MAX_GRAMMAR:,} characters together"
            fields.texts("choice", MAX_CHOICES, MAX_GRAMMAR, what)
            fields.need(isinstance(self.choice, list) and 0 < sum(map(len, self.choice)) <= MAX_GRAMMAR, "choice", what)
        fields.flag("disable_any_whitespace")
        fields.flag("disable_additional_properties")
        for name in ("reasoning_end", "reasoning_start"):
            if getattr(self, name) is not None:
                fields.texts(name, MAX_STOP_STRINGS, MAX_STOP_CHARACTERS, f"a list of 1 to {MAX_STOP_STRINGS} strings")
        fields.need(
            self.reasoning_start is None or bool(self.reasoning_end), "reasoning_start", "set with reasoning_end"
        )
        fields.need(self.reasoning_format in (None, "harmony"), "reasoning_format", "harmony")


CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class RepetitionDetectionParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """When an output ends because it repeats itself, with vLLM's names: a pattern occurs `min_count` times in a row.

    Raises:
        InvalidRequest: A ValueError, for a value of the wrong type or out of range.
    """

    max_pattern_size: Annotated[int, Meta(description="Tokens of the longest pattern; 0 turns the detection off.")] = 0
    min_pattern_size: Annotated[int, Meta(description="Tokens of the shortest pattern; 0 means 1.")] = 0
    min_count: Annotated[int, Meta(description="Occurrences of a pattern in a row that end the output.")] = 0

    def __post_init__(self) -> None:
        fields = _Fields(self)
        fields.integer("max_pattern_size", 0, MAX_PATTERN, f"an integer from 0 to {MAX_PATTERN}")
        fields.integer("min_pattern_size", 0, self.max_pattern_size, "an integer from 0 to max_pattern_size")
        fewest = 2 if self.max_pattern_size else 0
        fields.integer("min_count", fewest, MAX_REPETITIONS, f"an integer from {fewest} to {MAX_REPETITIONS:,}")


class RequestOutputKind(Enum):
    """What each output of a stream holds, with vLLM's names."""

    CUMULATIVE = 0
    """All of the completion so far."""

    DELTA = 1
    """The part that is new since the output before."""

    FINAL_ONLY = 2
    """All of the request; there is a single output, at the end."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request. Requests with different parameters share batches at no cost.

    Logits pass through `logit_bias`, the penalties, `temperature`, `top_k`, `top_p` and `min_p`, in this order. Numbers
    may be numpy's; they are stored as plain Python numbers.

    Raises:
        InvalidRequest: A ValueError, for a value of the wrong type or out of range.
    """

    n: Annotated[int, Meta(description="Completions to generate for each prompt, 1 to 128.")] = 1
    temperature: Annotated[float, Meta(description="Randomness, 0 to 100; 0 always takes the most likely token.")] = 1.0
    top_p: Annotated[
        float, Meta(description="Sample from the smallest set of most likely tokens with at least this probability.")
    ] = 1.0
    top_k: Annotated[int, Meta(description="Sample from this many most likely tokens; 0 or -1: from all.")] = 0
    min_p: Annotated[
        float, Meta(description="Drop tokens less likely than this fraction of the most likely token's probability.")
    ] = 0.0
    max_tokens: Annotated[
        int | None,
        Meta(description="Maximum number of tokens to generate; if unset or too large, until the context is full."),
    ] = 16
    min_tokens: Annotated[
        int, Meta(description="Minimum number of tokens to generate before end-of-sequence or a stop ends the output.")
    ] = 0
    stop: Annotated[
        list[str] | str | None, Meta(description="End the output before this string; up to 16 strings.")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None, Meta(description="End the output at this token id; up to 1,024 ids.")
    ] = None
    seed: Annotated[
        int | None,
        Meta(description="Seed of sampling: the same seed gives the same text; if unset, a random one is drawn."),
    ] = None
    logprobs: Annotated[
        int | None,
        Meta(description="Return log-probabilities of this many most likely tokens; -1: of the whole vocabulary."),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        Meta(description="Return log-probabilities of the prompt's tokens, with this many most likely ones; -1: all."),
    ] = None
    presence_penalty: Annotated[
        float, Meta(description="Subtract this from the logits of tokens in the output, -2 to 2.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(description="Subtract this from a token's logit for each time it is in the output, -2 to 2.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Meta(description="Above 1: make tokens of the prompt and the output less likely.")
    ] = 1.0
    logit_bias: Annotated[
        dict[int, float] | None,
        Meta(description="Map of token ids to numbers that are added to their logits, -100 to 100."),
    ] = None
    bad_words: Annotated[list[str] | None, Meta(description="Words that never appear in the output; up to 128.")] = None
    allowed_token_ids: Annotated[
        list[int] | None, Meta(description="The output has only these tokens; up to 8,192 ids.")
    ] = None
    skip_special_tokens: Annotated[
        bool, Meta(description="Leave special tokens, such as those of the chat template, out of the text.")
    ] = True
    include_stop_str_in_output: Annotated[
        bool, Meta(description="End the text after the stop string or stop token, not before it.")
    ] = False
    detokenize: Annotated[bool, Meta(description="Convert the output to text, not only to token ids.")] = True
    truncate_prompt_tokens: Annotated[
        int | None,
        Meta(description="Keep only this many last tokens of the prompt; -1: as many as fit into the context."),
    ] = None
    ignore_eos: Annotated[bool, Meta(description="Continue after the end-of-sequence token.")] = False
    speculative_tokens: Annotated[
        int | None,
        Meta(description="Draft tokens per step; if unset, the engine's setting. They do not change the output."),
    ] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, Meta(description="Constraint on the form of the output: a JSON schema or a grammar.")
    ] = None
    best_of: Annotated[
        int | None,
        Meta(description="Completions to generate, of which the n with the highest cumulative logprob are returned."),
    ] = None
    repetition_detection: Annotated[
        RepetitionDetectionParams | None, Meta(description="End the output when it repeats itself.")
    ] = None
    thinking_token_budget: Annotated[
        int | None, Meta(description="Tokens after which the model's reasoning is ended; -1: no limit.")
    ] = None
    output_kind: Annotated[
        RequestOutputKind, Meta(description="What each output of a stream holds; not a field of HTTP requests.")
    ] = RequestOutputKind.DELTA

    def __post_init__(self) -> None:
        fields = _Fields(self)
        need, number, integer = fields.need, fields.number, fields.integer
        integer("n", 1, MAX_COMPLETIONS, f"an integer from 1 to {MAX_COMPLETIONS}")
        number("temperature", 0.0, 100.0, "a number from 0 (greedy) to 100")
        number("top_p", 0.0, 1.0, "a number above 0 and at most 1")
        need(self.top_p > 0, "top_p", "a number above 0 and at most 1")
        integer("top_k", -1, MAX_INTEGER, f"how many tokens to keep, at most {MAX_INTEGER:,}, or 0 for all")
        number("min_p", 0.0, 1.0, "a number from 0 to 1")
        if self.max_tokens is not None:
            integer("max_tokens", 0, MAX_INTEGER, f"an integer of at least 0 and at most {MAX_INTEGER:,}")
        integer("min_tokens", 0, MAX_INTEGER, f"an integer of at least 0 and at most {MAX_INTEGER:,}")
        limit = self.max_tokens
        need(limit is None or self.min_tokens <= limit, "min_tokens", f"at most max_tokens ({limit})")
        if self.stop is not None:
            limits = f"{MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS:,} characters"
            fields.texts("stop", MAX_STOP_STRINGS, MAX_STOP_CHARACTERS, f"a string or a list of at most {limits}")
        if self.stop_token_ids is not None:
            fields.token_ids("stop_token_ids", 1024, "a list of at most 1,024 token ids")
        if self.seed is not None:
            integer("seed", -(2**63), 2**64 - 1, "a 64-bit integer")
        for name in ("logprobs", "prompt_logprobs"):  # the setting max_logprobs limits them further
            if getattr(self, name) is not None:
                integer(name, -1, MAX_INTEGER, f"how many tokens to return, at most {MAX_INTEGER:,}, or -1 for all")
        number("presence_penalty", -2.0, 2.0, "a number from -2 to 2")
        number("frequency_penalty", -2.0, 2.0, "a number from -2 to 2")
        # At least 1e-30: logits are divided by it in float32.
        number("repetition_penalty", 1e-30, 100.0, "a number above 0 (at least 1e-30) and at most 100")
        if self.logit_bias is not None:
            fields.biases("logit_bias", 1024, "a map of at most 1,024 token ids to numbers from -100 to 100")
        if self.bad_words is not None:
            limits = f"{MAX_BAD_WORDS} strings of 1 to {MAX_STOP_CHARACTERS:,} characters"
            need(not isinstance(self.bad_words, str), "bad_words", f"a list of at most {limits}")
            fields.texts("bad_words", MAX_BAD_WORDS, MAX_STOP_CHARACTERS, f"a list of at most {limits}")
            total = f"at most {MAX_BAD_CHARACTERS:,} characters together"
            need(sum(map(len, self.bad_words)) <= MAX_BAD_CHARACTERS, "bad_words", total)
        if self.allowed_token_ids is not None:
            what = f"a list of 1 to {MAX_ALLOWED_TOKENS:,} token ids"
            fields.token_ids("allowed_token_ids", MAX_ALLOWED_TOKENS, what)
            need(bool(self.allowed_token_ids), "allowed_token_ids", what)
        for name in ("skip_special_tokens", "include_stop_str_in_output", "detokenize", "ignore_eos"):
            fields.flag(name)
        need(
            self.detokenize or not self.stop,
            "detokenize",
            "true if there are stop strings, which are found in the text",
        )
        if self.truncate_prompt_tokens is not None:
            what = f"an integer of at least 1 and at most {MAX_INTEGER:,}, or -1"
            integer("truncate_prompt_tokens", -1, MAX_INTEGER, what)
            need(self.truncate_prompt_tokens != 0, "truncate_prompt_tokens", what)
        if self.speculative_tokens is not None:
            integer("speculative_tokens", 0, 1024, "an integer from 0 to 1,024")
        if self.structured_outputs is not None:
            fields.struct("structured_outputs", StructuredOutputs, "an object with one constraint")
        if self.best_of is not None:
            integer("best_of", self.n, MAX_COMPLETIONS, f"an integer from n ({self.n}) to {MAX_COMPLETIONS}")
        if self.repetition_detection is not None:
            fields.struct("repetition_detection", RepetitionDetectionParams, "an object with max_pattern_size")
        if self.thinking_token_budget is not None:
            integer("thinking_token_budget", -1, MAX_INTEGER, f"an integer from 0 to {MAX_INTEGER:,}, or -1")
        need(isinstance(self.output_kind, RequestOutputKind), "output_kind", "a RequestOutputKind")

    @property
    def num_completions(self) -> int:
        """Return the number of completions to generate, of which `n` are returned."""
        return self.best_of or self.n

    @property
    def stop_strings(self) -> list[str]:
        """Return `stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else (self.stop or [])

    @property
    def penalized(self) -> bool:
        """Return whether any penalty is in effect."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters of a beam search, with vLLM's names and defaults.

    Raises:
        InvalidRequest: A ValueError, for a value of the wrong type or out of range.
    """

    beam_width: Annotated[int, Meta(description="Sequences that are continued at each step and returned, 1 to 128.")]
    max_tokens: Annotated[int, Meta(description="Maximum number of tokens to generate.")]
    ignore_eos: Annotated[bool, Meta(description="Continue after the end-of-sequence token.")] = False
    temperature: Annotated[
        float, Meta(description="No effect: beams are ranked by the logprobs of the model, as in vLLM.")
    ] = 0.0
    length_penalty: Annotated[
        float,
        Meta(description="Sequences are ranked by their logprob divided by this power of their length, -10 to 10."),
    ] = 1.0
    include_stop_str_in_output: Annotated[
        bool, Meta(description="Whether the text of an output has its end-of-sequence token.")
    ] = False
    skip_special_tokens: Annotated[bool, Meta(description="Leave special tokens out of the text.")] = True

    def __post_init__(self) -> None:
        fields = _Fields(self)
        fields.integer("beam_width", 1, MAX_COMPLETIONS, f"an integer from 1 to {MAX_COMPLETIONS}")
        fields.integer("max_tokens", 1, MAX_INTEGER, f"an integer from 1 to {MAX_INTEGER:,}")
        fields.number("temperature", 0.0, 100.0, "a number from 0 to 100")
        fields.number("length_penalty", -10.0, 10.0, "a number from -10 to 10")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            fields.flag(name)


class Terms(TypedDict, total=False):
    """Keyword arguments of every method that generates, besides `priority`; see ServiceTerms."""

    tenant: str
    ttft_target: float | None
    timeout: float | None
    cache_salt: str | None


class ServiceTerms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request is scheduled and isolated. These terms never change the tokens.

    Requests share cached prefixes only if they have the same tenant and the same `cache_salt`, so that other users
    cannot find out from response times whether a prompt was seen before.

    Raises:
        InvalidRequest: A ValueError, for a value of the wrong type or out of range.
    """

    priority: Annotated[int, Meta(description="-1000 to 1000, lower runs sooner (policy priority).")] = 0
    tenant: Annotated[
        str, Meta(description="User or group that the request is for, at most 256 printable characters (policy fair).")
    ] = ""
    ttft_target: Annotated[
        float | None, Meta(description="Target for the time to the first token, in seconds (policy deadline).")
    ] = None
    timeout: Annotated[
        float | None,
        Meta(description="Timeout in seconds, at most a day; if unset, the engine's request_timeout."),
    ] = None
    cache_salt: Annotated[
        str | None, Meta(description="Share cached prefixes only with the same salt, 1 to 256 printable characters.")
    ] = None

    def __post_init__(self) -> None:
        fields = _Fields(self)
        fields.integer("priority", -MAX_PRIORITY, MAX_PRIORITY, f"an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}")
        fields.name("tenant", 0, f"at most {MAX_NAME} printable characters")
        for param in ("ttft_target", "timeout"):
            if getattr(self, param) is not None:
                fields.number(param, 0.0, MAX_SECONDS, "a number of seconds, at most a day")
                fields.need(getattr(self, param) > 0, param, "a number of seconds, at most a day")
        if self.cache_salt is not None:
            fields.name("cache_salt", 1, f"1 to {MAX_NAME} printable characters")


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the hidden states of a prompt become an embedding.

    Raises:
        InvalidRequest: A ValueError, for a value of the wrong type or out of range.
    """

    pooling: Annotated[
        Literal["mean", "last"],
        Meta(description="mean: the mean of the hidden states of all tokens; last: that of the last token."),
    ] = "last"
    normalize: Annotated[bool, Meta(description="Scale embeddings to length 1.")] = True
    dimensions: Annotated[
        int | None, Meta(description="Keep only the first dimensions of embeddings, before they are normalized.")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        Meta(description="Keep only this many last tokens of the prompt; -1: as many as fit into the context."),
    ] = None

    def __post_init__(self) -> None:
        fields = _Fields(self)
        fields.need(self.pooling in ("mean", "last"), "pooling", "mean or last")
        fields.flag("normalize")
        if self.dimensions is not None:
            fields.integer("dimensions", 1, MAX_INTEGER, "an integer of at least 1")
        if self.truncate_prompt_tokens is not None:
            SamplingParams(truncate_prompt_tokens=self.truncate_prompt_tokens)  # checks it


class _Fields:
    """Checks fields of a frozen Struct, and stores each as the plain Python type that messages can carry.

    Every check raises InvalidRequest: "{param} must be {what}, not {value}".
    """

    def __init__(self, struct: msgspec.Struct):
        self._struct = struct

    def need(self, ok: bool, param: str, what: str) -> None:
        if not ok:
            value = getattr(self._struct, param)
            shown = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
            shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
            raise InvalidRequest(f"{param} must be {what}, not {shown}", param)

    def number(self, param: str, low: float, high: float, what: str) -> None:
        given = getattr(self._struct, param)
        value = _number(given)
        self.need(value is not None and low <= value <= high, param, what)
        self._store(param, given, value)

    def integer(self, param: str, low: int, high: int, what: str) -> None:
        given = getattr(self._struct, param)
        value = _integer(given)
        self.need(value is not None and low <= value <= high, param, what)
        self._store(param, given, value)

    def flag(self, param: str) -> None:
        given = getattr(self._struct, param)
        value = plain(given)
        self.need(type(value) is bool, param, "true or false")
        self._store(param, given, value)

    def name(self, param: str, shortest: int, what: str) -> None:
        # Names are shown on terminals, so they must be printable. Printable text can also be encoded as UTF-8.
        given = getattr(self._struct, param)
        ok = isinstance(given, str) and shortest <= len(given) <= MAX_NAME and given.isprintable()
        self.need(ok, param, what)
        self._store(param, given, str.__str__(given))

    def texts(self, param: str, most: int, longest: int, what: str) -> None:
        given = getattr(self._struct, param)
        values = [given] if isinstance(given, str) else _list(given)
        self.need(values is not None and len(values) <= most, param, what)
        self.need(all(isinstance(text, str) and 1 <= len(text) <= longest for text in values or ()), param, what)
        if isinstance(given, str):
            return self._store(param, given, str.__str__(given))
        self._store(param, given, [str.__str__(text) for text in values or ()])

    def token_ids(self, param: str, most: int, what: str) -> None:
        given = getattr(self._struct, param)
        values = _list(given)
        self.need(values is not None and len(values) <= most, param, what)
        ids = [_integer(value) for value in values or ()]
        self.need(all(id is not None and id >= 0 for id in ids), param, what)
        self._store(param, given, ids)

    def biases(self, param: str, most: int, what: str) -> None:
        given = getattr(self._struct, param)
        self.need(isinstance(given, dict) and len(given) <= most, param, what)
        pairs = [(_integer(key), _number(value)) for key, value in given.items()]
        for key, value in pairs:
            self.need(key is not None and key >= 0 and value is not None and -100 <= value <= 100, param, what)
        self._store(param, given, dict(pairs))

    def json_text(self, param: str, longest: int) -> None:
        """Store an object as JSON text; leave text as it is."""
        given = getattr(self._struct, param)
        if given is None:
            return
        what = f"a JSON object of at most {longest:,} characters"
        self.need(isinstance(given, str | dict), param, what)
        text = given
        if isinstance(given, dict):
            try:
                text = json.dumps(given, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError):
                raise InvalidRequest(f"{param} must be {what}", param) from None
        self.need(1 <= len(text) <= longest, param, what)
        self._store(param, given, text)

    def struct(self, param: str, kind: type[msgspec.Struct], what: str) -> None:
        """Store a dict as a struct of the class `kind`."""
        given = getattr(self._struct, param)
        value = given
        if isinstance(given, dict):
            if unknown := given.keys() - set(kind.__struct_fields__):
                raise InvalidRequest(f"{param} has no {min(map(str, unknown))}", param)
            value = kind(**given)
        self.need(isinstance(value, kind), param, what)
        self._store(param, given, value)

    def _store(self, param: str, given: Any, value: Any) -> None:
        if value is not given:
            msgspec.structs.force_setattr(self._struct, param, value)


def plain(value: Any) -> Any:
    """Convert a numpy or PyTorch number or array to Python numbers; return anything else unchanged."""
    convert = getattr(value, "tolist", None)
    return value if convert is None else convert()


def _integer(value: Any) -> int | None:
    """Return `value` as an int; None if it is not an integer. Booleans are not integers here."""
    if type(value) is int:
        return value
    value = plain(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    """Return `value` as a float; None if it is not a finite number. Booleans are not numbers here."""
    if type(value) is not float:
        value = plain(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        try:
            value = float(value)
        except OverflowError:
            return None
    return value if math.isfinite(value) else None


def _list(value: Any) -> list[Any] | None:
    """Convert a list, a tuple or a one-dimensional array to a list; return None for anything else."""
    value = plain(value)
    return list(value) if isinstance(value, list | tuple) else None
