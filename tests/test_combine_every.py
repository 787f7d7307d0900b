"""combine and resize of every adapter that real PEFT made here: each loads in real PEFT and acts as it should, or is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import inputs_of, loaded, outputs
from places import adapter_folders
from safetensors.numpy import load_file, save_file
from test_merge_against_peft import base_of

from adaptkit import AdaptKitError, combine, merge, resize

BASE = "merge it into its base model; what is then extracted"
TABLE = {
    "custom-conv-dora": f"DoRA divides by the norm.*{BASE}",
    "custom-embedding-dora": f"DoRA divides by the norm.*{BASE}",
    "gpt2-dora": f"DoRA divides by the norm.*{BASE}",
    "llama-dora": f"DoRA divides by the norm.*{BASE}",
    "llama-untied-tiny-dora-rslora": f"DoRA divides by the norm.*{BASE}",
    "llama-kasa": f"KaSA's start.*{BASE}",
    "llama-olora": f"OLoRA's start.*{BASE}",
    "llama-pissa": f"PiSSA's start.*{BASE}",
    "llama-untied-tiny-layer-replication": "layer_replication",
    "llama-untied-tiny-alora": "alora_invocation_tokens",
    "custom-conv-grouped": "groups",
}  # name: why it is refused
RANKLESS = ("IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
FOLDERS = {f"{p.parent.name}-{p.name}": p for p in adapter_folders()}
MADE = [pytest.param(n, id=n) for n in FOLDERS if n not in TABLE]


def kind(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def in_peft(folders: dict[str, Path], like: Path) -> Any:
    """Real PEFT with the model that an adapter was made for, and adapters by name; a key that it misses is an error."""
    import peft
    import torch

    family = like.parent.name
    model = loaded(base_of(like), family)
    if like.name == "grown":
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        names = list(folders)
        made = peft.PeftModel.from_pretrained(model, str(folders[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            made.load_adapter(str(folders[name]), adapter_name=name)
    return made.eval()


def answer(model: Any, like: Path) -> np.ndarray:
    import torch

    inputs = inputs_of(json.loads((like / "expect.json").read_text())["inputs"])
    with torch.no_grad():
        found = model(**inputs)
    family = like.parent.name
    return np.asarray(found if family == "custom" else found.last_hidden_state if family == "minilm" else found.logits)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=3e-5 * max(np.abs(expected).max(), 1.0), rtol=1e-4)


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
@pytest.mark.parametrize("name", MADE)
def test_an_adapter_with_itself_acts_in_peft_as_before(name: str, tmp_path: Path):
    """A quarter and three quarters of one adapter are the adapter."""
    folder = FOLDERS[name]
    combine([folder, folder], tmp_path / "o", method=method_of(folder), weights=[0.25, 0.75])

    same(answer(in_peft({"o": tmp_path / "o"}, folder), folder), np.load(folder / "expected.npy"))


def method_of(folder: Path) -> str:
    return "linear" if kind(folder) in RANKLESS else "svd"


@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
@pytest.mark.parametrize("name", [p for p in MADE if "TUNING" not in kind(FOLDERS[p.values[0]])])
def test_a_model_merged_with_what_was_combined_answers_as_with_the_adapter(name: str, tmp_path: Path):
    """By our merge; prompts and prefixes have other tests."""
    folder = FOLDERS[name]
    combine([folder, folder], tmp_path / "o", method=method_of(folder), weights=[0.25, 0.75])
    merge(base_of(folder), tmp_path / "o", tmp_path / "merged", dtype="float32")

    inputs = json.loads((folder / "expect.json").read_text())["inputs"]
    same(outputs(tmp_path / "merged", folder.parent.name, inputs), np.load(folder / "expected.npy"))


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
@pytest.mark.parametrize("name", [p for p in MADE if kind(FOLDERS[p.values[0]]) not in RANKLESS])
def test_resized_to_its_own_rank_it_acts_in_peft_as_before(name: str, tmp_path: Path):
    """Nothing is lost, whatever the module."""
    folder = FOLDERS[name]
    resize(folder, tmp_path / "o", rank=64)

    same(answer(in_peft({"o": tmp_path / "o"}, folder), folder), np.load(folder / "expected.npy"))


def read_file(folder: Path) -> dict[str, np.ndarray]:
    if (folder / "adapter_model.bin").exists():
        import torch

        return {k: v.numpy() for k, v in torch.load(folder / "adapter_model.bin").items()}
    return load_file(folder / "adapter_model.safetensors")


def other(folder: Path, out: Path) -> Path:
    """An adapter of the same settings with other factors."""
    out.mkdir()
    tensors, rng = read_file(folder), np.random.default_rng(7)
    for n, v in tensors.items():
        if ".lora_" in n:
            tensors[n] = (v * rng.uniform(0.2, 1.8, v.shape)).astype(v.dtype)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return out


def sums(name: str) -> bool:
    """Whether real PEFT runs two such adapters at once."""
    config = json.loads((FOLDERS[name] / "adapter_config.json").read_text())
    alone = ("modules_to_save", "target_parameters", "trainable_token_indices", "ensure_weight_tying")
    return config["peft_type"] == "LORA" and config["bias"] == "none" and not any(config.get(k) for k in alone)


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore::adaptkit.AdaptKitWarning")
@pytest.mark.parametrize("name", [p for p in MADE if sums(p.values[0])])
@pytest.mark.parametrize("method", ["svd", "cat"])
def test_two_combined_act_as_peft_runs_both(name: str, method: str, tmp_path: Path):
    """One weight is below zero, and the rank holds all."""
    folder = FOLDERS[name]
    second = other(folder, tmp_path / "second")
    combine(
        [folder, second], tmp_path / "o", method=method, weights=[1, -0.5], **({"rank": 64} if method == "svd" else {})
    )
    from peft.tuners.tuners_utils import BaseTunerLayer

    both = in_peft({"a": folder, "b": second}, folder)
    for module in both.modules():
        if isinstance(module, BaseTunerLayer) and "b" in getattr(module, "scaling", ()):
            module.scaling["b"] *= -0.5
    both.base_model.set_adapter(["a", "b"])

    same(answer(in_peft({"o": tmp_path / "o"}, folder), folder), answer(both, folder))


@pytest.mark.parametrize("name", TABLE)
def test_what_has_no_update_of_its_own_is_refused_with_the_reason(name: str, tmp_path: Path):
    """By both verbs, and nothing is left behind."""
    with pytest.raises(AdaptKitError, match=TABLE[name]):
        combine([FOLDERS[name]] * 2, tmp_path / "o")
    with pytest.raises(AdaptKitError, match=TABLE[name]):
        resize(FOLDERS[name], tmp_path / "o", rank=2)
    assert not list(tmp_path.iterdir())
