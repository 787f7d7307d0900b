"""How wide and how deep a model is, under the names that configurations give it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..errors import Mismatch

NAMES = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


class Dimensions(NamedTuple):
    """layers: of attention.    width: of an embedding.    heads: of queries.    kv_heads, head_width: of keys, values."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int


def dimensions(model: nn.Module) -> Dimensions:
    """Read them from a model's configuration. Raises Mismatch with the names that were looked for."""
    config = getattr(model, "config", None)
    if config is None:
        raise Mismatch(f"{type(model).__name__} has no config, so virtual tokens cannot be fitted to it")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    text = config if getattr(config, "is_encoder_decoder", False) else text
    layers, width, heads = (_first(text, config, names) for names in NAMES.values())
    grouped = getattr(text, "num_key_value_heads", None) or heads
    inside = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or width // heads
    return Dimensions(layers, width, heads, grouped, inside)


def _first(text: Any, config: Any, names: tuple[str, ...]) -> int:
    for owner in (text, config):
        for name in names:
            if (value := getattr(owner, name, None)) is not None:
                return value
    raise Mismatch(f"the model's config has none of {', '.join(names)}")
