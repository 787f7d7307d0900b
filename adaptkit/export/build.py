"""What there is to export of a model: its graphs, with a sample of their inputs and the names of their axes.

`graphs` is the door: whoever exports something that is more than a plain model builds Graphs of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Mismatch, quoted
from .graph import BATCH, PAST, SEQUENCE, TOTAL, Graph
from .task import Task
from .wrappers import Decoder, Encoder, FirstStep, NextStep, Once, layers

NEW, OLD = 3, 5  # tokens of the sample, and those in its past: no 0 or 1, which tracing would take for fixed
KEYS = ("key", "value")
SOURCE, SPOKEN = "encoder_sequence_length", "decoder_sequence_length"
OUTPUTS: dict[str, dict[str, tuple[str, ...]]] = {  # of each task, in order: name and its axes
    "text-classification": {"logits": (BATCH,)},
    "token-classification": {"logits": (BATCH, SEQUENCE)},
    "question-answering": {"start_logits": (BATCH, SEQUENCE), "end_logits": (BATCH, SEQUENCE)},
    "fill-mask": {"logits": (BATCH, SEQUENCE)},
    "image-classification": {"logits": (BATCH,)},
    "zero-shot-image-classification": {
        "logits_per_image": ("image_batch_size", "text_batch_size"),
        "logits_per_text": ("text_batch_size", "image_batch_size"),
        "text_embeds": ("text_batch_size",),
        "image_embeds": ("image_batch_size",),
    },
    "feature-extraction": {"last_hidden_state": (BATCH, SEQUENCE), "pooler_output": (BATCH,)},
}


def graphs(model: nn.Module, task: Task) -> list[Graph]:
    """The graphs of a model, one for each file.

    Raises Mismatch for a model that no graph of ours describes, or that does not run on the inputs of its task.
    """
    try:
        return {"decoder": _decoder, "encoder": _encoder, "seq2seq": _seq2seq}[task.kind](model, task)
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError) as e:
        raise Mismatch(f"{_kind(model)} does not run on the inputs of {task.name}: {quoted(e)}") from e


def takes(model: nn.Module, word: str) -> bool:
    """Whether a model's forward has a word."""
    return word in inspect.signature(model.forward).parameters


def _decoder(model: nn.Module, task: Task) -> list[Graph]:
    return [decoder(model)]


def decoder(model: nn.Module, name: str = "model") -> Graph:
    """The graph of a language model: tokens, their mask and positions, and what came before."""
    past = past_of(model)
    sample = tokens(model, 2, NEW, OLD) | {"past_key_values": past}
    axes = {
        "input_ids": {0: BATCH, 1: SEQUENCE},
        "attention_mask": {0: BATCH, 1: TOTAL},
        "position_ids": {0: BATCH, 1: SEQUENCE},
    }
    axes |= {f"past_key_values.{i}.{k}": {0: BATCH, 2: PAST} for i in past for k in KEYS}
    outputs: dict[str, Any] = {"logits": {0: BATCH, 1: SEQUENCE}}
    outputs |= {f"present.{i}.{k}": {0: BATCH, 2: TOTAL} for i in past for k in KEYS}
    return Graph(name, Decoder(model), sample, axes, outputs)


def tokens(model: nn.Module, batch: int, new: int, old: int = 0) -> dict[str, Tensor]:
    """Inputs of a language model, without what came before."""
    count = model.config.get_text_config().vocab_size
    found = {
        "input_ids": torch.arange(batch * new).view(batch, new) % count,
        "attention_mask": torch.ones(batch, old + new, dtype=torch.int64),
    }
    if takes(model, "position_ids"):
        found["position_ids"] = torch.arange(old, old + new).expand(batch, new).contiguous()
    return {k: v.to(model.device) for k, v in found.items()}


def past_of(model: nn.Module, batch: int = 2, length: int = OLD) -> dict[str, dict[str, Tensor]]:
    """A past of a model, of its own shapes. Raises Mismatch for a model whose state is more than keys and values."""
    cache = _state(model)
    found = {}
    for i, layer in layers(cache).items():
        key, value = layer["key"], layer["value"]
        found[i] = {
            "key": key.new_zeros(batch, key.shape[1], length, key.shape[3]).normal_(),
            "value": value.new_zeros(batch, value.shape[1], length, value.shape[3]).normal_(),
        }
    return found


