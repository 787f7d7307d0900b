"""Each family's smallest model exported and compared: other sizes, padding, growing caches, greedy texts.

Those here differ in what can go wrong; docs/onnx.md has the table of all, written by onnx_families.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx_families import exported

TESTED = {  # what is special about each
    "Llama 3.1 (scaled positions)": "positions that are scaled",
    "Mistral, sliding": "a window that greedy texts run past",
    "Gemma 3 text (sliding)": "layers with and without a window, two kinds of positions",
    "GPT-2": "absolute positions, Conv1D",
    "OPT": "positions with an offset",
    "Qwen3-MoE": "experts",
    "RoBERTa, tokens": "positions that depend on the padding's id",
    "ModernBERT (local attention)": "a local mask",
    "ViT, classes": "images",
    "CLIP": "two inputs with batches of their own",
    "T5": "three graphs, relative positions",
    "Whisper": "three graphs, sound",
}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", TESTED)
def test_a_family_is_exported_as_torch_computes_it(family: str, tmp_path: Path):
    """Largest difference within 1e-5 of the largest output, all greedy tokens equal."""
    made = exported(family, tmp_path / "out")
    found = made.checked

    assert max(found.prefill, found.decode) <= 1e-5 * max(1.0, found.largest)
    assert (found.greedy, found.ties) == (found.of, 0)
    assert json.loads((tmp_path / "out" / "adaptkit.json").read_text())["verified"]["greedy"] == found.greedy
    assert made.route == "transformers.exporters"
    if (first := tmp_path / "out" / "decoder_model.onnx_data").exists():  # both decoders read one file
        own = first.with_name("decoder_with_past_model.onnx_data")
        assert (own.stat().st_size if own.exists() else 0) < 0.2 * first.stat().st_size
