"""Tokenizer, chat template and detokenizer against transformers and sentencepiece."""

import io
import json
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from octavo.errors import DamagedWeights, InvalidRequest
from octavo.text import Detokenizer, Tokenizer
from tiny_gguf import finish_vocabulary
from tiny_models import real_text

TEXTS = [
    "",
    " ",
    "The capital of France is",
    " leading and trailing spaces  ",
    "tabs\tand\n\nnew lines\r\n   \n  indented",
    "def f(x):\n    return {x: 1_000_000, 'y': 0x1F}  # 3.14159",
    "don't we're I'LL they'Ve",
    "1 12 123 1234 12345 ²³ ٣٤٥ ⅷ",
    "Größe, naïve café, ÅNGSTRÖM, e\u0301 é",
    "Привет мир 你好世界 こんにちは 안녕하세요 שלום नमस्ते สวัสดี",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b\ufeff\x00\x7f",
    "a" * 1000,
    "=== ---- ...!? «»“” @@ ## $$ %%",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start|>",
    "<|im_start |> <im_end> <|im_end|",
]


def parts(ids: list[int], tokenizer: Tokenizer) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> tuple[Tokenizer, Any]:
    """SmolLM2's tokenizer from its .gguf: ours, and transformers'."""
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # SmolLM2's tokenizer.json has this step; transformers' GGUF reader forgets it.
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, theirs.backend_tokenizer.pre_tokenizer])
    return Tokenizer.load(smollm2), theirs


# Encoding


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_encodes_as_transformers_does(smol: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = smol
    assert ours.encode(text) == theirs.encode(text)


def test_smollm2_encodes_any_text_as_transformers_does(smol: tuple[Tokenizer, Any]) -> None:
    ours, theirs = smol

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(TEXTS[1:-4]))).map("".join))
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)

    check()


def test_smollm2_loads_quickly(smollm2: Path) -> None:
    start = time.process_time()
    Tokenizer.load(smollm2)
    assert time.process_time() - start < 0.5


def test_smollm2_special_tokens(smol: tuple[Tokenizer, Any]) -> None:
    ours, theirs = smol
    assert ours.vocab_size == len(theirs) == 49152
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == {theirs.eos_token_id, theirs.convert_tokens_to_ids("<|endoftext|>")}


def test_token_text_and_bytes(smol: tuple[Tokenizer, Any]) -> None:
    ours, _ = smol
    text = " wörld 🎉<|im_end|>"
    ids = ours.encode(text)
    assert b"".join(map(ours.token_bytes, ids)).decode() == text
    assert ours.token_text(ids[0]) == " w" and ours.token_text(ids[-1]) == "<|im_end|>"
    assert "\ufffd" in [ours.token_text(i) for i in ids]  # the emoji is several tokens, none a character by itself
    assert ours.token_bytes(10**6) == ours.token_bytes(-1) == b""


@pytest.mark.parametrize("text", ["\ud800", "well \udcff then"])
def test_lone_surrogates_are_an_invalid_request(smol: tuple[Tokenizer, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        smol[0].encode(text)


# Vocabularies of other GGUF files, made here


def byte_level_gguf(folder: Path, pre: str, regex: str | None, **flags: Any) -> Path:
    """A .gguf with a byte-level vocabulary of 700 tokens, trained on text cut by `regex` (None: GPT-2's)."""
    backend = BackendTokenizer(models.BPE())
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=regex is None)])
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(
        [real_text()[:100_000], "1 22 333 4444 don't WE'RE Ünïcödé 你好 \n\n \r\n "] * 3, trainer
    )
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|endoftext|>"]

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *specials, "<think>"])
    writer.add_token_types([1] * len(tokens) + [3] * len(specials) + [4])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 2)
    return finish_vocabulary(writer, **flags)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "dbrx"])
def test_byte_level_vocabularies_encode_as_transformers_does(tmp_path: Path, pre: str) -> None:
    path = byte_level_gguf(tmp_path, pre, GGUF_PRE_TOKENIZER_SPLITS.get(pre), add_bos_token=False)
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in [*TEXTS, "a<think>b<|eot_id|> c"]:
        if pre == "qwen2" and "e\u0301" in text:
            continue  # Qwen2's own tokenizer.json composes characters (NFC); transformers' GGUF reader forgets to
        assert ours.encode(text) == theirs.encode(text), text
    assert len(ours.eos_token_ids) == 2


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    ours = Tokenizer.load(byte_level_gguf(tmp_path, "qwen2", GGUF_PRE_TOKENIZER_SPLITS["qwen2"]))
    assert ours.encode("e\u0301") == ours.encode("é")


