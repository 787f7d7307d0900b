"""Every option of LoraConfig beside real PEFT: names in the model and in files, outputs, training, merging, folders."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft as theirs
import pytest
import torch
from peft_zoo import IDS, PICTURES, bert, gpt2, llama, mixtral, vit
from torch import nn

import adaptkit.peft as ours
from adaptkit import live
from adaptkit.errors import AdaptKitError

pytestmark = pytest.mark.peft


class Mixed(nn.Module):
    """One layer of each kind that transformers rarely has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.sound = nn.Conv1d(2, 12, 3)
        self.film = nn.Conv3d(1, 12, (1, 2, 2))
        self.linear = nn.Linear(12, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        words = self.embedding(tokens)
        words = words + self.attention(words, words, words)[0]
        image = self.conv(words[:, :3, :9].reshape(-1, 3, 3, 3)).mean((-1, -2))
        sound = self.sound(words[:, :2]).mean(-1)
        film = self.film(words[:, :2, :8].reshape(-1, 1, 2, 2, 4)).mean((-1, -2, -3))
        return self.linear(words.mean(1) + image + sound + film)


@dataclass
class Case:
    """A model, settings, and what PEFT does differently.

    keys: whether the model's own state dict has PEFT's names too.
    merges: whether PEFT's merge computes what its forward does.    trains: whether its gradient is that of its forward.
    """

    model: Any
    options: dict[str, Any]
    keys: bool = True
    merges: bool = True
    trains: bool = True


def untied() -> nn.Module:
    return llama(tie_word_embeddings=False)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "plain": Case(untied, {"target_modules": "all-linear"}),
    "dora-bias": Case(untied, {"use_dora": True, "bias": "lora_only"}),
    "bias-all": Case(bert, {"bias": "all", "target_modules": ["query", "value"]}),
    "bias-all-gpt2": Case(gpt2, {"bias": "all"}),
    "bias-lora-only": Case(untied, {"bias": "lora_only"}),
    "lora-bias": Case(bert, {"lora_bias": True, "target_modules": ["query", "dense"]}),
    "lora-bias-loose": Case(bert, {"lora_bias": True, "init_lora_weights": False, "target_modules": ["query", "dense"]}),
    "head": Case(bert, {"modules_to_save": ["classifier"], "target_modules": ["query", "value"]}),
    "lm-head": Case(untied, {"modules_to_save": ["lm_head", "norm"], "target_modules": QV}),
    "embedding-saved": Case(untied, {"modules_to_save": ["embed_tokens"], "target_modules": QV}),
    "vit-head": Case(vit, {"modules_to_save": ["classifier"], "target_modules": ["q_proj", "v_proj"]}),
    "tokens": Case(untied, {"trainable_token_indices": [3, 9, 40], "target_modules": QV}, keys=False),
    "tokens-named": Case(untied, {"trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [5]}, "target_modules": QV}, keys=False),
    "tokens-tied": Case(tied, {"trainable_token_indices": [3, 9, 40], "target_modules": QV}, keys=False),
    "experts": Case(mixtral, {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
    "experts-alone": Case(mixtral, {"target_parameters": EXPERTS[::-1], "use_rslora": True}),
    "attention": Case(Mixed, {"target_modules": ["attention"]}, trains=False),
    "convolutions": Case(Mixed, {"target_modules": ["conv", "sound", "film", "embedding", "linear"]}),
    "convolutions-dora": Case(Mixed, {"target_modules": ["conv", "linear", "embedding"], "use_dora": True}),
    "pissa": Case(untied, {"init_lora_weights": "pissa"}),
    "pissa-gpt2": Case(gpt2, {"init_lora_weights": "pissa", "target_modules": ["c_attn", "wte"]}, merges=False),
    "olora": Case(untied, {"init_lora_weights": "olora", "target_modules": "all-linear"}),
    "orthogonal": Case(untied, {"init_lora_weights": "orthogonal"}),
    "patterns": Case(untied, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1],
                              "layers_pattern": "layers", "target_modules": QV}),
    "excluded": Case(untied, {"target_modules": r".*_proj", "exclude_modules": ["o_proj"]}),
}  # fmt: skip


def quietly(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call PEFT, whose warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def out(model: nn.Module) -> torch.Tensor:
    """The outputs for fixed inputs, by the kind of the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, Mixed):
        return model(IDS[:, :6] % 20)
    if hasattr(base, "vit"):
        return model(pixel_values=PICTURES).logits
    return model(input_ids=IDS).logits


def still(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return out(model.eval())


def twins(case: Case, **more: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """PEFT's model and ours on equal bases with equal numbers, and the base."""
    options = {"r": 4, "lora_alpha": 10} | case.options | more
    torch.manual_seed(0)
    base = case.model().eval()
    there = quietly(theirs.get_peft_model, copy.deepcopy(base), theirs.LoraConfig(**copy.deepcopy(options)))
    here = quietly(ours.get_peft_model, copy.deepcopy(base), ours.LoraConfig(**copy.deepcopy(options)))
    share(there, here)
    return there.eval(), here.eval(), base


def share(there: nn.Module, here: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Give both the same numbers, by PEFT's names."""
    torch.manual_seed(seed)
    numbers = saved(theirs, there, name)
    numbers = {k: v + 0.2 * torch.randn_like(v) for k, v in numbers.items()}
    theirs.set_peft_model_state_dict(there, numbers, adapter_name=name)
    result = ours.set_peft_model_state_dict(here, numbers, adapter_name=name)
    assert not result.missing_keys
    assert not result.unexpected_keys


def saved(room: Any, model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    return quietly(room.get_peft_model_state_dict, model, adapter_name=name, save_embedding_layers=False)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


STARTS = [
    (n, s)
    for n, case in CASES.items()
    for s in (True, False, "gaussian", "orthogonal")
    if s is True or "init_lora_weights" not in case.options
]


@pytest.mark.parametrize(("name", "start"), STARTS)
def test_one_seed_gives_one_adapter(name: str, start: Any):
    """Every tensor of a fresh adapter is PEFT's, and so is the next random number."""
    case = CASES[name]
    torch.manual_seed(0)
    base, options = case.model(), {"r": 4, "init_lora_weights": start} | case.options
    found = []
    for room in (theirs, ours):
        torch.manual_seed(5)
        try:
            model = quietly(room.get_peft_model, copy.deepcopy(base), room.LoraConfig(**copy.deepcopy(options)))
        except Exception as e:
            found.append(type(e))
            continue
        found.append({"next": torch.rand(3)} | saved(room, model))
    if not isinstance(found[0], dict):
        assert isinstance(found[1], dict) or issubclass(found[1], AdaptKitError)  # PEFT does not have it
        return
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        close(found[1][key], value, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_names_and_outputs_are_peft_s(name: str):
    """Tensors of files, names of the model's state dict, what trains, and outputs."""
    case = CASES[name]
    there, here, base = twins(case)
    a, b = saved(theirs, there), saved(ours, here)

    assert {k: v.shape for k, v in b.items()} == {k: v.shape for k, v in a.items()}
    if case.keys:
        assert set(here.state_dict()) == set(there.state_dict())
        trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (there, here)]
        assert trains[1] == trains[0]
    assert here.get_nb_trainable_parameters()[0] == there.get_nb_trainable_parameters()[0]
    close(still(here), still(there))
    assert not torch.allclose(still(here), still(base), atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_merging_and_undoing(name: str):
    """Merged as it runs, equal to PEFT's merge; disabling and unloading give the base, byte for byte."""
    case = CASES[name]
    there, here, base = twins(case)
    running, plain = still(here), still(base)

    with here.disable_adapter():
        torch.testing.assert_close(still(here), plain, atol=1e-6, rtol=0)
    here.merge_adapter()
    close(still(here), running)
    here.unmerge_adapter()
    torch.testing.assert_close(still(here), running)
    merged = copy.deepcopy(here).merge_and_unload()
    close(still(merged), running)
    if case.merges:
        close(still(merged), still(quietly(there.merge_and_unload)))
    assert set(merged.state_dict()) == set(base.state_dict())
    unloaded = here.unload()
    assert {n: p.requires_grad for n, p in unloaded.named_parameters()} == {n: True for n, _ in base.named_parameters()}
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in unloaded.state_dict().items())
    assert not live.attached(unloaded)


@pytest.mark.parametrize("name", CASES)
def test_folders_go_both_ways(name: str, tmp_path: Path):
    """What is saved here loads there with the same outputs, and the reverse."""
    case = CASES[name]
    there, here, base = twins(case)
    expected = still(there)
    here.save_pretrained(tmp_path / "here")
    quietly(there.save_pretrained, tmp_path / "there")

    close(still(quietly(ours.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path / "there")), expected)
    close(still(quietly(ours.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path / "here")), expected)
    close(still(quietly(theirs.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path / "here")), expected)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.trains])
def test_training_lands_where_peft_s_training_lands(name: str):
    """Twenty steps of SGD with momentum from the same numbers."""
    there, here, _ = twins(CASES[name])
    for model in (there, here):
        torch.manual_seed(0)
        target = torch.randn_like(still(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(out(model), target).backward()
            optimizer.step()
    a, b = saved(theirs, there), saved(ours, here)

    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dora_with_dropout_draws_as_peft_draws(kind: str):
    """With one seed, one forward of a training model drops the same inputs."""
    case = Case(
        *(untied, {"use_dora": True}) if kind == "linear" else (Mixed, {"use_dora": True, "target_modules": ["conv"]})
    )
    there, here, _ = twins(case, lora_dropout=0.3)
    outputs = []
    for model in (there, here):
        torch.manual_seed(5)
        outputs.append(out(model.train()).detach())

    close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1], still(here), atol=1e-4)


ROWS = ["default", "__base__", "other", "default"]


@pytest.mark.parametrize("name", ["plain", "convolutions", "head", "bias-none"])
def test_each_sample_may_have_its_own_adapter(name: str):
    """adapter_names: each row is what its own adapter gives, as in PEFT."""
    case = CASES.get(name, Case(gpt2, {}))
    there, here, _ = twins(case)
    for model, room in ((there, theirs), (here, ours)):
        quietly(model.add_adapter, "other", room.LoraConfig(**{"r": 2, "lora_alpha": 10} | copy.deepcopy(case.options)))
    share(there, here, "other", seed=3)
    there, here = there.eval(), here.eval()
    ids = IDS.repeat(2, 1)

    def of(model: nn.Module, **more: Any) -> torch.Tensor:
        with torch.no_grad():
            if isinstance(model.get_base_model(), Mixed):
                return model(ids[:, :6] % 20, **more)
            return model(input_ids=ids, **more).logits

    got = of(here, adapter_names=ROWS)
    alone = {}
    for adapter in ("default", "other"):
        here.set_adapter(adapter)
        alone[adapter] = of(here)
    with here.disable_adapter():
        alone["__base__"] = of(here)

    for i, adapter in enumerate(ROWS):
        close(got[i], alone[adapter][i])
    if not isinstance(here.get_base_model(), Mixed):
        close(got, of(there, adapter_names=ROWS))


def test_each_sample_generates_with_its_own_adapter():
    """generate with adapter_names, greedy and with beams, as in PEFT."""
    there, here, _ = twins(CASES["plain"])
    for model, room in ((there, theirs), (here, ours)):
        model.add_adapter("other", room.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    share(there, here, "other", seed=3)
    for how in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        how |= {"max_new_tokens": 6, "do_sample": False, "input_ids": IDS, "adapter_names": ["other", "__base__"]}
        assert torch.equal(here.generate(**how), quietly(there.generate, **how))


def test_wrong_names_in_a_batch_are_sentences():
    """A name that no adapter has, another number of names than samples, and a batch while training."""
    _, here, _ = twins(CASES["plain"])
    with pytest.raises(AdaptKitError, match="ghost"):
        here(input_ids=IDS, adapter_names=["default", "ghost"])
    with pytest.raises(AdaptKitError, match="3 adapter_names for a batch of 2"):
        here(input_ids=IDS, adapter_names=["default"] * 3)
