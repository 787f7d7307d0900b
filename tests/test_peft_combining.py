"""add_weighted_adapter beside PEFT's: the same adapter where PEFT is right, the exact sum where it is not."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft as theirs
import pytest
import torch
from models import inputs_of, loaded
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_zoo import IDS, llama
from places import FIXTURES
from torch import nn

import adaptkit.peft as ours
from adaptkit.errors import AdaptKitError

pytestmark = pytest.mark.peft


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def twins(kind: str = "LoraConfig", *options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours with the adapters a and b, of equal numbers."""
    options = options or ({"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 2})
    torch.manual_seed(0)
    base = llama().eval()
    models = []
    for room, model in ((theirs, copy.deepcopy(base)), (ours, base)):
        configs = [getattr(room, kind)(**copy.deepcopy(o)) for o in options]
        made = quietly(room.get_peft_model, model, configs[0], "a")
        quietly(made.add_adapter, "b", configs[1])
        models.append(made)
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        numbers = theirs.get_peft_model_state_dict(models[0], adapter_name=name)
        numbers = {k: v + 0.2 * torch.randn_like(v) for k, v in numbers.items()}
        theirs.set_peft_model_state_dict(models[0], numbers, adapter_name=name)
        assert not ours.set_peft_model_state_dict(models[1], numbers, adapter_name=name).missing_keys
    return models[0], models[1]


HOW = {
    "svd": {"combination_type": "svd"},
    "svd-rank": {"combination_type": "svd", "svd_rank": 2, "svd_full_matrices": False, "svd_driver": None},
    "cat": {"combination_type": "cat"},
    "linear": {"combination_type": "linear"},
    "ties": {"combination_type": "ties", "density": 0.5},
    "ties-frequency": {"combination_type": "ties", "density": 0.5, "majority_sign_method": "frequency"},
    "ties_svd": {"combination_type": "ties_svd", "density": 0.5},
    "magnitude_prune": {"combination_type": "magnitude_prune", "density": 0.4},
    "magnitude_prune_svd": {"combination_type": "magnitude_prune_svd", "density": 0.4},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]])
def test_the_combination_is_peft_s(how: str, weights: list[float]):
    """Equal outputs, and the new adapter is there, inactive, frozen until it is chosen."""
    there, here = twins()
    quietly(there.base_model.add_weighted_adapter, ["a", "b"], weights, "c", **HOW[how])
    here.add_weighted_adapter(["a", "b"], weights, "c", **HOW[how])
    assert here.active_adapters == ["a"]
    there.set_adapter("c")
    here.set_adapter("c")

    torch.testing.assert_close(logits(here), logits(there), atol=1e-4, rtol=1e-3)
    config = here.peft_config["c"]
    assert config.r == config.lora_alpha == there.peft_config["c"].r
    assert config.target_modules == there.peft_config["c"].target_modules


