"""Running models the way users do: transformers for folders, the maker's class for the custom one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from places import FIXTURES, ROOT


def inputs_of(name: str) -> dict:
    """Input tensors by the name that an adapter's expect.json gives."""
    import torch

    if name.endswith(".npz"):
        return {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / "models" / name).items()}
    return {k: torch.tensor(v) for k, v in json.loads((FIXTURES / "inputs.json").read_text())[name].items()}


def loaded(folder: Path, family: str):
    """The model in a folder, in float32, by from_pretrained where transformers knows it."""
    import torch
    import transformers

    if family == "custom":
        sys.path.insert(0, str(ROOT / "fixtures"))
        from making.custom import Custom
        from safetensors.torch import load_file

        model = Custom()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.float().eval()
    kind = {"bert": "AutoModelForSequenceClassification", "minilm": "AutoModel"}.get(family, "AutoModelForCausalLM")
    model, info = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def outputs(folder: Path, family: str, inputs: str) -> np.ndarray:
    """Logits (or the last hidden state) of the model in a folder, float32."""
    import torch

    model = loaded(folder, family)
    with torch.no_grad():
        found = model(**inputs_of(inputs))
    if family == "custom":
        return found.numpy()
    return (found.last_hidden_state if family == "minilm" else found.logits).float().numpy()