def _state(model: nn.Module) -> Any:
    """What a model keeps after reading two tokens."""
    if not takes(model, "past_key_values"):
        raise Mismatch(f"{_kind(model)} reads no cache of keys and values, which a decoder's graph is made of")
    with torch.no_grad():
        cache = model(**tokens(model, 1, 2), use_cache=True).past_key_values
    known = ("DynamicLayer", "DynamicSlidingWindowLayer")
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    shapes = [t.ndim for layer in getattr(cache, "layers", []) for t in (layer.keys, layer.values) if t is not None]
    if not kinds or kinds - set(known) or set(shapes) != {4}:
        seen = ", ".join(sorted(kinds - set(known))) or type(cache).__name__
        raise Mismatch(f"{_kind(model)} keeps a state that is more than keys and values ({seen})")
    return cache


def _kind(model: nn.Module) -> str:
    return quoted(type(model).__name__)


def _encoder(model: nn.Module, task: Task) -> list[Graph]:
    sample, axes = _seen(model, task)
    with torch.no_grad():
        said = model(**sample)
    names = [n for n in OUTPUTS[task.name] if isinstance(getattr(said, n, None), Tensor)]
    names = [n for n in names if n not in getattr(model, "adaptkit_without", ())]
    if not names:
        raise Mismatch(f"{_kind(model)} gives nothing that {task.name} is made of", hint="choose another --task")
    outputs = {n: dict(enumerate(OUTPUTS[task.name][n])) for n in names}
    if "pixel_values" in sample and "input_ids" not in sample:
        outputs = {n: {0: BATCH} for n in names}
    return [Graph("model", Once(model, names), sample, axes, outputs)]


def _seen(model: nn.Module, task: Task) -> tuple[dict[str, Tensor], dict[str, Mapping[int, str]]]:
    """Inputs of an encoder, and the names of their axes."""
    if task.name == "zero-shot-image-classification":
        text, pixels = words(model, 3, 4), images(model, 2)
        axes = {n: {0: "text_batch_size", 1: SEQUENCE} for n in text} | {"pixel_values": {0: "image_batch_size"}}
        order = ("input_ids", "pixel_values", "attention_mask")
        both = text | pixels
        return {n: both[n] for n in order}, axes
    if model.main_input_name == "pixel_values":
        return images(model, 2), {"pixel_values": {0: BATCH}}
    if model.main_input_name != "input_ids":
        raise Mismatch(f"{_kind(model)} reads {quoted(model.main_input_name)}, for which there is no graph here")
    text = words(model, 2, 7)
    return text, {n: {0: BATCH, 1: SEQUENCE} for n in text}