MIXED = [
    ({"r": 4, "use_rslora": True, "lora_alpha": 3}, {"r": 2, "lora_alpha": 6}),
    ({"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["v_proj", "down_proj"]}),
    ({"r": 4, "rank_pattern": {"q_proj": 2}}, {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ({"r": 4, "target_modules": r".*q_proj"}, {"r": 4, "target_modules": "all-linear"}),
]


@pytest.mark.parametrize("options", MIXED, ids=["rslora", "other-modules", "patterns", "regex"])
@pytest.mark.parametrize("how", ["svd", "cat"])
def test_a_sum_is_exact_where_peft_s_is_not(options: Any, how: str, tmp_path: Path):
    """rsLoRA, modules that one lacks, patterns: with all of the rank, the combination runs as both together do.

    Saved, it runs in PEFT too.
    """
    _, here = twins("LoraConfig", *options)
    here.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", how, **({"svd_rank": 8} if how == "svd" else {}))
    here.set_adapter(["a", "b"])
    both = logits(here)
    here.set_adapter("c")

    torch.testing.assert_close(logits(here), both, atol=1e-4, rtol=1e-3)
    here.save_pretrained(tmp_path, selected_adapters=["c"])
    torch.manual_seed(0)
    back = quietly(theirs.PeftModel.from_pretrained, llama().eval(), tmp_path / "c")
    torch.testing.assert_close(logits(back), both, atol=1e-4, rtol=1e-3)


def test_ia3_vectors_add_up_as_in_peft():
    """l = sum of w l."""
    there, here = twins("IA3Config", {}, {})
    there.base_model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "c")
    here.add_weighted_adapter(["a", "b"], [0.3, 0.7], "c")
    there.set_adapter("c")
    here.set_adapter("c")

    torch.testing.assert_close(logits(here), logits(there), atol=1e-5, rtol=1e-4)


def test_mistakes_are_sentences():
    """A name that is there, one that is not, weights of another number, DoRA; the model keeps its adapters."""
    _, here = twins()
    with pytest.raises(AdaptKitError, match="there already"):
        here.add_weighted_adapter(["a", "b"], [1, 1], "b")
    with pytest.raises(AdaptKitError, match="ghost"):
        here.add_weighted_adapter(["a", "ghost"], [1, 1], "c")
    with pytest.raises(AdaptKitError, match="2 adapters and 1 weights"):
        here.add_weighted_adapter(["a", "b"], [1], "c")
    with pytest.raises(AdaptKitError, match="density"):
        here.add_weighted_adapter(["a", "b"], [1, 1], "c", "ties")
    with pytest.raises(AdaptKitError, match="not one of"):
        here.add_weighted_adapter(["a", "b"], [1, 1], "c", "sum")
    _, dora = twins("LoraConfig", {"r": 2, "use_dora": True}, {"r": 2, "use_dora": True})
    with pytest.raises(AdaptKitError, match="(?i)dora"):
        dora.add_weighted_adapter(["a", "b"], [1, 1], "c")
    assert list(here.peft_config) == ["a", "b"]


PLACES = {
    "attention": ["attention"],
    "convolutions": ["conv1d", "conv2d", "conv2d_point", "conv3d"],
    "embedding": ["embedding"],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 12}])
def test_other_modules_than_linear_are_combined(place: str, how: dict[str, Any], tmp_path: Path):
    """The new adapter acts as PEFT runs both at once, one of them backwards; saved, PEFT runs it too."""
    inputs = inputs_of("custom/inputs.npz")
    options = {"r": 3, "lora_alpha": 6, "target_modules": PLACES[place]}
    there, here = (
        quietly(room.get_peft_model, loaded(FIXTURES / "models/custom", "custom"), room.LoraConfig(**options), "a")
        for room in (theirs, ours)
    )
    for room, model in ((theirs, there), (ours, here)):
        quietly(model.add_adapter, "b", room.LoraConfig(**options))
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        numbers = theirs.get_peft_model_state_dict(there, adapter_name=name)
        numbers = {k: 0.2 * torch.randn_like(v) for k, v in numbers.items()}
        theirs.set_peft_model_state_dict(there, numbers, adapter_name=name)
        assert not ours.set_peft_model_state_dict(here, numbers, adapter_name=name).missing_keys
    for module in there.modules():
        if isinstance(module, BaseTunerLayer):
            module.scaling["b"] *= -0.5
    there.base_model.set_adapter(["a", "b"])
    with torch.no_grad():
        expected, plain = there.eval()(**inputs), loaded(FIXTURES / "models/custom", "custom")(**inputs)
    assert (expected - plain).abs().max() > 0.01

    here.add_weighted_adapter(["a", "b"], [1.0, -0.5], "c", **how)
    here.set_adapter("c")
    here.save_pretrained(tmp_path, selected_adapters=["c"])
    back = quietly(theirs.PeftModel.from_pretrained, loaded(FIXTURES / "models/custom", "custom"), str(tmp_path / "c"))

    with torch.no_grad():
        torch.testing.assert_close(here.eval()(**inputs), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(back.eval()(**inputs), expected, atol=1e-5, rtol=1e-4)
