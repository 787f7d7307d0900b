"""What a model is asked, so that two computations of it can be compared.

Sizes other than the traced ones, padded batches, a cache that grows by one and by several tokens, and texts to continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from . import build, virtual
from .players import Arrays

LONG = 10**9
Positions = Callable[[np.ndarray], np.ndarray]


@dataclass
class Script:
    """A batch and what is said to it. pads: padding of each row.    chunks: tokens of each step, the first a prompt."""

    pads: tuple[int, ...]
    chunks: tuple[int, ...]


def scripts(model: nn.Module, kind: str) -> list[Script]:
    """What is said to a model: alone, padded, and longer than what was traced, as far as it can hold it."""
    most = room(model)
    if kind == "encoder":
        return [Script((0,), (2,)), Script((0, 3), (7,)), Script((0, 2, 5), (min(13, most),))]
    found = [Script((0,), (1, 1, 3)), Script((0, 3), (7, 1, 5)), Script((0, 2, 5), (13, 1, 3))]
    if kind == "seq2seq":
        found = [Script((0,), (1, 1, 3)), Script((0, 3), (4, 1, 2)), Script((0, 2, 5), (3, 1, 4))]
    return [s for s in found if sum(s.chunks) <= most] or [Script((0,), (1, 1))]


def room(model: nn.Module) -> int:
    """How many tokens a model can hold, where it says so."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    said = (v for n in names if isinstance(v := getattr(config, n, None), int) and v > 0)
    return min(said, default=LONG) - virtual.count(model)


def source(model: nn.Module, kind: str, script: Script) -> Arrays:
    """What the first half of an encoder-decoder reads; nothing for other kinds."""
    if kind != "seq2seq":
        return {}
    heard = build.heard(model, len(script.pads), 6 + len(script.pads))
    if "attention_mask" in heard:
        for row, pad in enumerate(script.pads):
            _pad(model, heard, row, slice(len(heard["input_ids"][row]) - pad, None))
    return _arrays(heard)


def inputs(model: nn.Module, kind: str, script: Script) -> list[Arrays]:
    """The inputs of each step of a script."""
    batch = len(script.pads)
    if kind == "encoder":
        return [_arrays(_read(model, script))]
    if kind == "seq2seq":
        every = build.ids(model, batch, sum(script.chunks), 1).cpu().numpy()
        return [{"input_ids": part} for _, part in _split(every, script.chunks)]
    every = build.ids(model, batch, sum(script.chunks), 1)
    mask = torch.ones_like(every)
    for row, pad in enumerate(script.pads):
        _pad(model, {"input_ids": every, "attention_mask": mask}, row, slice(0, pad))
    whole, seen = every.cpu().numpy(), mask.cpu().numpy()
    return [_words(part, seen[:, : start + part.shape[1]], model) for start, part in _split(whole, script.chunks)]


def _words(ids: np.ndarray, mask: np.ndarray, model: nn.Module) -> Arrays:
    found = {"input_ids": ids, "attention_mask": mask}
    if count := positions(model):
        found["position_ids"] = count(mask)[:, -ids.shape[1] :]
    return found


def positions(model: nn.Module) -> Positions | None:
    """How a model's tokens are counted, given their mask: after a prompt padding counts as well, as PEFT trains it."""
    if not build.takes(model, "position_ids"):
        return None
    return _every if virtual.rows(model) else _real_ones


def _real_ones(mask: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... over real tokens, as generate counts."""
    return np.maximum(np.cumsum(mask, 1) - 1, 0)


def _every(mask: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... over all tokens."""
    return np.cumsum(np.ones_like(mask), 1) - 1


def _split(whole: np.ndarray, chunks: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for n in chunks:
        yield start, np.ascontiguousarray(whole[:, start : start + n])
        start += n


def _read(model: nn.Module, script: Script) -> dict[str, Any]:
    """Inputs of an encoder, texts padded at their ends."""
    batch, length = len(script.pads), script.chunks[0]
    if model.main_input_name == "pixel_values":
        return build.images(model, batch, length)
    found = build.words(model, batch, length)
    if build.takes(model, "pixel_values"):
        return found | build.images(model, batch + 1, length)
    for row, pad in enumerate(script.pads):
        _pad(model, found, row, slice(length - pad, None))
    return found


def _pad(model: nn.Module, words: dict[str, Any], row: int, where: slice) -> None:
    token = getattr(model.config.get_text_config(), "pad_token_id", None)
    words["input_ids"][row, where] = token if isinstance(token, int) and token >= 0 else 0
    words["attention_mask"][row, where] = 0


def prompts(model: nn.Module, kind: str) -> list[tuple[Script, Arrays, list[Arrays]]]:
    """Texts to continue, one alone and three of different lengths."""
    if kind == "encoder" or room(model) < 10:
        return []
    begun = [Script((0,), (5,)), Script((0, 2, 4), (9,))]
    if kind == "seq2seq":
        begun = [Script((0,), (1,)), Script((0, 1, 2), (1,))]
    return [(s, source(model, kind, s), inputs(model, kind, s)) for s in begun]


def following(words: Arrays, tokens: np.ndarray, positions: Positions | None) -> Arrays:
    """The inputs of the step in which a text goes on with new tokens, (batch,)."""
    found = {"input_ids": tokens[:, None]}
    if "attention_mask" in words:
        mask = np.concatenate([words["attention_mask"], np.ones_like(tokens[:, None])], 1)
        found["attention_mask"] = mask
        if positions:
            found["position_ids"] = positions(mask)[:, -1:]
    return found


def _arrays(words: dict[str, Any]) -> Arrays:
    return {n: v.float().cpu().numpy() if v.is_floating_point() else v.cpu().numpy() for n, v in words.items()}