def test_bos_and_eos_are_added_where_the_file_says(tmp_path: Path) -> None:
    ours = Tokenizer.load(byte_level_gguf(tmp_path, "llama-bpe", None, add_eos_token=True))
    bos, eos = ours.bos_token_id, ours.encode("<|endoftext|>", add_special_tokens=False)[0]
    assert ours.encode("hi") == [bos, *ours.encode("hi", add_special_tokens=False), eos]


def test_llama3_takes_known_words_whole(tmp_path: Path) -> None:
    """Llama 3 has tokens that no merge leads to."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*"hi", "hi", "hihi"])
    writer.add_token_merges(["h i"])
    ours = Tokenizer.load(finish_vocabulary(writer))
    assert [ours.encode(text) for text in ("hi", "hihi", "hhi")] == [[2], [3], [0, 2]]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """A SentencePiece vocabulary in a .gguf, as llama.cpp writes Llama 2's: ours, and the real SentencePiece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(real_text()[:200_000].splitlines()),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kinds = [(2, spm.is_unknown), (3, spm.is_control), (6, spm.is_byte)]
    ids = range(spm.vocab_size())

    writer = gguf.GGUFWriter(tmp_path_factory.mktemp("spm") / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([spm.id_to_piece(i) for i in ids])
    writer.add_token_scores([spm.get_score(i) for i in ids])
    writer.add_token_types([next((kind for kind, test in kinds if test(i)), 1) for i in ids])
    writer.add_bos_token_id(spm.bos_id())
    writer.add_eos_token_id(spm.eos_id())
    writer.add_unk_token_id(spm.unk_id())
    return Tokenizer.load(finish_vocabulary(writer)), spm


def test_sentencepiece_vocabulary_encodes_as_sentencepiece_does(sentences: tuple[Tokenizer, Any]) -> None:
    ours, spm = sentences

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(st.text(max_size=30), st.lists(st.sampled_from(TEXTS)).map("".join)))
    def check(text: str) -> None:
        text = text.replace("\x00", "").replace("▁", "")  # the two characters that SentencePiece itself changes
        ids = ours.encode(text)
        assert ids == [spm.bos_id(), *spm.encode(text)]
        assert ours.decode(ids) == spm.decode(ids) == text

    check()


# Directories


def test_directory_encodes_as_transformers_does(tiny_llama: Path) -> None:
    ours, theirs = Tokenizer.load(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.vocab_size, ours.bos_token_id) == (len(theirs), theirs.bos_token_id)


def test_added_tokens_decode_as_they_are_spelled(tiny_llama: Path, tmp_path: Path) -> None:
    """Byte-level vocabularies spell bytes with printable characters, but not in tokens that were added later."""
    backend = BackendTokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    backend.add_tokens(["« tool »", "<think>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    ids = ours.encode("a« tool »b<think>ü")
    assert len(ids) == 6
    assert ours.decode(ids) == parts(ids, ours) == backend.decode(ids) == "a« tool »b<think>ü"


def test_sentencepiece_directory(tmp_path: Path, sentences: tuple[Tokenizer, Any]) -> None:
    """As transformers saves Llama 2's: BOS put before, spaces spelled ▁, bytes spelled <0x0A>."""
    vocabulary = sentences[0].backend.get_vocab()
    merges = [tuple(merge) for merge in json.loads(sentences[0].backend.to_str())["model"]["merges"]]
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "generation, config, ids",
    [
        ({"eos_token_id": [1, 0]}, {}, {0, 1, 2}),
        ({}, {"eos_token_id": 0}, {0, 2}),
        ({"eos_token_id": 1}, {"eos_token_id": 0}, {1, 2}),
        ({"eos_token_id": None}, {"eos_token_id": 0}, {0, 2}),
    ],
)
def test_end_tokens_of_a_directory(
    tiny_llama: Path, tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], ids: set[int]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eos_token_ids == ids


@pytest.mark.parametrize("value", ["2", True, 2.0, [None], {"a": 2}])
def test_end_tokens_that_are_no_ids(value: Any, tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        DamagedWeights, match=r"config.json has eos_token_id = .*; it must be a token id or a list of them"
    ):
        Tokenizer.load(tmp_path)


def test_settings_that_are_not_utf8(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_llama / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(DamagedWeights) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).count("is damaged") == 1


# Decoding


def test_any_tokens_decode_as_transformers_does_and_in_parts(smol: tuple[Tokenizer, Any]) -> None:
    ours, theirs = smol

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.one_of(st.integers(0, ours.vocab_size - 1), st.sampled_from(ours.encode(TEXTS[10]))), max_size=40)
    )
    def check(ids: list[int]) -> None:
        whole = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == whole
        assert parts(ids, ours) == whole

    check()


