"""Tokenizer: text to token ids and back, with the special tokens and the chat template of a model."""

import json
import re
import sys
from array import array
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from octavo.config import TEMPLATE_MEMORY, TEMPLATE_SECONDS
from octavo.errors import (
    DamagedWeights,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    UnsupportedModel,
    shortened,
)
from octavo.formats.files import ModelPath, read_file
from octavo.formats.gguf import read_header

from .chat_template import ChatTemplate
from .gguf_vocabulary import WORD_REGEXES, tokenizer_from_metadata
from .token_bound import TokenBound, component_steps

if TYPE_CHECKING:
    from .grammars import Grammars

MAX_TOKENIZER_BYTES = 256 << 20  # limit for tokenizer.json; the largest known ones have about 40 MiB
MAX_SETTINGS_BYTES = 16 << 20  # limit for any other file
MAX_OTHER_TEMPLATES = 4  # whose processes are kept, besides the model's own template
PIECE = 1024  # characters; longer texts are tokenized in pieces of about this size
BOUND_FROM = 4  # characters per token of the limit: shorter texts are tokenized without computing the bound first
MAX_REMEMBERED = 4096  # pieces of at most 3 * PIECE bytes: about 10 MB, 60 MB at most
_LETTER_AND_SPACE = re.compile("[A-Za-z](?= [A-Za-z])")

# GGUF names one or two end tokens. If a vocabulary has these as control tokens, they end a text as well.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# The printable characters that stand for bytes in byte-level vocabularies (GPT-2's encoder.py, bytes_to_unicode).
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


