"""Virtual tokens on a live model: x' = [P; x], or K' = [P_k; K] and V' = [P_v; V]. Three lines, and where to put them.

They stand on the doors of the model, as hooks: whatever calls it (forward, generate, a trainer) finds them there.
Rows of keys and values begin the cache, so a model that goes on from its own cache is not given them twice.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AdaptKitWarning, Mismatch
from .dimensions import dimensions

GEMMA = ("gemma2", "gemma3_text")  # their caches are made of the configuration, since layers differ
Words = dict[str, Any]


class Acting(NamedTuple):
    """Virtual tokens of a kind (a tuner's name).    rows: makes P, (at least tokens, width), when it is needed."""

    name: str
    tokens: int
    rows: Callable[[], Tensor]


class Virtual:
    """What stands on a model's doors.

    source: gives what acts at this moment, or None.
    """

    def __init__(self, model: nn.Module, source: Callable[[], Acting | None]):
        self.model, self.source = model, source
        self.encoder = model.get_encoder() if _two_parts(model) else None
        self.handles = [model.register_forward_pre_hook(self.before_model, with_kwargs=True)]
        if self.encoder is not None:
            self.handles += [self.encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True)]
        elif (backbone := _cached(model)) not in (None, model):
            self.handles += [backbone.register_forward_pre_hook(self.before_backbone, with_kwargs=True)]
        if hasattr(model, "prepare_inputs_for_generation"):
            model.prepare_inputs_for_generation = self.prepare

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        self.model.__dict__.pop("prepare_inputs_for_generation", None)

    def prepare(self, *args: Any, **kwargs: Any) -> Words:
        """Inputs of one step of generation, counted as forward counts them: from the first virtual token on."""
        acting = self.source()
        if acting is not None and kwargs.get("use_cache") is False:
            kwargs["past_key_values"] = None
        words = type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)
        if acting is not None:
            words.pop("position_ids", None)
        return words

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: Words) -> Any:
        """The inputs of the model."""
        acting = self.source()
        if acting is None:
            return None
        words = _named(model, args, kwargs)
        _types(model, words)
        prefix, n = acting.name == "prefix", acting.tokens
        if self.encoder is not None:
            return (), self._decoder(words, acting) if prefix else _longer(words, "attention_mask", n)
        if not prefix:
            return (), _fed(model, words, acting)
        return ((), self._cached(words, acting)) if _cached(model) is model else None

    def before_backbone(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: Words) -> Any:
        """The inputs of the part that reads a cache, where the model with its head has no word for one."""
        acting = self.source()
        if acting is None or acting.name != "prefix":
            return None
        return (), self._cached(_named(backbone, args, kwargs), acting)

    def before_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: Words) -> Any:
        """The inputs of an encoder that a decoder listens to. Its mask may be long enough, when the model gave it."""
        acting = self.source()
        if acting is None or acting.name == "prefix":
            return None
        words = _named(encoder, args, kwargs)
        mask, length = words.get("attention_mask"), _length(words)
        longer = mask is not None and mask.shape[-1] > length
        return (), _fed(encoder, words, acting, longer=longer)

    def _cached(self, words: Words, acting: Acting) -> Words:
        n = acting.tokens
        if not _begun(words):
            x = words["input_ids"] if words.get("inputs_embeds") is None else words["inputs_embeds"]
            words["past_key_values"] = cache(self.model, acting, x.shape[0])
        if words.get("position_ids") is not None:
            words["position_ids"] = words["position_ids"] + n
        return _longer(words, "attention_mask", n)

    def _decoder(self, words: Words, acting: Acting) -> Words:
        if not _begun(words):
            words["past_key_values"] = cache(self.model, acting, _batch(words))
        return _longer(words, "decoder_attention_mask", acting.tokens)


