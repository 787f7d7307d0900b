"""Thin modules between a graph and a model: caches as plain tensors, outputs by name.

One decoder graph serves reading a prompt (an empty past), one token, and several tokens after a past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Past = Mapping[str, Mapping[str, Any]]


class Decoder(nn.Module):
    """logits and present keys and values, of tokens and past ones."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **words: Any) -> dict[str, Any]:
        past = words.pop("past_key_values")
        out = self.model(**words, past_key_values=cache_of(past), use_cache=True)
        return {"logits": out.logits, "present": layers(out.past_key_values)}


class Once(nn.Module):
    """What a model without a cache says, by the names that are wanted."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.config, self.names = model, model.config, tuple(names)

    def forward(self, **words: Any) -> dict[str, Tensor]:
        out = self.model(**words)
        return {name: getattr(out, name) for name in self.names}


class Encoder(nn.Module):
    """The first half of an encoder-decoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder, self.config = model.get_encoder(), model.config

    def forward(self, **words: Any) -> dict[str, Tensor]:
        return {"last_hidden_state": self.encoder(**words).last_hidden_state}


class FirstStep(nn.Module):
    """The second half, at its first step: it makes both caches, its own and that of what the encoder said."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor, **words: Any) -> dict[str, Any]:
        from transformers import DynamicCache, EncoderDecoderCache

        out = self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=_said(encoder_hidden_states),
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            use_cache=True,
            **_masked(words),
        )
        own, cross = layers(out.past_key_values.self_attention_cache), layers(out.past_key_values.cross_attention_cache)
        return {"logits": out.logits, "present": {i: {"decoder": own[i], "encoder": cross[i]} for i in own}}


class NextStep(nn.Module):
    """The second half, after its first step. The encoder is not asked again: its keys and values are an input."""

    def __init__(self, model: nn.Module, width: int):
        super().__init__()
        self.model, self.config, self.width = model, model.config, width

    def forward(self, input_ids: Tensor, past_key_values: Past, **words: Any) -> dict[str, Any]:
        from transformers import EncoderDecoderCache

        own = cache_of({i: layer["decoder"] for i, layer in past_key_values.items()})
        cross = cache_of({i: layer["encoder"] for i, layer in past_key_values.items()})
        both = EncoderDecoderCache(own, cross)
        for i in range(len(past_key_values)):
            both.is_updated[i] = True
        key = past_key_values["0"]["encoder"]["key"]
        unread = key.new_zeros(key.shape[0], key.shape[2], self.width)  # only its shape is looked at
        out = self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=_said(unread),
            past_key_values=both,
            use_cache=True,
            **_masked(words),
        )
        own = layers(out.past_key_values.self_attention_cache)
        return {"logits": out.logits, "present": {i: {"decoder": layer} for i, layer in own.items()}}


def cache_of(past: Past) -> Any:
    """Keys and values by layer as transformers' cache."""
    from transformers import DynamicCache

    return DynamicCache(ddp_cache_data=[(layer["key"], layer["value"]) for layer in past.values()])


def layers(cache: Any) -> dict[str, dict[str, Tensor]]:
    """transformers' cache as keys and values by layer."""
    return {str(i): {"key": layer.keys, "value": layer.values} for i, layer in enumerate(cache.layers)}


def _said(states: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


def _masked(words: dict[str, Any]) -> dict[str, Any]:
    """The encoder's mask as the whole model calls it."""
    return {"attention_mask": words["encoder_attention_mask"]} if "encoder_attention_mask" in words else {}