class Tokenizer:
    """Converts text to token ids and back. Safe to use from several threads.

    Attributes:
        eos_token_ids: The tokens that end a text.
        bos_token_id: The token that begins a text, or None if the model has none.
        vocab_size: The number of tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: frozenset[int] = frozenset(),
        bos_token_id: int | None = None,
        template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        tool_template: str | None = None,
    ) -> None:
        """Wrap a tokenizer of the tokenizers library.

        Args:
            template: The source of the chat template.
            tool_template: The source of the template for chats with tools, if that is another one.
            special_tokens: Variables of the chat template, such as {"bos_token": "<s>"}.

        Raises:
            UnsupportedModel: The vocabulary is neither byte-level nor SentencePiece's.
        """
        backend.no_truncation()  # tokenizer.json may enable truncation and padding, which are meant for training
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._template = template
        self._tool_template = tool_template
        self._template_limits: dict[str, Any] = {}
        self._other_templates: dict[str, ChatTemplate] = {}  # by source: for tools, and of requests
        self._special_tokens = special_tokens or {}
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._whole_texts: dict[int, str | None] = {}
        self._byte_level, self._strip_first_space = _decoding(backend)
        self._cuts_before_spaces = _cuts_before_spaces(backend)

    @classmethod
    def load(
        cls, path: ModelPath, *, template_seconds: float = TEMPLATE_SECONDS, template_memory: int = TEMPLATE_MEMORY
    ) -> "Tokenizer":
        """Load the tokenizer of a directory with tokenizer.json, or of a .gguf file.

        Args:
            template_seconds, template_memory: Limits of a rendering, see ChatTemplate.

        Raises:
            ModelNotFound: A file is missing, may not be read, or is not a regular file.
            DamagedWeights: A file is damaged or too large.
            UnsupportedModel: The kind of vocabulary is not supported.
        """
        tokenizer = _from_directory(path) if path.is_dir() else _from_gguf(path)
        tokenizer._template_limits = {"seconds": template_seconds, "memory": template_memory}
        return tokenizer

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads from a directory."""
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {**self._special_tokens, "chat_template": self._template}
        generation = {"bos_token_id": self.bos_token_id, "eos_token_id": sorted(self.eos_token_ids)}
        for name, content in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Check that the model has an embedding for each token.

        Args:
            model_vocab_size: Rows of the model's embedding.

        Raises:
            DamagedWeights: A token's id is too large.
        """
        if (last := self.last_token_id) >= model_vocab_size:
            token = shortened(self.backend.id_to_token(last), 40)
            raise DamagedWeights(
                f"the tokenizer does not fit the model: token {token!r} has the id {last}, but the model's vocabulary "
                f"ends at {model_vocab_size - 1}; download the tokenizer and the weights of the same model"
            )

    @cached_property
    def last_token_id(self) -> int:
        """Return the largest token id, -1 if there is no token. Takes some 20 ms the first time."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """Return the main one of the tokens that end a text; None if there is none."""
        name = self._special_tokens.get("eos_token")
        token: int | None = None if name is None else self.backend.token_to_id(name)
        return min(self.eos_token_ids, default=None) if token is None else token

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens by their spelling in the vocabulary."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None, owner: Hashable = None
    ) -> list[int]:
        """Return the token ids of `text`. Special tokens that are spelled out in the text are recognized.

        Releases the GIL. If the vocabulary allows tokenizing a text in pieces, memory is bounded by `max_tokens`, not
        by the length of the text.

        Args:
            add_special_tokens: Put BOS before the text (and EOS after it) if the model requires it. Use False for the
                result of `chat`, since the template adds them.
            max_tokens: Maximum number of tokens, including special ones. Default: no limit.
            owner: Whose text it is. The beginnings of an owner's long texts are remembered, so that the next text with
                the same beginning is tokenized faster. An owner cannot find out another's texts by the time that its
                own take. Default: the text is not remembered.

        Raises:
            InvalidRequest: The text is not Unicode (lone surrogates).
            PromptTooLong: The text has more than `max_tokens` tokens.
        """
        _check_unicode(text)
        before, after = self._template_ids if add_special_tokens else ((), ())
        left = sys.maxsize if max_tokens is None else max_tokens - len(before) - len(after)
        if len(text) > BOUND_FROM * left and self._bound(text, left) > left:
            raise _too_long(max_tokens)
        ids = [*before]
        for piece in self._pieces(text):
            is_new = owner is None or not PIECE < len(piece.encode()) <= 3 * PIECE  # ends are mostly new
            piece_ids = self._encode(piece) if is_new else self._remembered(owner, piece)
            left -= len(piece_ids)
            if left < 0:
                raise _too_long(max_tokens)
            ids += piece_ids
        ids += after
        return ids

    @cached_property
    def _remembered(self) -> "Callable[[Hashable, str], array[int]]":
        """Return a function of an owner and a text that returns its tokens, and remembers them."""
        return lru_cache(MAX_REMEMBERED)(lambda owner, text: array("i", self._encode(text)))

    def _encode(self, text: str) -> list[int]:
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=False)  # encode() holds the GIL
        return encoding.ids

    def min_tokens(self, text: str, enough: int = sys.maxsize) -> int:
        """Return a lower bound of the number of tokens in `text`, without BOS and EOS, and without tokenizing it.

        Takes about 20 ms per megabyte, and tenths of a second the first time. Returns 0 if there is no better bound.

        Args:
            enough: Counting may stop beyond this number.

        Raises:
            InvalidRequest: The text is not Unicode (lone surrogates).
        """
        _check_unicode(text)
        return self._bound(text, enough)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8 become U+FFFD; unknown ids are skipped."""
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        text = b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strip_first_space else text

    def token_text(self, token: int) -> str:
        """Return the text of one token, which may be special. A part of a character becomes U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` adds to a text."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def whole_text(self, token: int) -> str | None:
        """Return the text that `token` adds to a text that ends with a complete character.

        Returns:
            "" for a special token, None if the token's bytes are not complete characters.
        """
        if token not in self._whole_texts:
            self._whole_texts[token] = "" if token in self._special_ids else _decoded(self.token_bytes(token))
        return self._whole_texts[token]

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def special_id(self, name: str) -> int | None:
        """Return the id of an added token, such as "<|fim_prefix|>"; None if there is no such token."""
        token: int | None = self.backend.token_to_id(name)
        return token if token in self._added_ids else None

    def special_token(self, name: str) -> int | None:
        """Return the id of a token that is not part of the text; None if it is text, or no token."""
        token = self.special_id(name)
        return token if token is not None and self.is_special(token) else None

    @property
    def leading_ids(self) -> list[int]:
        """Return the special tokens that `encode` puts before a text, such as BOS."""
        return self._template_ids[0]

    def chat(self, messages: list[dict[str, Any]], **template_kwargs: Any) -> str:
        """Return the prompt of a conversation. Encode it with add_special_tokens=False.

        Blocks the calling thread, usually for a fraction of a millisecond, at most for about two seconds.

        Args:
            messages: See `ChatTemplate.render`.
            template_kwargs: `add_generation_prompt`, `continue_final_message`, and variables of the model's template,
                such as `tools`.

        Raises:
            InvalidRequest: There is no template, it refuses the messages, or they exceed a limit.
        """
        template, variables = self._template_for(template_kwargs)
        return template.render(messages, **(self._special_tokens | variables))

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], tokenize: bool = True, **template_kwargs: Any
    ) -> str | list[int]:
        """Do what `chat` does, under the name that transformers gives it.

        Args:
            tokenize: Return token ids rather than text.
            template_kwargs: See `chat`. As in transformers, add_generation_prompt is False by default.
        """
        text = self.chat(conversation, **{"add_generation_prompt": False, **template_kwargs})
        return self.encode(text, add_special_tokens=False) if tokenize else text

    async def achat(self, messages: list[dict[str, Any]], **template_kwargs: Any) -> str:
        """Do what `chat` does, without blocking the event loop."""
        template, variables = self._template_for(template_kwargs)
        return await template.arender(messages, **(self._special_tokens | variables))

    def template_source(self, with_tools: bool = False) -> str:
        """Return the source of the template for chats, with tools or without; "" if there is none."""
        return (self._tool_template if with_tools else None) or self._template or ""

    def _template_for(self, variables: dict[str, Any]) -> tuple[ChatTemplate, dict[str, Any]]:
        """Return the template for a chat with these variables, and the variables without `chat_template`."""
        source = variables.get("chat_template")
        variables = {name: value for name, value in variables.items() if name != "chat_template"}
        if source is None and variables.get("tools"):
            source = self._tool_template
        if source is None:
            return self.chat_template, variables
        template = self._other_templates.pop(source, None) or ChatTemplate(source, **self._template_limits)
        self._other_templates[source] = template  # the last one is the most recently used one
        if len(self._other_templates) > MAX_OTHER_TEMPLATES:
            self._other_templates.pop(next(iter(self._other_templates))).close()
        return template, variables

    @property
    def chat_template(self) -> ChatTemplate:
        """Return the model's chat template. Raises InvalidRequest if the model has none."""
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template: send a plain prompt instead", "messages")
        return self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        return None if self._template is None else ChatTemplate(self._template, **self._template_limits)

    def prepare(self) -> None:
        """Prepare for the first long text, grammar and chat. Takes tenths of a second. May be called by any thread."""
        _ = self._bound, self.grammars
        if self._chat_template is not None:
            self._chat_template.start()

    @cached_property
    def grammars(self) -> "Grammars":
        """Return the compiler of grammars for structured output."""
        from .grammars import Grammars  # takes longer to import than the rest of this package

        return Grammars(self)

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """Return the threads for long texts. They are few, to limit the texts that take memory at the same time."""
        return ThreadPoolExecutor(2, "octavo-tokenizer")

    @cached_property
    def _bound(self) -> TokenBound:
        return TokenBound(self)

    @cached_property
    def _template_ids(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and after a text."""
        bare, whole = (self.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at], whole[at + len(bare) :]

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a long text before some spaces, if that never changes its tokens. Otherwise yield it whole."""
        start = 0
        while self._cuts_before_spaces and len(text) - start > PIECE:
            cut = _LETTER_AND_SPACE.search(text, start + PIECE)
            if cut is None:
                break
            yield text[start : cut.start() + 1]
            start = cut.start() + 1
        yield text[start:] if start else text

    def _spell(self, token: int) -> bytes:
        piece = self.backend.id_to_token(token) if token >= 0 else None
        if piece is None:
            return b""
        if self._byte_level:
            # Added tokens are mostly spelled in plain text, which byte-level decoding does not change.
            values = [_BYTE_OF.get(character) for character in piece]
            return piece.encode() if None in values else bytes(value for value in values if value is not None)
        if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"text is not valid Unicode: a lone surrogate at character {error.start}") from None


