"""Tensors that are one storage, and what files say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import loaded
from places import FIXTURES
from safetensors.torch import load_file, save_model
from transformers import AutoModelForCausalLM

import adaptkit

BASE, ADAPTER = FIXTURES / "models/llama", FIXTURES / "adapters/llama/lora"


@pytest.fixture
def tied_bin(tmp_path: Path) -> Path:
    """The small language model as a PyTorch file in which head and embedding share one storage."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    (tmp_path / "base").mkdir()
    torch.save(model.state_dict(), tmp_path / "base/pytorch_model.bin")
    (tmp_path / "base/config.json").write_text((BASE / "config.json").read_text())
    assert "lm_head.weight" in torch.load(tmp_path / "base/pytorch_model.bin")
    return tmp_path / "base"


def test_tied_ends_of_a_pytorch_file_stay_one_tensor(tied_bin: Path, tmp_path: Path):
    """The head is not written twice, and the merged numbers are those from the safetensors base."""
    adaptkit.merge(tied_bin, ADAPTER, tmp_path / "out")
    adaptkit.merge(BASE, ADAPTER, tmp_path / "same")

    got, expected = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "same/model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in got)


def test_untying_a_pytorch_file_gives_the_other_end_its_own_tensor(tied_bin: Path, tmp_path: Path):
    """A LoRA on the head leaves the embedding as it was."""
    with pytest.warns(adaptkit.AdaptKitWarning, match="tied"):
        adaptkit.merge(tied_bin, FIXTURES / "adapters/llama/lm-head", tmp_path / "out")

    got, base = load_file(tmp_path / "out/model.safetensors"), load_file(BASE / "model.safetensors")
    assert torch.equal(got["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(got["lm_head.weight"], base["model.embed_tokens.weight"])
    assert loaded(tmp_path / "out", "llama").config.tie_word_embeddings is False


def test_the_notes_of_a_file_survive_unless_they_became_untrue(tmp_path: Path):
    """save_model keeps the head and notes the embedding; here the embedding is kept, noted so, and untied when asked."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    (tmp_path / "base").mkdir()
    save_model(model, str(tmp_path / "base/model.safetensors"), {"made_by": "a test"})
    (tmp_path / "base/config.json").write_text((BASE / "config.json").read_text())

    adaptkit.merge(tmp_path / "base", ADAPTER, tmp_path / "tied")
    with pytest.warns(adaptkit.AdaptKitWarning, match="tied"):
        adaptkit.merge(tmp_path / "base", FIXTURES / "adapters/llama/lm-head", tmp_path / "untied")

    said = {n: adaptkit.open_checkpoint(tmp_path / n).metadata["model.safetensors"] for n in ("base", "tied", "untied")}
    assert said["base"]["model.embed_tokens.weight"] == "lm_head.weight"
    assert said["tied"]["lm_head.weight"] == "model.embed_tokens.weight"
    assert said["untied"] == {"made_by": "a test", "format": "pt"}
    adaptkit.merge(BASE, ADAPTER, tmp_path / "same")
    tied, same = load_file(tmp_path / "tied/model.safetensors"), load_file(tmp_path / "same/model.safetensors")
    assert tied.keys() == same.keys()
    assert all(torch.equal(tied[n], same[n]) for n in same)
    assert torch.equal(
        load_file(tmp_path / "untied/model.safetensors")["model.embed_tokens.weight"], same["model.embed_tokens.weight"]
    )
