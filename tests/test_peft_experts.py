"""target_parameters against PEFT: stacks of experts, routers, and the weights of any module."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft as theirs
import pytest
import torch
import transformers
from peft_zoo import IDS, Sizes, gpt2, llama, mixtral
from torch import nn

import adaptkit
import adaptkit.peft as ours
from adaptkit import live
from adaptkit.errors import AdaptKitWarning
from adaptkit.formats.base import read
from adaptkit.formats.peft.write import write


def gpt_oss() -> nn.Module:
    """Stacks stored as (in, out), one of them square: 2880 x 2880 in the real one."""
    sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**Sizes | sizes, head_dim=8, pad_token_id=0))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def square_mixtral() -> nn.Module:
    """Stacks stored as (out, in), one of them square."""
    sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**Sizes | sizes))


STACKS = ["gate_up_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "router": (mixtral, ["gate.weight"]),
    "router and experts": (mixtral, ["gate.weight", *STACKS]),
    "square": (square_mixtral, STACKS),
    "square and turned": (gpt_oss, STACKS),
    "Conv1D": (gpt2, ["attn.c_proj.weight"]),
    "linear": (llama, ["q_proj.weight"]),
    "embedding": (llama, ["embed_tokens.weight"]),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def adapted(room: Any, name: str) -> nn.Module:
    """A model with stirred factors, the same numbers from either library."""
    make, targets = CASES[name]
    model, config = seeded(make), {"r": 2, "target_modules": [], "target_parameters": targets}
    torch.manual_seed(1)
    model = room.get_peft_model(model, room.LoraConfig(**config, task_type="CAUSAL_LM")).eval()
    stirred(model)
    return model


def stirred(model: nn.Module) -> None:
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=random)


def logits(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(IDS).logits.numpy()


def equal(model: nn.Module, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(logits(model), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", CASES)
def test_any_parameter_runs_merges_and_travels_as_in_peft(name: str, tmp_path: Path):
    """A router returns more than a product and an embedding reads no vectors; both run with their weight changed."""
    here, there = adapted(ours, name), adapted(theirs, name)
    wanted = logits(there)
    assert np.abs(wanted - logits(seeded(CASES[name][0]))).max() > 1e-3
    equal(here, wanted)
    here.save_pretrained(tmp_path / "here")
    there.save_pretrained(tmp_path / "there")
    equal(theirs.PeftModel.from_pretrained(seeded(CASES[name][0]), tmp_path / "here"), wanted)
    equal(ours.PeftModel.from_pretrained(seeded(CASES[name][0]), tmp_path / "there"), wanted)
    here.merge_adapter()
    equal(here, wanted)
    equal(here.merge_and_unload(), wanted)


@pytest.mark.parametrize("name", ["router", "square", "Conv1D"])
def test_a_second_adapter_stands_on_the_same_parameter(name: str):
    """It shares the first one's layer, as its names say, and acts alone or with it as in PEFT."""
    results = []
    for room in (ours, theirs):
        model = adapted(room, name)
        torch.manual_seed(3)
        model.add_adapter("second", model.peft_config["default"])
        model.set_adapter("second")
        stirred(model)
        alone = logits(model)
        model.base_model.set_adapter(["default", "second"])
        results.append((sorted(n for n, _ in model.named_parameters()), alone, logits(model)))
    (here, *mine), (there, *wanted) = results
    assert here == there
    for a, b in zip(mine, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", ["square", "square and turned"])
def test_square_stacks_are_told_apart_by_what_is_written_here(name: str, tmp_path: Path):
    """The shape does not say how they are packed, so the file does: saved or detached, they merge on files."""
    make = CASES[name][0]
    seeded(make).save_pretrained(tmp_path / "base")
    model = adapted(ours, name)
    model.save_pretrained(tmp_path / "saved")
    plain = seeded(make)
    live.attach(plain, read(tmp_path / "saved", "peft"))
    equal(plain, logits(model))
    write(live.detach(plain), tmp_path / "detached")
    for folder in ("saved", "detached"):
        adaptkit.merge(tmp_path / "base", [tmp_path / folder], tmp_path / f"merged-{folder}")
        equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{folder}"), logits(model))


def test_what_peft_makes_of_all_linear_on_experts_loads(tmp_path: Path):
    """It targets the stacks and the router, with twice the rank where two layers became one."""
    torch.manual_seed(1)
    there = theirs.get_peft_model(seeded(mixtral), theirs.LoraConfig(r=2, target_modules="all-linear")).eval()
    stirred(there)
    there.save_pretrained(tmp_path)
    assert "gate.weight" in json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    equal(ours.PeftModel.from_pretrained(seeded(mixtral), tmp_path), logits(there))


def test_all_linear_says_which_experts_it_does_not_reach():
    """Most of the model would be left out silently; naming them is an answer."""
    with pytest.warns(AdaptKitWarning, match="does not reach experts that are one tensor: gate_up_proj, down_proj"):
        ours.get_peft_model(seeded(mixtral), ours.LoraConfig(r=2, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdaptKitWarning)
        ours.get_peft_model(
            seeded(mixtral), ours.LoraConfig(r=2, target_modules="all-linear", target_parameters=STACKS)
        )
        ours.get_peft_model(seeded(llama), ours.LoraConfig(r=2, target_modules="all-linear"))