def _too_long(max_tokens: int | None) -> PromptTooLong:
    return PromptTooLong(f"the prompt has more than {max_tokens} tokens, the limit in the model's context", "prompt")


def _cuts_before_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Return whether text is always split between a letter and a following space before it is tokenized.

    True for the regular expressions of most byte-level vocabularies, not for SentencePiece.
    """
    steps = component_steps(backend.pre_tokenizer)
    splits = [step for step in steps if step["type"] == "Split"]
    rest = [step for step in steps if step["type"] != "Split"]
    known = (
        any(step["type"] == "ByteLevel" and not step["add_prefix_space"] for step in rest)
        and all(step["type"] in ("ByteLevel", "Digits") for step in rest)
        and (bool(splits) or any(step.get("use_regex") for step in rest))
        and all(step["pattern"].get("Regex") in WORD_REGEXES for step in splits)
        and all(step["behavior"] == "Isolated" and not step["invert"] for step in splits)
        and (backend.normalizer is None or isinstance(backend.normalizer, tokenizers.normalizers.NFC))
    )
    return known and not any(
        token.single_word or _LETTER_AND_SPACE.search(token.content) or (token.rstrip and token.content[-1:].isalpha())
        for token in backend.get_added_tokens_decoder().values()
    )


def _decoded(spelled: bytes) -> str | None:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return None


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Return whether the vocabulary is byte-level, and whether decoding drops a text's first space.

    Raises:
        UnsupportedModel: The decoder is of another kind.
    """
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        return True, False
    if "Metaspace" in steps:
        return False, steps["Metaspace"].get("prepend_scheme", "always") != "never"
    if "Replace" in steps:
        return False, "Strip" in steps
    raise UnsupportedModel(f"the tokenizer's decoder is {decoder['type']}; supported are ByteLevel and SentencePiece")


