"""genai_config.json: how onnxruntime-genai runs a decoder of ours. For the families that it knows by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import virtual
from .graph import Graph

FAMILIES = {  # transformers' model_type -> genai's; those of which texts were compared
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "phi": "phi", "phi3": "phi3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3_text",
}  # fmt: skip


def settings(model: nn.Module, graph: Graph) -> dict[str, Any] | None:
    """The file's content, for a model and its graph; None for a family that onnxruntime-genai does not know."""
    config = model.config
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        return None
    said = getattr(model, "generation_config", None)
    bos, eos, pad = (_token(said, config, f"{n}_token_id") for n in ("bos", "eos", "pad"))
    first = eos[0] if isinstance(eos, list) else eos
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 2048)
    length -= virtual.count(model)
    pad = pad if isinstance(pad, int) else first
    tokens = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {
        "model": {
            "type": family,
            "context_length": length,
            "vocab_size": config.vocab_size,
            **{k: v for k, v in tokens.items() if v is not None},
            "decoder": _decoder(model, graph),
        },
        "search": _search(said, length),
    }


def _decoder(model: nn.Module, graph: Graph) -> dict[str, Any]:
    past = graph.sample["past_key_values"]
    key, config = past["0"]["key"], model.config
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        **({"position_ids": "position_ids"} if "position_ids" in graph.sample else {}),
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{graph.name}.onnx",
        "head_size": key.shape[3],
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(past),
        "num_key_value_heads": key.shape[1],
    }


def _search(said: Any, length: int) -> dict[str, Any]:
    """How to choose the next token, where the model says so; its caches grow, so nothing is shared between steps."""
    found = {
        "do_sample": bool(getattr(said, "do_sample", None)),
        "early_stopping": True,
        "max_length": length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
    }
    for name in ("repetition_penalty", "temperature", "top_k", "top_p"):
        value = getattr(said, name, None)
        if value is not None:
            found[name] = value
    return found


def _token(said: Any, config: Any, name: str) -> Any:
    value = getattr(said, name, None)
    return getattr(config, name, None) if value is None else value
