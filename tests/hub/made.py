"""A model of many shards and an adapter for some of them, made of random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER, VOCABULARY = 128, 256, 128


def layer(k: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The tensors of one decoder layer."""
    at, f = f"model.layers.{k}", np.float32
    found = {f"{at}.self_attn.{p}_proj.weight": rng.standard_normal((WIDTH, WIDTH), f) for p in "qkvo"}
    found |= {f"{at}.mlp.{p}_proj.weight": rng.standard_normal((INNER, WIDTH), f) for p in ("gate", "up")}
    found[f"{at}.mlp.down_proj.weight"] = rng.standard_normal((WIDTH, INNER), f)
    return found | {f"{at}.{n}_layernorm.weight": np.ones(WIDTH, f) for n in ("input", "post_attention")}


def model(folder: Path, shards: int = 20) -> Path:
    """A Llama of shards - 1 layers, one in each shard, and both ends in the last."""
    rng = np.random.default_rng(0)
    ends = {
        n: rng.standard_normal((VOCABULARY, WIDTH), np.float32) for n in ("model.embed_tokens.weight", "lm_head.weight")
    }
    parts = [*(layer(k, rng) for k in range(shards - 1)), ends | {"model.norm.weight": np.ones(WIDTH, np.float32)}]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": shards - 1, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for k, part in enumerate(parts, 1):
        name = f"model-{k:05}-of-{shards:05}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for p in parts for t in p.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def adapter(folder: Path, layers: range, base: str = "user/base") -> Path:
    """A LoRA on q and v of some layers."""
    rng, tensors = np.random.default_rng(1), {}
    for k in layers:
        for p in "qv":
            at = f"base_model.model.model.layers.{k}.self_attn.{p}_proj"
            tensors[f"{at}.lora_A.weight"] = rng.standard_normal((4, WIDTH), np.float32)
            tensors[f"{at}.lora_B.weight"] = rng.standard_normal((WIDTH, 4), np.float32)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base, "layers_to_transform": list(layers), "peft_version": "0.21.2",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