def _from_gguf(path: ModelPath) -> Tokenizer:
    metadata = read_header(path).metadata
    backend = tokenizer_from_metadata(metadata, str(path))
    tokens = metadata["tokenizer.ggml.tokens"]
    control = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def token_id(role: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise DamagedWeights(f"{path} is damaged: tokenizer.chat_template is not a string")
    ends = {token_id("eos"), token_id("eot"), token_id("eom")} | {backend.token_to_id(name) for name in _END_TOKENS}
    special = {"bos": token_id("bos"), "eos": token_id("eos"), "unk": token_id("unknown"), "pad": token_id("padding")}
    return Tokenizer(
        backend,
        eos_token_ids=frozenset(i for i in ends if i is not None and (i in control or i == token_id("eos"))),
        bos_token_id=token_id("bos"),
        template=template,
        special_tokens={f"{role}_token": tokens[i] for role, i in special.items() if i is not None},
    )


def _from_directory(path: ModelPath) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        raise ModelNotFound(f"{path} has no tokenizer.json: download the model's tokenizer files too")
    backend = _read_backend(file)
    settings, generation, config = (
        _read_json(path / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    special = {f"{role}_token": _special_token(path, settings, f"{role}_token") for role in _SPECIAL_ROLES}
    special_tokens = {name: token for name, token in special.items() if token is not None}

    def ids(name: str) -> list[int]:
        source, value = "generation_config.json", generation.get(name)
        if value is None:
            source, value = "config.json", config.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in values):
            raise DamagedWeights(
                f"{path / source} has {name} = {shortened(repr(value))}; it must be a token id or a list of them"
            )
        return [i for i in values if i >= 0]

    def of(name: str) -> list[int]:
        found = backend.token_to_id(special_tokens[name]) if name in special_tokens else None
        return [] if found is None else [found]

    return Tokenizer(
        backend,
        eos_token_ids=frozenset(of("eos_token") + ids("eos_token_id")),
        bos_token_id=next(iter(of("bos_token") + ids("bos_token_id")), None),
        template=_directory_template(path, settings),
        tool_template=_directory_template(path, settings, "tool_use"),
        special_tokens=special_tokens,
    )


def _read_backend(file: ModelPath) -> tokenizers.Tokenizer:
    content = read_file(file, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:  # Exception for damage; Rust's panics are not subclasses of Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DamagedWeights(f"{file} is damaged: {shortened(error)}") from None
        raise


def _directory_template(path: ModelPath, settings: dict[str, Any], name: str = "default") -> str | None:
    """Return the template in chat_template.jinja or in tokenizer_config.json; of several, the one called `name`."""
    file = path / "chat_template.jinja"
    if name != "default":
        file = path / "additional_chat_templates" / f"{name}.jinja"
        if not file.exists() and not isinstance(settings.get("chat_template"), list):
            return None
    if file.exists():
        return _read_text(file)
    template = settings.get("chat_template")
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get(name)
    except (KeyError, TypeError):
        template = []  # an entry is not an object with a name and a template
    if template is not None and not isinstance(template, str):
        raise DamagedWeights(f"{path / 'tokenizer_config.json'} is damaged: chat_template is not a template")
    return template


def _special_token(path: ModelPath, settings: dict[str, Any], name: str) -> str | None:
    """Return a special token, which tokenizer_config.json writes as a string or as an object."""
    token = settings.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise DamagedWeights(f"{path / 'tokenizer_config.json'} is damaged: {name} is {shortened(content)}, not text")
    return content


def _read_json(file: ModelPath) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(text := _read_text(file))
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # raises for lone surrogates
    except DamagedWeights:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedWeights(f"{file} is damaged: {shortened(error)}") from None
    if not isinstance(content, dict):
        raise DamagedWeights(f"{file} is damaged: it is not a JSON object")
    return content


def _read_text(file: ModelPath) -> str:
    try:
        return read_file(file, MAX_SETTINGS_BYTES).decode()
    except UnicodeDecodeError as error:
        raise DamagedWeights(f"{file} is damaged: it is not UTF-8 at byte {error.start}") from None
