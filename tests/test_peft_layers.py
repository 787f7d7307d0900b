"""lora.Linear and its kin, made and used alone, as code written for PEFT does."""

from __future__ import annotations

import copy
from typing import Any

import peft as theirs
import pytest
import torch
from peft.tuners.lora import layer as their_lora
from torch import nn
from transformers.pytorch_utils import Conv1D

import adaptkit.peft as ours
from adaptkit.errors import AdaptKitError
from adaptkit.peft.tuners import lora

pytestmark = pytest.mark.peft
LAYERS: dict[str, tuple[Any, str, tuple[int, ...] | None, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(6, 5), "Linear", (3, 6), {}),
    "linear-dora": (lambda: nn.Linear(6, 5), "Linear", (3, 6), {"use_dora": True}),
    "linear-rslora": (lambda: nn.Linear(6, 5), "Linear", (3, 6), {"use_rslora": True}),
    "linear-bias": (lambda: nn.Linear(6, 5), "Linear", (3, 6), {"lora_bias": True}),
    "conv1d-hf": (lambda: Conv1D(5, 6), "Linear", (3, 6), {"fan_in_fan_out": True}),
    "embedding": (lambda: nn.Embedding(9, 4), "Embedding", None, {}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, stride=2), "Conv1d", (2, 4, 9), {}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), "Conv2d", (2, 4, 7, 7), {}),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), "Conv3d", (2, 2, 3, 3, 3), {}),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "MultiheadAttention", (2, 3, 8), {}),
}


def of(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def pair(kind: str) -> tuple[Any, Any, tuple[torch.Tensor, ...]]:
    """PEFT's layer and ours with equal numbers, and inputs."""
    make, name, shape, options = LAYERS[kind]
    torch.manual_seed(0)
    base = make().eval()
    x = torch.randint(0, 9, (2, 3)) if shape is None else torch.randn(shape)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": True} | options
    there = getattr(their_lora, name)(
        copy.deepcopy(base), "default", config=theirs.LoraConfig(**settings), r=4, lora_alpha=6
    )
    here = getattr(lora, name)(copy.deepcopy(base), "default", config=ours.LoraConfig(**settings), r=4, lora_alpha=6)
    torch.manual_seed(1)
    numbers = {n: p + 0.3 * torch.randn_like(p) for n, p in there.named_parameters() if "lora_" in n}
    for layer in (there, here):
        with torch.no_grad():
            for n, p in layer.named_parameters():
                if n in numbers:
                    p.copy_(numbers[n])
    return there.eval(), here.eval(), (x, x, x) if kind == "attention" else (x,)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_alone_is_peft_s(kind: str):
    """Names, outputs, updates, sizes, scales; merged, unmerged and disabled."""
    there, here, x = pair(kind)
    assert {n: p.shape for n, p in here.named_parameters()} == {n: p.shape for n, p in there.named_parameters()}
    before, running = of(here.get_base_layer()(*x)), of(here(*x))
    torch.testing.assert_close(running, of(there(*x)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(here.get_delta_weight("default"), _delta(there, kind), atol=1e-5, rtol=1e-4)
    for name in ("r", "lora_alpha", "scaling", "use_rslora"):
        assert dict(getattr(here, name)) == getattr(there, name)
    if kind != "attention":
        assert (here.in_features, here.out_features) == (there.in_features, there.out_features)
    assert isinstance(here, lora.LoraLayer)

    here.merge(safe_merge=True)
    assert here.merged
    assert here.merged_adapters == ["default"]
    torch.testing.assert_close(of(here(*x)), running, atol=1e-5, rtol=1e-4)
    here.unmerge()
    assert not here.merged
    torch.testing.assert_close(of(here(*x)), running)
    here.enable_adapters(False)
    if kind != "attention":
        torch.testing.assert_close(of(here(*x)), before)


def _delta(there: Any, kind: str) -> torch.Tensor:
    if kind != "attention":
        return there.get_delta_weight("default")
    factors = there.lora_B["default"].weight, there.lora_A["default"].weight  # PEFT's own method lacks a field there
    return there.scaling["default"] * (factors[0] @ factors[1])


def test_scales_may_be_set():
    """scaling, set_scale, scale_layer and unscale_layer do what they do in PEFT."""
    there, here, x = pair("linear")
    for layer in (there, here):
        layer.set_scale("default", 3)
    assert here.scaling["default"] == there.scaling["default"]
    for layer in (there, here):
        layer.scale_layer(2)
    assert here.scaling["default"] == there.scaling["default"]
    for layer in (there, here):
        layer.unscale_layer()
    assert here.scaling["default"] == there.scaling["default"]
    for layer in (there, here):
        layer.scaling["default"] = 0.25
    torch.testing.assert_close(here(*x), there(*x), atol=1e-5, rtol=1e-4)


def test_a_second_adapter_on_a_layer():
    """update_layer, set_adapter with several, merging one of them, deleting."""
    there, here, x = pair("linear")
    there.update_layer("other", 2, lora_alpha=3, config=theirs.LoraConfig(r=2, init_lora_weights=False))
    here.update_layer("other", 2, lora_alpha=3, config=ours.LoraConfig(r=2, init_lora_weights=False))
    with torch.no_grad():
        here.lora_A["other"].weight.copy_(there.lora_A["other"].weight)
        here.lora_B["other"].weight.copy_(there.lora_B["other"].weight)
    for layer in (there, here):
        layer.set_adapter(["default", "other"])
    running = here(*x)
    torch.testing.assert_close(running, there(*x), atol=1e-5, rtol=1e-4)
    here.merge(adapter_names=["other"])
    torch.testing.assert_close(here(*x), running, atol=1e-5, rtol=1e-4)
    here.unmerge()
    for layer in (there, here):
        layer.delete_adapter("default")
    torch.testing.assert_close(here(*x), there(*x), atol=1e-5, rtol=1e-4)


def test_mistakes_are_sentences():
    """Names that torch uses, layers without a bias, attention with dropout."""
    with pytest.raises(AdaptKitError, match="torch uses it"):
        lora.Linear(nn.Linear(3, 3), "keys", r=2)
    with pytest.raises(AdaptKitError, match="has no bias to merge into"):
        lora.Linear(nn.Linear(3, 3, bias=False), "default", r=2, lora_bias=True)
    with pytest.raises(AdaptKitError, match="lora_dropout does not go with"):
        lora.MultiheadAttention(nn.MultiheadAttention(4, 2), "default", r=2, lora_dropout=0.1)
    layer = lora.Linear(nn.Linear(3, 3), "default", r=2)
    with pytest.raises(AdaptKitError, match="no adapter named ghost"):
        layer.merge(adapter_names=["ghost"])
