"""A sharded base in bfloat16 and some float32, and a LoRA for it: large enough to be disturbed, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def make(place: Path, shards: int = 8, hidden: int = 512, prefix: str = "model") -> Path:
    """place/base and place/lora. Every third shard has two layers, every fourth a float32 tensor."""
    layers = _base(place / "base", shards, hidden, prefix)
    _adapter(place / "lora", layers, hidden, prefix)
    return place


def _base(folder: Path, shards: int, hidden: int, prefix: str) -> int:
    folder.mkdir(parents=True)
    numbers, where, size, layer = np.random.default_rng(7), {}, 0, 0
    for i in range(shards):
        name, tensors = f"model-{i + 1:05}-of-{shards:05}.safetensors", {}
        for _ in range(1 + (i % 3 == 0)):
            for module in MODULES:
                dtype = np.float32 if i % 4 == 1 and module == "q_proj" else ml_dtypes.bfloat16
                values = numbers.standard_normal((hidden, hidden), dtype=np.float32).astype(dtype)
                tensors[f"{prefix}.layers.{layer}.self_attn.{module}.weight"] = values
            layer += 1
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        size += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, ensure_ascii=False))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layer})
    )
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(i): i for i in range(5000)}}}))
    return layer


def _adapter(folder: Path, layers: int, hidden: int, prefix: str, rank: int = 8, seed: int = 8) -> None:
    folder.mkdir()
    numbers, tensors = np.random.default_rng(seed), {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.{prefix}.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = numbers.standard_normal((rank, hidden), dtype=np.float32) / 8
            tensors[f"{name}.lora_B.weight"] = numbers.standard_normal((hidden, rank), dtype=np.float32) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
