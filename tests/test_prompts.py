"""Virtual tokens on live models: attach, run, train, detach, write; real PEFT computes the same from the file."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft as theirs
import pytest
import torch
from models import inputs_of, loaded
from peft_zoo import IDS, bert, gpt2, llama, t5
from places import FIXTURES
from torch import nn

import adaptkit
from adaptkit import LoRA, PrefixTuning, PromptTuning, PTuning, Select, attach, detach, live
from adaptkit.errors import AdaptKitError

pytestmark = pytest.mark.peft
MODELS = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert}
TUNERS = {"prompt": PromptTuning(tokens=3), "ptuning": PTuning(tokens=3), "prefix": PrefixTuning(tokens=3)}


def made(model: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model]().eval()


def logits(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **more).logits


@pytest.mark.parametrize("kind", TUNERS)
@pytest.mark.parametrize("name", MODELS)
def test_attach_acts_and_detach_leaves_no_trace(name: str, kind: str):
    """Outputs change, disabled gives the model's own, and after detach so does the model, flags and state dict too."""
    model = made(name)
    before, keys = logits(model), list(model.state_dict())

    assert attach(model, TUNERS[kind]) == [""]
    running = logits(model)
    with live.disabled(model):
        torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    copied = copy.deepcopy(model)
    adapter = detach(model)

    assert running.shape != before.shape or not torch.allclose(running, before)
    assert trains and all(n.startswith("virtual_tokens.") for n in trains)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert list(adapter.sites) == [""]
    torch.testing.assert_close(logits(copied), running, atol=0, rtol=0)
    attach(model, adapter)
    torch.testing.assert_close(logits(model), running, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", TUNERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_peft_runs_what_attach_trained(name: str, kind: str, tmp_path: Path):
    """Training moves the numbers; write, and real PEFT computes the trained model's logits; read gives the numbers back."""
    model = made(name)
    attach(model, TUNERS[kind])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = logits(model)
    adapter = detach(model)
    adaptkit.write(adapter, tmp_path / "a", "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = theirs.PeftModel.from_pretrained(made(name), tmp_path / "a").eval()
    again = adaptkit.read(tmp_path / "a")

    assert losses[-1] < losses[0]
    torch.testing.assert_close(logits(there), trained, atol=1e-5, rtol=1e-4)
    attach(model, again)
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ptuning"])
def test_adapters_of_the_fixtures_compute_what_peft_computed(kind: str):
    """Trained by PEFT, read from its folder, attached: PEFT's logits."""
    folder = FIXTURES / "adapters" / "llama" / kind
    inputs = inputs_of("llama")
    model = loaded(FIXTURES / "models" / "llama", "llama")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        there = theirs.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(**inputs).logits
    attach(model, adaptkit.read(folder))

    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, there, atol=1e-4, rtol=1e-4)


def test_virtual_tokens_stand_beside_adapted_modules():
    """A prompt and LoRA act together, are switched by name, and come off in any order."""
    model = made("llama")
    before = logits(model)
    attach(model, LoRA(r=2), Select(r".*q_proj"), name="lora")
    attach(model, PromptTuning(tokens=3), name="prompt")
    both = logits(model)
    live.set_active(model, "lora")
    one = logits(model)
    live.set_active(model, ["lora", "prompt"])

    assert both.shape[1] == before.shape[1] + 3
    torch.testing.assert_close(one, before)  # fresh factors
    torch.testing.assert_close(logits(model), both)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"model", "virtual_tokens"}
    detach(model, "lora")
    detach(model, "prompt")
    torch.testing.assert_close(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_generate_of_an_attached_model_is_its_forward_step_by_step():
    """Also with padding on the left and without a cache."""
    for tuner in TUNERS.values():
        model = made("llama")
        attach(model, tuner)
        mask = torch.ones_like(IDS)
        mask[1, :3] = 0
        ids, given = IDS, mask
        for _ in range(4):
            with torch.no_grad():
                chosen = model(input_ids=ids, attention_mask=given).logits[:, -1].argmax(-1, keepdim=True)
            ids, given = torch.cat([ids, chosen], 1), torch.cat([given, torch.ones_like(chosen)], 1)
        for cached in (True, False):
            found = model.generate(
                IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=cached
            )
            assert found.tolist() == ids.tolist()


def test_what_does_not_fit_is_refused_in_one_sentence():
    """Names, widths, two active sets, models without a cache, gradient checkpointing, merging."""
    model = made("llama")
    attach(model, PromptTuning(tokens=3))
    with pytest.raises(AdaptKitError, match="attached already"):
        attach(model, PromptTuning(tokens=2))
    attach(model, PromptTuning(tokens=2), name="other")
    with pytest.raises(AdaptKitError, match="other is made of virtual tokens, which no weight holds"):
        live.merge(model)
    live.set_active(model, ["default", "other"])
    with pytest.raises(AdaptKitError, match="2 sets of virtual tokens are active; set_active one of them"):
        logits(model)
    wide = detach(model)
    with pytest.raises(AdaptKitError, match=r"prompt is \[3, 32\], the model takes \[3, 128\]"):
        attach(loaded(FIXTURES / "models" / "llama", "llama"), wide)
    checkpointed = made("llama")
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(AdaptKitError, match="gradient checkpointing"):
        attach(checkpointed, PrefixTuning(tokens=2))
    with pytest.raises(AdaptKitError, match="no input embeddings"):
        attach(nn.Linear(2, 2), PromptTuning(tokens=2))


def test_a_head_that_was_trained_with_a_prompt_is_read_under_its_name_in_the_model(tmp_path: Path):
    """PEFT wraps the model whole then, so its keys begin with one word less; written and read again they are the same."""
    theirs.get_peft_model(bert(), theirs.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "theirs"
    )

    adapter = adaptkit.read(tmp_path / "theirs")
    adaptkit.write(adapter, tmp_path / "ours")

    assert sorted(adapter.whole) == ["classifier.bias", "classifier.weight"]
    assert sorted(adaptkit.read(tmp_path / "ours").whole) == sorted(adapter.whole)
