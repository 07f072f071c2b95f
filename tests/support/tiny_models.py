"""Tiny random models of every family, saved as transformers saves them, with a real (small) tokenizer."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Tromsø"}}\n</tool_call>'
ANSWER = "The weather is fine."
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall one of these in <tool_call></tool_call>:\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}"
    "{% if tools and messages[-1]['role'] != 'tool' %}<|call|>{% else %}<|answer|>{% endif %}"
    "{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


RANKS = {"intermediate_size": 1280, "num_hidden_layers": 2, "head_dim": 64}


def _sizes(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "head_dim": 32,
    }
    return {**sizes, **changes}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_sizes(tie_word_embeddings=True)),
    "llama-biases": LlamaConfig(**_sizes(attention_bias=True, mlp_bias=True, head_dim=16)),
    "llama3-rope": LlamaConfig(**_sizes(rope_parameters=LLAMA3_ROPE)),
    "llama-linear-rope": LlamaConfig(
        **_sizes(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    ),
    "mistral": MistralConfig(**_sizes(sliding_window=24)),
    "qwen2": Qwen2Config(**_sizes(use_sliding_window=True, sliding_window=20, max_window_layers=1, head_dim=16)),
    "qwen3": Qwen3Config(**_sizes(num_attention_heads=4, head_dim=64, tie_word_embeddings=True)),
    # Rows of 256, which K-quants need.
    "llama-256": LlamaConfig(
        **_sizes(
            hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, initializer_range=0.06
        )
    ),
}
# For up to eight ranks, in rows that K-quants need. The heads of the second do not divide.
FOR_RANKS: dict[str, PreTrainedConfig] = {
    "llama-ranks": LlamaConfig(**_sizes(**RANKS, hidden_size=256, num_attention_heads=8, tie_word_embeddings=True)),
    "llama-odd-heads": LlamaConfig(**_sizes(**RANKS, hidden_size=768, num_attention_heads=12, num_key_value_heads=3)),
}
SHARDED = "qwen2"


def save_tiny_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model of CONFIGS or FOR_RANKS in `folder`, the same every time."""
    model = random_model((CONFIGS | FOR_RANKS)[name]).to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB" if name == SHARDED else "1GB")
    save_tokenizer(folder)
    return folder


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Random in norms and biases too, which transformers initializes to 1 and 0. All values are exact in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            offset = 1.0 if "norm" in parameter_name else 0.0
            torch.nn.init.normal_(parameter, mean=offset, std=0.2)
    return model.to(torch.bfloat16).float()


def save_tokenizer(folder: Path, *special_tokens: str) -> None:
    """A byte-level BPE trained on Python's help texts, with a chat template, as transformers lays it out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL_TOKENS, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(pydoc_data.topics.topics.values()), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_tool_model(folder: Path, answer: str = ANSWER) -> Path:
    """A model that writes CALL in a chat with tools, `answer` after a tool's result and in other chats; else random.

    Only the last token decides on the next: the output of all layers is 0, and the head has a row for each transition.
    Space is unlikely, so that JSON at random ends soon.
    """
    save_tokenizer(folder, "<|call|>", "<|answer|>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (CALL, answer)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TOOL_TEMPLATE, "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    sizes = _sizes(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=4096, num_hidden_layers=1)
    model = random_model(LlamaConfig(**sizes))
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    weights["model.norm.weight"].fill_(1)
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embeddings[:, 0] = 2 * embeddings.std()  # the same for all tokens, as a bias
    for token in range(len(head)):
        head[token, 0] = -5 if tokenizer.decode([token], skip_special_tokens=False).isspace() else 0
    for before, after in (("<|call|>", CALL), (CALL, "<|im_end|>"), ("<|answer|>", answer), (answer, "<|im_end|>")):
        embedding = embeddings[tokenizer.token_to_id(before)]
        head[tokenizer.token_to_id(after)] += embedding * (30 / embedding.norm() / embedding.numel() ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def real_text() -> str:
    """Some 500,000 characters of English."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