def words(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of a reader of text."""
    config = model.config.get_text_config()
    found = {
        "input_ids": ids(model, batch, length),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64, device=model.device),
    }
    if takes(model, "token_type_ids") and getattr(config, "type_vocab_size", 0) > 1:
        found["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
    return found


def ids(model: nn.Module, batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids at random, none of them the padding's; each text ends as its model marks the end."""
    config = model.config.get_text_config()
    made = torch.Generator().manual_seed(seed)
    found = torch.randint(0, config.vocab_size, (batch, length), generator=made)
    special = {getattr(config, n, None) for n in ("pad_token_id", "eos_token_id", "bos_token_id")}
    plain = next(i for i in range(config.vocab_size) if i not in special)
    for token in special:
        if isinstance(token, int):
            found[found == token] = plain
    if getattr(model.config, "model_type", "") == "clip":
        end = config.eos_token_id if isinstance(config.eos_token_id, int) else 2
        found[:, -1] = config.vocab_size - 1 if end == 2 else end  # where the text's embedding is read
    return found.to(model.device)


def images(model: nn.Module, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Pictures at random, of the size that a model was made for."""
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    high, wide = (size, size) if isinstance(size, int) else size
    made = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, getattr(config, "num_channels", 3), high, wide, generator=made)
    return {"pixel_values": pixels.to(model.device, model.dtype)}


def heard(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of the first half of an encoder-decoder: text, or the spectrum of sound."""
    if model.main_input_name == "input_features":
        frames = 2 * model.config.max_source_positions
        made = torch.Generator().manual_seed(length)
        features = torch.randn(batch, model.config.num_mel_bins, frames, generator=made)
        return {"input_features": features.to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise Mismatch(f"{_kind(model)} reads {quoted(model.main_input_name)}, for which there is no graph here")
    mask = torch.ones(batch, length, dtype=torch.int64, device=model.device)
    return {"input_ids": ids(model, batch, length, length), "attention_mask": mask}


def _seq2seq(model: nn.Module, task: Task) -> list[Graph]:
    source = heard(model, 2, 7)
    first = Encoder(model)
    with torch.no_grad():
        states = first(**source)["last_hidden_state"]
    spoken = {"input_ids": torch.arange(2 * NEW, device=model.device).view(2, NEW)}
    masked = {"encoder_attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
    begin = {**spoken, **masked, "encoder_hidden_states": states}
    with torch.no_grad():
        past = _grown(FirstStep(model)(**begin)["present"])
    return [
        _listening(first, source),
        _starting(model, begin, past),
        _going_on(model, {**spoken, **masked}, past, states),
    ]


def _listening(module: nn.Module, source: dict[str, Tensor]) -> Graph:
    text = "input_ids" in source
    axes = {n: {0: BATCH, 1: SOURCE} if text else {0: BATCH} for n in source}
    return Graph(
        "encoder_model", module, source, axes, {"last_hidden_state": {0: BATCH, 1: SOURCE} if text else {0: BATCH}}
    )


def _starting(model: nn.Module, begin: dict[str, Tensor], past: dict[str, Any]) -> Graph:
    text = "encoder_attention_mask" in begin
    cross = {0: BATCH, 2: SOURCE} if text else {0: BATCH}
    axes: dict[str, Any] = {"input_ids": {0: BATCH, 1: SPOKEN}, "encoder_attention_mask": {0: BATCH, 1: SOURCE}}
    axes["encoder_hidden_states"] = {0: BATCH, 1: SOURCE} if text else {0: BATCH}
    outputs: dict[str, Any] = {"logits": {0: BATCH, 1: SPOKEN}}
    for i in past:
        outputs |= {f"present.{i}.decoder.{k}": {0: BATCH, 2: SPOKEN} for k in KEYS}
        outputs |= {f"present.{i}.encoder.{k}": cross for k in KEYS}
    return Graph("decoder_model", FirstStep(model), begin, axes, outputs)


def _going_on(model: nn.Module, spoken: dict[str, Tensor], past: dict[str, Any], states: Tensor) -> Graph:
    text = "encoder_attention_mask" in spoken
    axes: dict[str, Any] = {"input_ids": {0: BATCH, 1: SPOKEN}, "encoder_attention_mask": {0: BATCH, 1: SOURCE}}
    outputs: dict[str, Any] = {"logits": {0: BATCH, 1: SPOKEN}}
    for i in past:
        axes |= {f"past_key_values.{i}.decoder.{k}": {0: BATCH, 2: f"past_{SPOKEN}"} for k in KEYS}
        axes |= {f"past_key_values.{i}.encoder.{k}": {0: BATCH, 2: SOURCE} if text else {0: BATCH} for k in KEYS}
        outputs |= {f"present.{i}.decoder.{k}": {0: BATCH, 2: f"total_{SPOKEN}"} for k in KEYS}
    sample = {**spoken, "past_key_values": past}
    return Graph("decoder_with_past_model", NextStep(model, states.shape[-1]), sample, axes, outputs)


def _grown(present: dict[str, Any]) -> dict[str, Any]:
    """A past whose own part has other lengths than anything else in the sample."""
    return {
        i: {
            "decoder": {k: torch.cat([v, v[:, :, :2]], 2) for k, v in layer["decoder"].items()},
            "encoder": dict(layer["encoder"]),
        }
        for i, layer in present.items()
    }
