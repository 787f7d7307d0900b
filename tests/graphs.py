"""Exported graphs as their users run them: ONNX Runtime, names and caches by hand, nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MOE = {"num_hidden_layers": 1, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAKERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | MOE)),
}


def decoder(family: str) -> nn.Module:
    """A tiny decoder whose tokens vary."""
    torch.manual_seed(0)
    model = MAKERS[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3)
    return model


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Ids and mask: one text of seven tokens, or three of different lengths, padded on the left."""
    ids = torch.randint(1, 64, (rows, 7), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : (0, 3, 1)[row]] = 0
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Of real tokens, as generate counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Decoder:
    """A decoder's graph. count: gives positions of a mask.    use: an adapter's file, or None."""

    def __init__(self, folder: Path, count: Any = positions):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self.names = [o.name for o in self.session.get_outputs()]
        self.options, self.count, self.held = None, count, {}

    def use(self, file: Path | None) -> Decoder:
        self.options = onnxruntime.RunOptions()
        if file is not None:
            if file not in self.held:
                self.held[file] = onnxruntime.LoraAdapter()
                self.held[file].Load(str(file))
            self.options.add_active_adapter(self.held[file])
        return self

    def run(self, ids: Tensor, mask: Tensor, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        feeds["position_ids"] = self.count(mask)[:, -ids.shape[1] :].contiguous().numpy()
        for i in self.session.get_inputs():
            if i.name.startswith("past_key_values."):
                empty = np.zeros((len(ids), i.shape[1], 0, i.shape[3]), "f4")
                feeds[i.name] = past[i.name.replace("past_key_values.", "present.")] if past else empty
        return dict(zip(self.names, self.session.run(None, feeds, self.options), strict=True))

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(self.run(ids, mask)["logits"])

    def greedy(self, ids: Tensor, mask: Tensor, count: int = 20) -> Tensor:
        said, past, new = [], None, ids
        for _ in range(count):
            past = self.run(new, mask, past)
            new = torch.from_numpy(past["logits"][:, -1].argmax(-1))[:, None]
            said.append(new)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        return torch.cat(said, 1)


@torch.no_grad()
def generated(model: nn.Module, ids: Tensor, mask: Tensor, count: int = 20) -> Tensor:
    """What torch's generate continues a batch with."""
    how = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids=ids, attention_mask=mask, **how)[:, -count:]
