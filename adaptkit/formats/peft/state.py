"""Adapters inside other things: the state of a training run, or tensors without their folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...adapter import Adapter
from ...store.checkpoint import Checkpoint
from ...store.entry import Entry
from .assemble import assemble
from .config import read_config
from .keys import PREFIX, SAVED, parse

WRAPPED = re.compile(r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def adapted(entries: Mapping[str, Entry]) -> list[str]:
    """The names that are an adapter's."""
    return [n for n in entries if parse(_clean(n)).part not in ("whole", "training")]


def taken(checkpoint: Checkpoint, settings: Path) -> tuple[Adapter, list[str]]:
    """The adapter among the tensors of a checkpoint, and the names of the tensors that are not its own.

    Raises what reading a PEFT folder raises.
    """
    config = read_config(settings)
    mine, left = {}, []
    for name, entry in checkpoint.entries.items():
        clean = _clean(name)
        if parse(clean).part != "whole" or _is_saved(clean, config):
            mine[clean] = replace(entry, name=clean)
        else:
            left.append(name)
    adapter = assemble(config, mine)
    adapter.meta |= {"path": str(checkpoint.path), "base": str(config.get("base_model_name_or_path") or "")}
    return adapter, left


def _clean(name: str) -> str:
    """A name without what training wraps around modules."""
    name = WRAPPED.sub("", name)
    at = name.find(PREFIX)
    return name[at:] if at > 0 else name


def _is_saved(name: str, config: Mapping) -> bool:
    """Whether a whole tensor is trained: a saved module, or a bias where biases were trained."""
    if SAVED.fullmatch(name):
        return True
    bias = config.get("bias", "none")
    return name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and ".base_layer." in name))
