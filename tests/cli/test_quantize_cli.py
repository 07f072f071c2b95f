"""octavo quantize: what it writes is the model, in the formats it says, whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")

from command_line import answer, complaint
from family_models import PAGES, PROMPT, load_backend, relative_error
from octavo.backends.cpu import quantize
from octavo.cli.output_folder import complete_or_absent
from octavo.errors import DamagedWeights
from octavo.text import Tokenizer
from octavo.weights import Tensor, open_checkpoint
from octavo.weights.packed import write_packed
from packed_layers import Format, save_quantized
from step_batches import run_chunks
from tiny_gguf import write_gguf

TinyModel = Callable[[str], Path]
EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"
LAST_LAYER = "model.layers.2."
# Root mean square error of a weight relative to its own: half a step of the range of 32 normal values, about.
LARGEST_ERROR = {"Q8_0": 0.008, "Q4_1": 0.09}


def in_four_bits(source: Path, target: Path) -> dict[str, Tensor]:
    """What the command makes of a source that has no tokenizer."""
    target.mkdir()
    checkpoint = open_checkpoint(source)
    bits = {name: 8 if name in (EMBEDDING, HEAD) else 4 for name in checkpoint.tensors}
    write_packed(target, checkpoint.config, checkpoint.tensors, bits, quantize, {}, lambda done, total: None)
    return open_checkpoint(target).tensors


# The command


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_a_directory(model: str, bits: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, target = tiny_model(model), tmp_path / "deep" / "packed"
    assert str(target) in answer("quantize", source, target, "--bits", str(bits))
    packed, original = open_checkpoint(target).tensors, open_checkpoint(source).tensors
    assert packed.keys() == original.keys()
    for name, tensor in packed.items():
        expected = "F32" if len(tensor.shape) == 1 else "Q8_0"
        if bits == 4 and expected == "Q8_0" and name not in (EMBEDDING, HEAD) and not name.startswith(LAST_LAYER):
            expected = "Q4_1"
        assert (tensor.format, tensor.shape) == (expected, original[name].shape)
        error = relative_error(tensor.float32(), original[name].float32())
        assert error == 0 if expected == "F32" else 0 < error < LARGEST_ERROR[expected], name
    assert Tokenizer.load(target).encode("import this") == Tokenizer.load(source).encode("import this")
    assert (target / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()

    logits = run_chunks(load_backend("torch", target, dtype="float32"), PROMPT, 64, PAGES)
    assert relative_error(logits, run_chunks(load_backend("torch", source, dtype="float32"), PROMPT, 64, PAGES)) < 0.3
    assert answer("generate", target, "import", "--backend", "torch", "--max-tokens", "4", "--temperature", "0")


def test_the_file_is_one_that_the_library_reads(tiny_llama: Path, tmp_path: Path) -> None:
    answer("quantize", tiny_llama, tmp_path / "packed")
    arrays = load_file(tmp_path / "packed" / "model.safetensors")
    assert arrays[EMBEDDING].dtype == np.uint8
    decoded = gguf.quants.dequantize(arrays[EMBEDDING], gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(decoded, open_checkpoint(tmp_path / "packed").tensors[EMBEDDING].float32())


def test_integers_of_a_gguf_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama-256"), tmp_path / "model.gguf", "Q4_0")
    original = open_checkpoint(tmp_path / "model.gguf").tensors
    packed = in_four_bits(tmp_path / "model.gguf", tmp_path / "packed")
    for name, tensor in packed.items():
        assert tensor.format == original[name].format
        np.testing.assert_array_equal(tensor.float32(), original[name].float32())  # q and k in another order of rows


def test_more_bits_than_asked_for_are_too_many(tiny_model: TinyModel, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama-256"), tmp_path / "model.gguf", "Q8_0")
    original = open_checkpoint(tmp_path / "model.gguf").tensors
    packed = in_four_bits(tmp_path / "model.gguf", tmp_path / "packed")
    assert (packed[EMBEDDING].format, packed[DOWN].format) == ("Q8_0", "Q4_1")
    for name, tensor in packed.items():
        assert relative_error(tensor.float32(), original[name].float32()) < LARGEST_ERROR["Q4_1"]


def test_integers_of_awq_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    save_quantized(tiny_model("llama-256"), Format("awq", 4, 64), tmp_path / "awq", tmp_path / "floats")
    original = open_checkpoint(tmp_path / "awq").tensors
    packed = in_four_bits(tmp_path / "awq", tmp_path / "packed")
    assert packed[DOWN].format == "W4G32"
    np.testing.assert_array_equal(packed[DOWN].float32(), original[DOWN].float32())


def test_the_tokenizer_of_a_gguf(smollm2: Path, tmp_path: Path) -> None:
    answer("quantize", "smollm2", tmp_path / "packed", "--bits", "4")
    ours, original = Tokenizer.load(tmp_path / "packed"), Tokenizer.load(smollm2)
    text = "Fünf <|im_start|>user\n\tdef f(x): return x  # 12345 日本"
    assert ours.encode(text) == original.encode(text)
    assert ours.eos_token_ids == original.eos_token_ids
    assert ours.bos_token_id == original.bos_token_id
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.chat(messages) == original.chat(messages)


# Whole or not at all


def test_nothing_is_overwritten_unless_it_was_written_here(tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    answer("quantize", tiny_llama, target)
    assert "--force" in complaint("quantize", tiny_llama, target, "--bits", "4")
    answer("quantize", tiny_llama, target, "--bits", "4", "--force")
    assert open_checkpoint(target).tensors[DOWN].format == "Q4_1"
    assert "another name" in complaint("quantize", target, target, "--force")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert "does not replace it" in complaint("quantize", tiny_llama, foreign, "--force")
    assert (foreign / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "packed"]


def test_a_slip_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    assert "bits must be 8 or 4, not 5" in complaint("quantize", tiny_llama, tmp_path / "packed", "--bits", "5")
    (tmp_path / "file").write_text("")
    assert "cannot write" in complaint("quantize", tiny_llama, tmp_path / "file" / "packed")


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), complete_or_absent(tmp_path / "packed") as folder:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_formats_are_missing(tiny_llama: Path, tmp_path: Path) -> None:
    answer("quantize", tiny_llama, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    data = file.read_bytes()
    assert b'"Q8_0"' in data
    file.write_bytes(data.replace(b'"Q8_0"', b'"Q9_9"'))
    with pytest.raises(DamagedWeights, match="quantize the model again"):
        open_checkpoint(tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["bits"] == 8
