"""The benchmark's model: Llama-shaped, 1.2 billion bfloat16 parameters in 500 MB shards, LoRA of rank 16 on every linear layer.

Random numbers: only sizes matter for time. Written with NumPy by blocks, so that any size can be made on a small machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from adaptkit.store.safetensors import header

HIDDEN, INTER, VOCAB, SHARD = 2048, 8192, 51200, 500_000_000


def make_base(folder: Path, layers: int = 16) -> Path:
    """A checkpoint of about 0.068 billion parameters a layer, and 0.21 billion in embedding and head."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(
        [("model.embed_tokens.weight", (VOCAB, HIDDEN)), *layer_shapes(layers), ("lm_head.weight", (VOCAB, HIDDEN))]
    )
    weight_map = {}
    for i, held in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write(folder / name, held, seed=i)
        weight_map |= dict.fromkeys((n for n, _ in held), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config(layers)))
    return folder


def config(layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTER,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCAB,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "dtype": "bfloat16",
    }  # fmt: skip


def layer_shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes = []
    for i in range(layers):
        for name, shape in linears().items():
            shapes.append((f"model.layers.{i}.{name}.weight", shape))
        shapes += [(f"model.layers.{i}.{n}_layernorm.weight", (HIDDEN,)) for n in ("input", "post_attention")]
    return [*shapes, ("model.norm.weight", (HIDDEN,))]


def linears() -> dict[str, tuple[int, int]]:
    attention = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
    return attention | {
        "mlp.gate_proj": (INTER, HIDDEN),
        "mlp.up_proj": (INTER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTER),
    }


def split(tensors: list) -> list[list]:
    shards, size = [[]], 0
    for name, shape in tensors:
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards


def write(path: Path, held: list, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with open(path, "wb") as f:
        f.write(header(((n, "BF16", s, 2 * int(np.prod(s))) for n, s in held), {"format": "pt"}))
        for _, shape in held:
            left = int(np.prod(shape))
            while left:
                n = min(left, 1 << 22)
                f.write((rng.standard_normal(n, dtype="f4") * 0.02).astype(ml_dtypes.bfloat16).tobytes())
                left -= n


def make_adapter(folder: Path, layers: int = 16, r: int = 16) -> Path:
    """A float32 LoRA in PEFT's format on all linear layers."""
    if (folder / "adapter_config.json").exists():
        return folder
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(layers):
        for name, (out, into) in linears().items():
            at = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{at}.lora_A.weight"] = rng.standard_normal((r, into), dtype="f4") * 0.02
            tensors[f"{at}.lora_B.weight"] = rng.standard_normal((out, r), dtype="f4") * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = [n.rpartition(".")[2] for n in linears()]
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": modules, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def scratch() -> Path:
    """Where the models are made: ADAPTKIT_BENCH, or the folder `bench` beside this file's repository."""
    return Path(os.environ.get("ADAPTKIT_BENCH", Path(__file__).resolve().parent.parent / "out" / "bench"))