def cache(model: nn.Module, acting: Acting, batch: int) -> Any:
    """The rows of a prefix as a model's cache: row 2l of each token are the keys of layer l, row 2l + 1 its values.

    An encoder-decoder reads them as PEFT trains them: its l-th self-attention takes rows 4l and 4l + 1, modulo their number.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    if model.training:
        _uncheckpointed(model)  # trainers switch it on late
    size = dimensions(model)
    P = acting.rows().to(next(model.parameters()).dtype)
    if P.shape[-1] != 2 * size.layers * size.kv_heads * size.head_width:
        raise Mismatch(
            f"the prefix is {P.shape[-1]} wide, the model takes 2 x {size.layers} layers x {size.kv_heads} heads x "
            f"{size.head_width}",
            hint="is it made for another model?",
        )
    rows = P.view(len(P), 2 * size.layers, size.kv_heads, size.head_width).permute(1, 2, 0, 3)  # (2L, heads, tokens, d)
    rows = rows.unsqueeze(1).expand(-1, batch, -1, -1, -1)
    if _two_parts(model):
        pairs = [(rows[4 * i % len(rows)], rows[(4 * i + 1) % len(rows)]) for i in range(size.layers)]
        return EncoderDecoderCache(DynamicCache(pairs), DynamicCache())
    if getattr(model.config, "model_type", "") not in GEMMA:
        return DynamicCache([(rows[2 * i], rows[2 * i + 1]) for i in range(size.layers)])
    made = DynamicCache(config=model.config)
    for i in range(size.layers):
        made.update(rows[2 * i], rows[2 * i + 1], i)
    return made


def check(model: nn.Module, name: str) -> None:
    """Raises Mismatch when a model cannot be given virtual tokens of a kind."""
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if getattr(words, "weight", None) is None:
        raise Mismatch(f"{type(model).__name__} has no input embeddings to put virtual tokens before")
    if name != "prefix":
        return
    if _cached(model) is None:
        raise Mismatch(
            f"{type(model).__name__} reads no cache of keys and values, which a prefix is", hint="use prompt tuning"
        )
    _uncheckpointed(model)
    config = model.config
    if _two_parts(model) and (getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", 0)) > (
        dimensions(model).layers
    ):
        raise Mismatch(
            "the decoder is deeper than the encoder, which a prefix has its rows from", hint="use prompt tuning"
        )
    if getattr(config, "num_kv_shared_layers", 0) or config.to_dict().get("per_layer_config"):
        raise Mismatch("layers that share or differ in keys and values take no prefix here", hint="use prompt tuning")


def _uncheckpointed(model: nn.Module) -> None:
    """Raises Mismatch for a model that computes its layers twice, without their caches."""
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise Mismatch(
            "prefix tuning does not work with gradient checkpointing", hint="switch it off, or use prompt tuning"
        )


def _fed(module: nn.Module, words: Words, acting: Acting, longer: bool = False) -> Words:
    """x' = [P; x], unless x goes on from a cache that begins with P."""
    n = acting.tokens
    if words.pop("position_ids", None) is not None:
        warnings.warn("position_ids are not used: virtual tokens come first, and move the others", AdaptKitWarning)
    words = words if longer else _longer(words, "attention_mask", n)
    if _begun(words):
        return words
    ids, x = words.pop("input_ids", None), words.get("inputs_embeds")
    x = module.get_input_embeddings()(ids) if x is None else x
    P = acting.rows()[:n].to(x.device, x.dtype).expand(x.shape[0], -1, -1)
    words["inputs_embeds"] = torch.cat([P, x], 1)
    labels = words.get("labels")
    if labels is not None and labels.shape == x.shape[:2] and not labels.is_floating_point():
        words["labels"] = torch.cat([labels.new_full((x.shape[0], n), -100), labels], 1)
    return _types_longer(words, n)


def _types_longer(words: Words, n: int) -> Words:
    if (types := words.get("token_type_ids")) is not None:
        words["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], n), types], 1)
    return words


def _longer(words: Words, name: str, n: int) -> Words:
    mask = words.get(name)
    if mask is None:
        return words
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise Mismatch(f"{name} is not (batch, length), so virtual tokens cannot be added to it", hint="give it so")
    words[name] = torch.cat([mask.new_ones(mask.shape[0], n), mask], 1)
    return words


def _types(model: nn.Module, words: Words) -> None:
    """Only models with a head of their own kind keep token types, as PEFT trains them."""
    keeps = not model.can_generate() and getattr(model, "base_model", model) is not model
    if not keeps and words.get("token_type_ids") is not None:
        warnings.warn("token_type_ids are not used with virtual tokens", AdaptKitWarning)
        words["token_type_ids"] = None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Words) -> Words:
    if not args:
        return dict(kwargs)
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _begun(words: Words) -> bool:
    past = words.get("past_key_values")
    return past is not None and past.get_seq_length() > 0


def _length(words: Words) -> int:
    x = words["input_ids"] if words.get("inputs_embeds") is None else words["inputs_embeds"]
    return x.shape[1]


def _batch(words: Words) -> int:
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds"):
        if words.get(name) is not None:
            return words[name].shape[0]
    raise Mismatch("there is nothing to read: give input_ids and decoder_input_ids, or labels")


def _two_parts(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _cached(model: nn.Module) -> nn.Module | None:
    """The part of a model that reads a cache: itself, or its backbone."""
    for part in (model, getattr(model, "base_model", model)):
        if "past_key_values" in inspect.signature(part.forward).parameters:
            return part
    return None
