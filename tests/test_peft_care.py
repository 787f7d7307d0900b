"""What users get wrong, and what must not be left behind when they do: one sentence, and the model as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_zoo import vit
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
        (lora(target_modules=[]), "target_modules is empty"),
        (lora(trainable_token_indices=[10**6]), "outside of the"),
        (lora(target_modules=["q_proj", "embed_tokens"], trainable_token_indices=[1]), "trainable_token_indices"),
        (lora(init_lora_weights="orthogonal", r=3), "an even rank"),
        (ours.PromptTuningConfig(num_virtual_tokens=2, modules_to_save=["zz"]), "no module is called zz"),
        (ours.PromptTuningConfig(num_virtual_tokens=2, token_dim=5), "token_dim is 5, the model's embeddings are"),
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
        ({"lora_dropout": "0.1"}, "between 0 and 1"),
        ({"layers_to_transform": "1"}, "a list of whole numbers"),
        ({"layers_to_transform": ["1"]}, "a list of whole numbers"),
        ({"trainable_token_indices": 5}, "a list of whole numbers"),
        ({"trainable_token_indices": {"embed_tokens": 5}}, "a list of whole numbers"),
        ({"rank_pattern": ["q_proj"]}, "a number for each pattern"),
        ({"alpha_pattern": 3}, "a number for each pattern"),
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


def test_calls_with_another_thing_than_is_wanted_are_sentences(tmp_path: Path):
    """A name for a model, a model without adapters, a model that looks at no tokens, a file for a folder."""
    model = ours.get_peft_model(base(), lora())
    model.save_pretrained(tmp_path / "adapter", selected_adapters="default")
    with pytest.raises(AdaptKitError, match="the model is a str"):
        ours.PeftModel.from_pretrained("llama", tmp_path / "adapter")
    for call in (ours.get_peft_model_state_dict, lambda m: ours.set_peft_model_state_dict(m, {})):
        with pytest.raises(AdaptKitError, match="LlamaForCausalLM, which carries no adapter"):
            call(base())
    with pytest.raises(AdaptKitError, match="no input embeddings"):
        ours.get_peft_model(vit(), ours.PromptTuningConfig(num_virtual_tokens=2))
    (tmp_path / "file").touch()
    with pytest.raises(AdaptKitError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_saving_what_has_no_adapter_any_more_is_refused(how: str, tmp_path: Path):
    """An empty folder would look like a saved model; what is wanted is the model that was returned."""
    model = ours.get_peft_model(base(), lora())
    getattr(model, how)()
    with pytest.raises(AdaptKitError, match="no adapter to save; save the model that merge_and_unload or unload"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["made", "copied", "pickled", "loaded"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_trainers_find_the_columns_and_labels_of_the_base(family: str, way: str, tmp_path: Path):
    """Those that forward does not name are dropped from a batch, pixel_values for one; a task is not needed."""
    from transformers.utils.generic import find_labels

    plain = vit() if family == "vit" else base()
    wanted = inspect.signature(plain.forward), find_labels(type(plain))
    model = ours.get_peft_model(plain, lora(task_type=None, target_modules=["q_proj"]))
    if way == "copied":
        model = copy.deepcopy(model)
    if way == "pickled":
        model = pickle.loads(pickle.dumps(model))
    if way == "loaded":
        model.save_pretrained(tmp_path)
        model = ours.PeftModel.from_pretrained(model.unload(), tmp_path)
    assert (inspect.signature(model.forward), find_labels(type(model))) == wanted
    assert isinstance(model, ours.PeftModel) and type(model).__name__ == "PeftModel"
    assert inspect.signature(ours.PeftModelForCausalLM.forward).parameters.keys() >= {"input_ids", "labels", "kwargs"}


@pytest.mark.parametrize("second", [False, True])
def test_a_head_that_was_resized_trains_again(second: bool):
    """A module of another size stands in its place, frozen as the old one was."""
    plain = base()
    plain.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in plain.named_parameters()}
    model = ours.get_peft_model(plain, lora())
    model.resize_token_embeddings(plain.config.vocab_size + 3)
    if second:
        model.add_adapter("second", lora(target_modules=["k_proj"]))
    assert {n: p.requires_grad for n, p in model.unload().named_parameters()} == flags
    assert not [n for n in plain.__dict__ if n.startswith("_adaptkit")]


class Weighted(ours.PeftModelForCausalLM):
    """A model of somebody's own, whose forward takes what the base does not."""

    def forward(self, input_ids: Any, weight: float = 1.0) -> Any:
        return weight * super().forward(input_ids=input_ids).logits


def test_a_forward_of_somebody_s_own_says_what_it_takes():
    """Its class is left alone, and copies as any other."""
    model = Weighted(base(), lora())
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(one) is Weighted
        assert list(inspect.signature(one.forward).parameters) == ["input_ids", "weight"]
        torch.testing.assert_close(one(IDS % 50, weight=2.0), 2 * model(IDS % 50))


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
