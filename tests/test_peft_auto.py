"""AutoPeftModelFor...: the base that an adapter's settings name, and the adapter on it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft as theirs
import pytest
import torch
from peft_zoo import IDS, bert, llama

import adaptkit.peft as ours
from adaptkit.errors import AdaptKitError

pytestmark = pytest.mark.peft


def made(folder: Path, task: str | None, model=llama) -> torch.Tensor:
    """A base on disk, an adapter for it made by PEFT, and the logits."""
    torch.manual_seed(0)
    base = model().eval()
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    config = theirs.LoraConfig(r=2, init_lora_weights=False, task_type=task)
    there = theirs.get_peft_model(base, config).eval()
    there.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return there(input_ids=IDS).logits


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_base_is_found(task: str | None, tmp_path: Path):
    """By its task's class, or by the class that the settings name; the tasks must agree."""
    expected = made(tmp_path, task)
    kind = ours.AutoPeftModelForCausalLM if task else ours.AutoPeftModel

    model = kind.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(AdaptKitError, match="the adapter is for"):
        ours.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


def test_a_stranger_s_class_is_not_imported(tmp_path: Path):
    """Settings that name a class outside of transformers are refused, and nothing of theirs runs."""
    made(tmp_path, None)
    file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(file.read_text())
    settings["auto_mapping"] = {"base_model_class": "system", "parent_library": "os"}
    file.write_text(json.dumps(settings))

    with pytest.raises(AdaptKitError, match="not one of transformers'"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_a_classifier_comes_with_its_head(tmp_path: Path):
    """What PEFT saved for SEQ_CLS has the trained head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = made(tmp_path, "SEQ_CLS", bert)

    model = ours.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)
