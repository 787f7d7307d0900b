"""What users get wrong, and what must not be left behind when they do: one sentence, and the model as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from places import FIXTURES
from torch import nn
from transformers import AutoModelForCausalLM

import adaptkit.peft as ours
from adaptkit.errors import AdaptKitError

IDS = torch.arange(5, 35).reshape(2, 15)


def base(name: str = "llama-untied-tiny") -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "models" / name, dtype=torch.float32)


def lora(**options: Any) -> ours.LoraConfig:
    return ours.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)


def marks(model: nn.Module) -> tuple[Any, ...]:
    """Names, flags, and what stands on the model itself."""
    return [(n, p.requires_grad) for n, p in model.named_parameters()], set(model.__dict__)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lora(modules_to_save=["zz"]), "no module is called zz"),
        (lora(modules_to_save=["q_proj"]), "carries an adapter too"),
        (lora(target_parameters=["zz"]), "no parameter is called zz"),
        (lora(trainable_token_indices=[10**6]), "outside of the"),
        (lora(target_modules=["q_proj", "embed_tokens"], trainable_token_indices=[1]), "trainable_token_indices"),
        (lora(init_lora_weights="orthogonal", r=3), "an even rank"),
        (ours.PromptTuningConfig(num_virtual_tokens=2, modules_to_save=["zz"]), "no module is called zz"),
        (ours.PrefixTuningConfig(), "num_virtual_tokens is not given"),
        (ours.PeftConfig(), "of adaptkit.peft"),
        (peft.LoraConfig(), "of adaptkit.peft"),
    ],
)
def test_settings_that_fail_leave_the_model_as_it_was(config: Any, why: str):
    """Names, flags and attributes, for a plain model and for one that carries an adapter."""
    model = base()
    before = marks(model)
    with pytest.raises(AdaptKitError, match=why):
        ours.get_peft_model(model, config)
    assert marks(model) == before
    model = ours.get_peft_model(model, lora())
    before = marks(model)
    with pytest.raises(AdaptKitError):
        model.add_adapter("second", config)
    assert marks(model) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lora_alpha": "16"}, "an alpha is a number"),
        ({"alpha_pattern": {"q_proj": "16"}}, "an alpha is a number"),
        ({"target_modules": 3}, "a pattern, or a list"),
        ({"target_modules": [3]}, "a pattern, or a list"),
        ({"exclude_modules": {"q_proj": 1}}, "a pattern, or a list"),
    ],
)
def test_options_of_a_wrong_type_are_sentences(options: dict[str, Any], why: str):
    """Where PEFT fails later, or not at all."""
    with pytest.raises(AdaptKitError, match=why):
        lora(**options)


def test_a_model_that_is_none_is_a_sentence():
    """A loader that returned nothing is named as such."""
    with pytest.raises(AdaptKitError, match="NoneType, which is no torch module"):
        ours.get_peft_model(None, lora())


@pytest.mark.parametrize("rows_first", [True, False])
def test_two_kinds_of_adapters_on_one_embedding_are_refused(rows_first: bool):
    """Trained rows and LoRA are different layers; the second kind does not pass for constants of the first."""
    kinds = [{"trainable_token_indices": [1, 2]}, {"target_modules": ["embed_tokens"]}]
    first, second = kinds if rows_first else kinds[::-1]
    model = ours.get_peft_model(base(), lora(**first))
    before = marks(model)
    with pytest.raises(AdaptKitError, match="adapters of another kind"):
        model.add_adapter("second", lora(**second))
    assert marks(model) == before
    model(IDS % 50)


def test_letting_an_adapter_train_that_does_not_act_leaves_the_base_frozen():
    """Its biases are aside; they train when it acts."""
    model = ours.get_peft_model(base("gpt2"), lora(target_modules=["c_attn"], bias="all"))
    model.add_adapter("second", lora(target_modules=["c_attn"]))
    biases = [p for n, p in model.named_parameters() if n.endswith(".bias")]
    model.set_adapter("second")
    model.set_requires_grad("default")
    assert not any(p.requires_grad for p in biases)
    model.set_adapter("default")
    assert all(p.requires_grad for p in biases)


def test_checkpointing_that_is_switched_on_after_a_prefix_is_a_sentence():
    """As trainers do it."""
    config = ours.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = ours.get_peft_model(base(), config).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(AdaptKitError, match="does not work with gradient checkpointing"):
        model(IDS % 50)
    model.eval()(IDS % 50)


@pytest.mark.slow
def test_a_trainer_saves_checkpoints_of_tied_models_and_goes_on_from_them(tmp_path: Path):
    """A state dict has every name, as in PEFT, and no tensor twice, which safetensors would refuse."""
    from transformers import Trainer, TrainingArguments

    settings = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    model = ours.get_peft_model(base("llama"), lora())
    arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, **settings)
    Trainer(model, arguments, train_dataset=rows).train()
    trained = ours.get_peft_model_state_dict(model)

    again = ours.get_peft_model(base("llama"), lora())
    Trainer(again, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    names = model.state_dict().keys()
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= names
    for name, value in ours.get_peft_model_state_dict(again).items():
        torch.testing.assert_close(value, trained[name])


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"target_modules": ["embed_tokens"]}]
)
@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_what_trained_before_trains_again(options: dict[str, Any], how: str):
    """Also where a module was replaced as a whole, and in a copy of the model."""
    model = base()
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapted = ours.get_peft_model(model, lora(**options))
    for one in (copy.deepcopy(adapted), adapted):
        assert {n: p.requires_grad for n, p in getattr(one, how)().named_parameters()} == flags