def test_sentencepiece_tokens_decode_in_parts(sentences: tuple[Tokenizer, Any]) -> None:
    """An output goes on where its prompt ended, so the first word keeps its space."""
    ours, _ = sentences

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, ours.vocab_size - 1), max_size=40), st.integers(0, 40))
    def check(ids: list[int], cut: int) -> None:
        assert parts(ids, ours).removeprefix(" ") == ours.decode(ids)
        text = "the end" + parts(ids, ours)
        assert ours.decode(ours.encode("the end") + ids) == text

    check()


def test_detokenizer_never_gives_half_a_character(smol: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = smol
    text = "".join(TEXTS[9:11])
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_unfinished_character_at_the_end(smol: tuple[Tokenizer, Any]) -> None:
    tokenizer, theirs = smol
    ids = tokenizer.encode("ok 🎉")[:-1]
    assert parts(ids, tokenizer) == theirs.decode(ids) == "ok \ufffd"


# Chat templates

CONVERSATION = [
    {"role": "system", "content": "Be brief. <b>&amp;</b>"},
    {"role": "user", "content": "What is 2 + 2? «ü»"},
    {"role": "assistant", "content": " 4 "},
    {"role": "user", "content": "Why?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "<int>", "ü": [1, 2.5, None, True]}}}]
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role != 'tool' %}\n[{{ m['role'] }}] {{ m.content | trim }}\n  {% endif %}\n"
    "{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}",
    "{% if tools %}{{ tools | tojson }}|{{ tools | tojson(indent=2) }}{% endif %}{{ messages | tojson }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ strftime_now('%d %b %Y') }}",
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif -%}{{ custom is defined and custom }}",
    "{% if messages[0].role == 'bot' %}{{ raise_exception('no bots') }}{% endif %}{{ messages[::-1][0].content[:2] }}",
]


def with_template(folder: Path, source: Path, template: Any) -> Path:
    """A copy of the tokenizer in `source` with another chat template."""
    config = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_transformers_does(tiny_llama: Path, tmp_path: Path, template: str, tools: Any) -> None:
    ours = Tokenizer.load(with_template(tmp_path, tiny_llama, template))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        CONVERSATION, tools=tools, custom=3, tokenize=False, add_generation_prompt=True
    )
    assert ours.chat(CONVERSATION, tools=tools, custom=3) == expected


def test_smollm2_template(smol: tuple[Tokenizer, Any]) -> None:
    ours, theirs = smol
    for messages in (CONVERSATION, CONVERSATION[1:]):
        prompt = ours.chat(messages)
        assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>assistant\n")


def test_text_parts_are_joined(smol: tuple[Tokenizer, Any]) -> None:
    ours, _ = smol
    message = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    assert ours.chat([message]) == ours.chat([{"role": "user", "content": "one\ntwo"}])


def test_named_templates_and_the_jinja_file(tiny_llama: Path, tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    with_template(tmp_path, tiny_llama, named)
    assert Tokenizer.load(tmp_path).chat(CONVERSATION) == "plain"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).chat(CONVERSATION) == "from the file"


@pytest.mark.parametrize(
    "template, messages, reason",
    [
        (TEMPLATES[-1], [{"role": "bot", "content": "hi"}], "no bots"),
        ("{{ 1 / 0 }}", CONVERSATION, "division by zero"),
        ("{{ messages.append(1) }}", CONVERSATION, "refused"),  # the sandbox
        ("{{ messages.__class__.__mro__ }}", CONVERSATION, "refused"),
        ("{% for i in range(10**9) %}{% endfor %}", CONVERSATION, "range"),
        ("{% if %}", CONVERSATION, "broken"),
        (None, CONVERSATION, "no chat template"),
        ("x", [], "at least one message"),
        ("x", ["hi"], "must be an object with a role"),
        ("x", [{"role": "user", "content": [{"type": "image_url"}]}], "text parts"),
        ("x", [{"role": "user", "content": 7}], "a string or a list of text parts"),
    ],
)
def test_bad_messages_and_templates(
    tiny_llama: Path, tmp_path: Path, template: str | None, messages: list[Any], reason: str
) -> None:
    tokenizer = Tokenizer.load(with_template(tmp_path, tiny_llama, template))
    assert tokenizer.has_chat_template == (template is not None)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        tokenizer.chat(messages)
    assert "\n" not in str(caught.value)
